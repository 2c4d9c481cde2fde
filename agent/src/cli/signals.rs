// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What this process does with a signal, as the kernel tells it.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

/// True if this process ignores the signal.
pub fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the call changes nothing, and writes to `action`, for which zeroes are valid, too.
    let action = unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}
