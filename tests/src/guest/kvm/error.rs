// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why the guest cannot be made, or does not do what it should.

use super::state::SAVED_LENGTH;
use std::time::Duration;

/// Why the guest cannot be made, or does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// KVM refused.
    #[error("KVM: cannot {what}")]
    Kvm {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The memory does not hold what the guest needs.
    #[error("guest memory: {0}")]
    Memory(String),
    /// A range to sweep is not within the memory, or touches the firmware.
    #[error("cannot sweep {pages:#x} pages from {gpa:#x}: {why}")]
    Range {
        /// First guest physical address.
        gpa: u64,
        /// Number of pages.
        pages: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The saved state is not one of this guest.
    #[error("saved vCPU state has {length} bytes, {} are needed", SAVED_LENGTH)]
    State {
        /// Its length in bytes.
        length: usize,
    },
    /// The vCPU runs, but must be paused for this request.
    #[error("the vCPU is running")]
    Running,
    /// The vCPU left the loop that it never leaves.
    #[error("unexpected vCPU exit: {0}")]
    Exit(String),
    /// The thread or its signal could not be set up.
    #[error("vCPU thread: {0}")]
    Thread(String),
    /// The guest did not make enough sweeps in time.
    #[error("the guest made {made} sweeps in {within:?}, {wanted} were expected")]
    Slow {
        /// Sweeps that were made.
        made: u32,
        /// Sweeps that were waited for.
        wanted: u32,
        /// How long.
        within: Duration,
    },
    /// The counters do not belong to one moment.
    #[error(
        "page {page} of the sweep has counter {counter}, after {before}: only {before} or, once in a sweep, one less can follow"
    )]
    Torn {
        /// Position in the order of the sweep.
        page: usize,
        /// Its counter.
        counter: u32,
        /// The counter of the page before.
        before: u32,
    },
}

/// For `map_err`: KVM refused `what`.
pub(super) fn kvm_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> GuestError {
    move |source| GuestError::Kvm { what, source }
}
