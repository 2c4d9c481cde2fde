// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The process of a VMM, seen from outside.
//!
//! - [`target`]: the process itself: is it alive, may it be traced, and copies of its files;
//! - [`denial`]: why the kernel refuses access to it;
//! - [`vmm_process`]: the process as the client sees it;
//! - [`mappings`]: what it maps, and which of its descriptors a mapping comes from.

pub mod denial;
pub mod injection;
pub mod mappings;
pub mod target;
pub mod userfault;
pub mod vmm_process;

// Their children make system calls for each other.
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
