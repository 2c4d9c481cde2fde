// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents that are child processes of the VMM: waiting for their exit, so that none becomes a
//! zombie.

use crate::deadline::deadline;
use crate::threads::spawn_thread;
use pageferry_protocol::control::socket::wait;
use pageferry_protocol::error::chain;
use rustix::event::PollFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::AsFd;
use std::process::Child;
use std::time::Duration;

/// Waits for the exit of a child on a thread of its own, since it may take long: an agent may still
/// send the memory of a guest that has left.
pub(crate) fn reap(mut child: Child) {
    let reaped = spawn_thread("pageferry-reap", move || {
        let pid = child.id();
        match child.wait() {
            Ok(status) => log::info!("agent process {pid} has ended: {status}"),
            Err(error) => log::warn!("cannot wait for agent process {pid}: {error}"),
        }
    });
    if let Err(error) = reaped {
        log::warn!("an agent process stays a zombie when it ends: {}", chain(&error));
    }
}

/// Waits for the exit of a child, and kills it if that takes longer than `timeout`.
pub(crate) fn end(mut child: Child, timeout: Duration) {
    let has_exited = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
        .and_then(|pidfd| wait(pidfd.as_fd(), PollFlags::IN, deadline(timeout)));
    if has_exited != Ok(true) {
        if !timeout.is_zero() {
            log::warn!("agent process {} has not ended in {timeout:?} and is killed", child.id());
        }
        // Fails only if it has exited.
        let _ = child.kill();
    }
    let _ = child.wait();
}
