// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty tracking on the side of the VMM: what reports which pages the guest wrote.
//!
//! A VMM declares its trackers with [`Client::set_trackers`](crate::Client::set_trackers), in any
//! combination. The shared log is always read in addition.
//!
//! - `kvm` (feature `kvm`): KVM's dirty log, fetched on the sync hook and cleared lazily on the
//!   clear hook;
//! - [`uffd`]: write protection of the mappings of the VMM, which the agent scans from its own
//!   process.

// `declared`: what the VMM has declared; `active`: what an agent has started.

pub(crate) mod active;
pub(crate) mod declared;
#[cfg(feature = "kvm")]
pub mod kvm;
pub mod uffd;
