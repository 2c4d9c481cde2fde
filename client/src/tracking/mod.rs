//! Dirty tracking on the VMM's side: who reports which pages the guest wrote.
//!
//! A VMM declares its trackers with [`Client::set_trackers`](crate::Client::set_trackers); any mix
//! beside the shared log will do.
//!
//! - `kvm` (feature `kvm`): KVM's dirty log, fetched on the sync hook and cleared lazily on the
//!   clear hook;
//! - [`uffd`]: write protection of the VMM's mappings, which the agent scans from its own process;
//! - `declared`: what the VMM has declared; `active`: what an agent has started.

pub(crate) mod active;
pub(crate) mod declared;
#[cfg(feature = "kvm")]
pub mod kvm;
pub mod uffd;
