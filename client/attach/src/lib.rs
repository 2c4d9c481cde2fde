// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Attachments: an agent for virtual machine monitors that know nothing of it.
//!
//! A VMM usually links the client library. The programs of this crate stand between an agent and a
//! VMM that stays as it is: to the agent they are the VMM, and they control the VMM from outside.
//!
//! - [`qemu`]: QEMU, whose guest memory is in files, and which is controlled by QMP;
//! - [`process`]: what is done to the process of a VMM: its files, its mappings, and userfaultfds
//!   for its memory.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod process;
pub mod qemu;
