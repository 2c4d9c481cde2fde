//! Trackers that live on the VMM's side: who tells which pages the guest wrote. Any mix with the shared log will do.
//!
//! - `kvm` (feature `kvm`): KVM's dirty log, fetched on the sync hook and cleared lazily on the clear hook.

#[cfg(feature = "kvm")]
pub mod kvm;
