//! Trackers that live on the VMM's side: who tells which pages the guest wrote. Any mix with the shared log will do.
//!
//! - `kvm` (feature `kvm`): KVM's dirty log, fetched on the sync hook and cleared lazily on the clear hook;
//! - `uffd` (feature `uffd`): write protection of the VMM's mapping, which the agent scans from its own process.

#[cfg(feature = "kvm")]
pub mod kvm;
#[cfg(feature = "uffd")]
pub mod uffd;
