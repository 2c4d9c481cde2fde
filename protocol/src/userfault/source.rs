// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The means to open userfaultfds, kept from the start of a process.
//!
//! A VMM drops its rights, and installs a seccomp filter, after its start. A userfaultfd that is
//! opened only when a job begins is refused then, or the filter ends the VMM. So what is needed is
//! opened at the start:
//!
//! - `/dev/userfaultfd`, if it can be opened. It then gives any number of userfaultfds by an ioctl
//!   that needs no right.
//! - Otherwise a pool of [`POOL`] userfaultfds from the system call. It is filled up whenever one
//!   is taken, unless a seccomp filter is in force: the filter may kill the process for the call.
//!
//! Where a filter was in force from the start, and the device cannot be opened, nothing can be
//! tried without that danger. There the system call is made when a userfaultfd is needed, and the
//! filter has to allow it.

use super::descriptor::Userfaultfd;
use super::open::{Device, UserfaultError, by_system_call, handshake_with};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Userfaultfds in the pool. A migration or a snapshot takes one or two.
const POOL: usize = 8;

/// Opens userfaultfds for this address space.
#[derive(Debug)]
pub struct UserfaultSource {
    device: Result<Device, Errno>,
    /// No handshake was made with these yet. Empty if there is a device.
    pool: Mutex<Vec<OwnedFd>>,
    /// The system call failed at the start.
    refused: Option<UserfaultError>,
    /// A seccomp filter was in force at the start.
    filtered: bool,
}

impl UserfaultSource {
    /// Opens what is allowed now. It is no failure if nothing is: see [`UserfaultSource::check`].
    pub fn new() -> Self {
        Self::with(Device::open())
    }

    fn with(device: Result<Device, Errno>) -> Self {
        let (mut pool, mut refused, mut filtered) = (Vec::new(), None, false);
        if let Err(device) = device {
            filtered = is_filtered();
            if !filtered {
                refused = fill(&mut pool, device).err();
            }
        }
        Self { device, pool: Mutex::new(pool), refused, filtered }
    }

    /// Opens one that does not block and knows `features`.
    ///
    /// # Errors
    /// If it is not allowed or was not at the start, or the kernel is too old; or
    /// [`UserfaultError::UsedUp`].
    pub fn open(&self, features: u64) -> Result<Userfaultfd, UserfaultError> {
        let opened = handshake_with(features, || self.next());
        if let Err(device) = self.device
            && !self.filtered
            && !is_filtered()
        {
            // What is missing now may still be allowed when it is needed.
            let _ = fill(&mut self.pool(), device);
        }
        opened.map(Userfaultfd::of_this_process)
    }

    /// Finds out whether a userfaultfd with these features can be opened. Takes none from the pool.
    ///
    /// # Errors
    /// As [`UserfaultSource::open`].
    pub fn check(&self, features: u64) -> Result<(), UserfaultError> {
        // The handshake is per descriptor. Two are looked at, at most, and the pool is filled up.
        self.open(features).map(drop)
    }

    /// Why no userfaultfd with these features can be opened, as far as that can be told without a
    /// system call that a seccomp filter may forbid.
    pub fn known_failure(&self, features: u64) -> Option<UserfaultError> {
        if self.filtered {
            return None;
        }
        self.refused.clone().or_else(|| self.check(features).err())
    }

    /// True if userfaultfds come from `/dev/userfaultfd`.
    pub fn is_device(&self) -> bool {
        self.device.is_ok()
    }

    fn next(&self) -> Result<OwnedFd, UserfaultError> {
        let refused = match &self.device {
            Ok(device) => return device.userfaultfd(),
            Err(errno) => *errno,
        };
        if let Some(pooled) = self.pool().pop() {
            return Ok(pooled);
        }
        if self.filtered || !is_filtered() {
            return by_system_call(refused);
        }
        Err(self.refused.clone().unwrap_or(UserfaultError::UsedUp { count: POOL, device: refused }))
    }

    fn pool(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for UserfaultSource {
    fn default() -> Self {
        Self::new()
    }
}

/// Fills the pool.
fn fill(pool: &mut Vec<OwnedFd>, device: Errno) -> Result<(), UserfaultError> {
    while pool.len() < POOL {
        pool.push(by_system_call(device)?);
    }
    Ok(())
}

/// True if a seccomp filter is in force for this thread, or may be.
fn is_filtered() -> bool {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    // Linux without seccomp has no such line.
    status.is_empty() || mode.is_some_and(|mode| mode.trim() != "0")
}

#[cfg(test)]
mod tests;
