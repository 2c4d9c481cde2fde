// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a process may do by its user, and what others may do with it.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Gives up all capabilities for good: neither this process nor a program that it executes gets any
/// privilege again.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn drop_all() -> Result<(), Errno> {
    set_no_new_privs(true)?;
    let own = capabilities(None)?;
    if own.effective.contains(CapabilitySet::SETPCAP) {
        // One that the kernel does not know ends the list.
        for capability in CapabilitySet::all().iter() {
            if capability_is_in_bounding_set(capability).is_ok_and(|is_in| is_in) {
                remove_capability_from_bounding_set(capability)?;
            }
        }
    }
    // A filter of the service manager may refuse the call, to a process that needs it least.
    if (own.effective | own.permitted | own.inheritable).is_empty() {
        return Ok(());
    }
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

/// No other process of this user may look into this one any more, and no file gets its memory when
/// it crashes: that is the memory of the guest.
///
/// A program that this process executes has to call this again.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn hide() -> Result<(), Errno> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
}
