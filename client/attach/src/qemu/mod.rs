// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU, attached from outside.
//!
//! - [`command_line`]: QEMU's arguments, rewritten for memory in files of ours;
//! - [`ram_layout`]: QEMU's account of its memory;
//! - [`monitor`]: commands and events of QEMU, by QMP;
//! - [`device_state`]: the state of the devices, by QEMU's own migration.

pub mod command_line;
pub mod device_state;
pub mod monitor;
pub mod ram_layout;
