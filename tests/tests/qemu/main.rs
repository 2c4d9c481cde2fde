// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Linux guests under unmodified QEMUs, of an old and a new version.
//!
//! - [`guests`]: the guests themselves, on which the other tests here rely;
//! - [`migrations`]: busy guests move in every mode, and their memory takes no more room there;
//! - [`snapshots`]: guests are saved and restored;
//! - [`attach`]: QEMUs that run already;
//! - [`hotplug`]: memory that is plugged in and out;
//! - [`failures`]: the source goes on when a process is killed before the guest has moved;
//! - [`lost_pages`]: processes that are killed in a postcopy;
//! - [`meddling`]: a user who commands QEMU by himself meanwhile;
//! - [`rollback`]: a migration that fails late, and the settings of QEMU;
//! - [`refusals`]: what cannot be served is named;
//! - [`busy`]: a guest with work for all its devices; [`moves`]: moves it to the next QEMU.
#![allow(
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod attach;
mod busy;
mod failures;
mod guests;
mod hotplug;
mod lost_pages;
mod meddling;
mod migrations;
mod moves;
mod refusals;
mod rollback;
mod snapshots;

/// For scenarios that are too long for every run of the suite: `PAGEFERRY_SOAK=1` runs them.
fn soak() -> Option<pageferry_tests::linux_guest::QemuTools> {
    if std::env::var_os("PAGEFERRY_SOAK").is_none() {
        eprintln!("skipped: a long scenario, which PAGEFERRY_SOAK=1 runs");
        return None;
    }
    pageferry_tests::require::qemu()
}
