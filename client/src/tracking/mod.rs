// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty tracking on the side of the VMM: what reports which pages the guest wrote.
//!
//! A VMM declares its trackers with [`Client::set_trackers`](crate::Client::set_trackers), in any
//! combination. The shared log is always read in addition.
//!
//! - [`Tracker`]: a tracker of the VMM's own, such as `kvm` (feature `kvm`): KVM's dirty log,
//!   fetched at each sync and cleared lazily;
//! - [`uffd`]: write protection of the mappings of the VMM, which the agent scans from its own
//!   process.

// `tracker`: the trait of a VMM's own tracker; `declared`: what the VMM has declared; `active`:
// what an agent has started.

pub(crate) mod active;
pub(crate) mod declared;
#[cfg(feature = "kvm")]
pub mod kvm;
mod tracker;
pub mod uffd;

pub use tracker::{ClearPages, Tracker};
