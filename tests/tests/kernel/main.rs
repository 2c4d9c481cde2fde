// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel features that pageferry relies on, tested without an agent.
//!
//! - [`tracking`]: PAGEMAP_SCAN and write protection by userfaultfd;
//! - [`kvm_log`]: KVM's dirty log;
//! - [`kvm_guest`]: a guest under KVM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod kvm_guest;
mod kvm_log;
mod tracking;
