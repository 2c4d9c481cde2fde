// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Model checks of the lock-free parts: every interleaving, and every value that the memory orders
//! allow a load to see. Files of the agent and the protocol are compiled here a second time, with
//! loom's atomics, locks and threads instead of the standard ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bitmap;
mod capture;
mod fault_ordering;
mod fence;
mod marking;
mod owed;
mod protect_ordering;

#[path = "../../../protocol/src/shm"]
mod shm {
    pub(crate) use pageferry_protocol::memory::PageRange;
    pub(crate) mod sync {
        pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
    }
    #[allow(dead_code, unreachable_pub, reason = "it is all of the protocol's file")]
    pub(crate) mod bitmap;
}

#[path = "../../../agent/src/memory"]
mod memory {
    #![allow(dead_code, unreachable_pub, reason = "they are all of the agent's files")]

    pub(crate) mod sync {
        pub(crate) use crate::shm::bitmap;
        pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
        pub(crate) use loom::sync::{Arc, Mutex, MutexGuard};
        pub(crate) use loom::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
        pub(crate) use loom::thread::yield_now;
        pub(crate) use std::sync::PoisonError;
    }
    pub(crate) mod capture_ordering;
    pub(crate) mod fault_ordering;
    pub(crate) mod fence;
    pub(crate) mod marking;
}

#[path = "../../../agent/src/snapshot"]
mod snapshot {
    #[allow(dead_code, unreachable_pub, reason = "it is all of the agent's file")]
    pub(crate) mod protect_ordering;
}
