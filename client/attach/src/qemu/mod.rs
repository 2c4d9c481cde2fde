// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU, attached from outside.
//!
//! - [`launch`]: starts a QEMU; [`command_line`]: its arguments, rewritten for memory in our files;
//! - [`attachment`]: an agent for it; `hooks`: what the agent asks; `machine`: what both share;
//! - [`guard`]: resumes the guest if the attachment dies;
//! - [`suitability`]: what cannot be served;
//! - [`guest_memory`]: its memory; [`ram_layout`]: QEMU's account of that; `claims`: each file has
//!   one guest;
//! - [`monitor`]: commands and events of QEMU, by QMP;
//! - [`device_state`]: the state of the devices, by QEMU's own migration; [`migration_settings`]:
//!   what that changes in QEMU for a moment.

pub mod attachment;
mod claims;
pub mod command_line;
pub mod device_state;
pub mod guard;
pub mod guest_memory;
mod hooks;
pub mod launch;
mod machine;
pub mod migration_settings;
pub mod monitor;
pub mod ram_layout;
pub mod suitability;
