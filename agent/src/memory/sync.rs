// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The atomics, locks and bitmaps of the files that the model checker tries in all orders.
//!
//! `tests/tests/loom` compiles those files a second time (`fence.rs`, `marking.rs`,
//! `fault_ordering.rs`, `capture_ordering.rs`, and `snapshot/protect_ordering.rs`), with its own
//! module of this name.

pub(crate) use pageferry_protocol::shm::bitmap;
pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};
pub(crate) use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
pub(crate) use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
pub(crate) use std::thread::yield_now;
