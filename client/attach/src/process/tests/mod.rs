// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests with real processes.
//!
//! A child is this test program again, with a role ([`roles`]). It shares a memfd with the test:
//! one page of counters ([`child::Board`]), and memory that stands for that of a guest.
#![allow(unsafe_code)]

// Children and what they share.
mod child;
// Nothing is noticed by the thread that is stopped.
mod injection;
// What the children do.
mod roles;
// A restartable sequence.
#[cfg(target_env = "gnu")]
mod sequence;
// Denials, and what a handle tells.
mod target;
// Userfaultfds.
mod userfault;

/// Plays the role of a child before the test harness begins. The harness would run it in a thread
/// of its own, and it is the main thread that is stopped.
extern "C" fn play_role() {
    if let Ok(role) = std::env::var(child::ROLE) {
        let played = std::panic::catch_unwind(|| roles::play(&role));
        std::process::exit(i32::from(played.is_err()));
    }
}

// SAFETY: the loader calls the functions of this section before main, with the C library ready.
// This one does nothing without the variable.
#[used]
#[unsafe(link_section = ".init_array")]
static PLAY_ROLE: extern "C" fn() = play_role;
