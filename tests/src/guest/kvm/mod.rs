// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A real guest: one vCPU under KVM that increments a 32-bit counter at the start of every page of
//! its memory, in ascending order, sweep after sweep. So at any moment the counters are `c, c, ...,
//! c, c-1, ..., c-1`. A page that arrived in an old version, or not at all, makes a second step,
//! and [`check_consistent`] finds it.
//!
//! The guest is 64-bit code at privilege level 3, in flat segments over an identity map of 2 MiB
//! pages. It needs no operating system, because the code never leaves its loop. It uses level 3
//! because that is fast everywhere: it runs natively even on a KVM that emulates everything else,
//! such as real mode.
//!
//! - [`sweep`]: which pages it sweeps, and whether their counters are those of one moment;
//! - `firmware`: its code, the table of the ranges, its page tables, and the registers that it
//!   starts from;
//! - `vcpu`: running and stopping a vCPU; `state`: its registers as bytes;
//! - [`vm`]: all of this as one [`KvmGuest`]; [`in_vmm`]: its use as a guest of the mock VMM;
//! - [`error`]: what can go wrong.

pub mod error;
mod firmware;
pub mod in_vmm;
mod state;
pub mod sweep;
mod vcpu;
pub mod vm;

pub use error::GuestError;
pub use sweep::{FIRMWARE_PAGES, Progress, Sweep, check_consistent, counters};
pub use vm::KvmGuest;
