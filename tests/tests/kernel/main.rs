// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What pageferry relies on in this machine's kernel, without an agent.
//!
//! - [`tracking`]: PAGEMAP_SCAN and write protection by userfaultfd;
//! - [`kvm_guest`]: a guest under KVM, and its dirty log.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod kvm_guest;
mod tracking;
