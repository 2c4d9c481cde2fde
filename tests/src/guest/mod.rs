//! Guests: whoever writes the memory while it is moved.
//!
//! - [`kvm`]: a vCPU under KVM that increments a counter in every page, sweep after sweep.

pub mod kvm;
