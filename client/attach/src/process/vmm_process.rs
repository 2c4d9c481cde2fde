// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The process of a VMM as the client sees it: where userfaultfds for its mappings come from.

use super::injection::Seccomp;
use super::target::TargetProcess;
use super::userfault::{CreateOptions, RemoteFd, close_kept, create_userfaultfd};
use pageferry_client::{
    AddressRange, MappingProcess, MappingProcessError, UserfaultPurpose, Userfaultfd,
};
use pageferry_protocol::userfault::feature;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The process of a VMM that knows nothing of this.
#[derive(Debug)]
pub struct VmmProcess {
    process: TargetProcess,
    seccomp: Seccomp,
    /// The descriptor that the process keeps while pages are missing. Locked while the process is
    /// traced: only one thread can trace it.
    kept: Mutex<Option<RemoteFd>>,
    longest_stop: Mutex<Duration>,
}

impl VmmProcess {
    /// Nothing is done to the process yet. `seccomp` is what is known about its filters.
    pub fn new(process: TargetProcess, seccomp: Seccomp) -> Self {
        Self { process, seccomp, kept: Mutex::default(), longest_stop: Mutex::default() }
    }

    /// The process.
    pub fn process(&self) -> &TargetProcess {
        &self.process
    }

    /// The longest time that the main thread of the process was stopped for this.
    pub fn longest_stop(&self) -> Duration {
        *lock(&self.longest_stop)
    }

    fn close(&self, kept: &mut Option<RemoteFd>) {
        let Some(kept) = kept.take() else { return };
        match close_kept(&self.process, &kept, self.seccomp) {
            Ok(stopped) => self.stopped(stopped),
            // Nothing is registered with it any more, so it does no harm.
            Err(error) => log::warn!(
                "the VMM keeps a userfaultfd that it does not need: {}",
                pageferry_client::error::chain(&error)
            ),
        }
    }

    fn stopped(&self, time: Duration) {
        let mut longest = lock(&self.longest_stop);
        *longest = (*longest).max(time);
        log::debug!("the VMM's main thread was stopped for {time:?}");
    }
}

impl MappingProcess for VmmProcess {
    fn open_userfaultfd(
        &self, purpose: UserfaultPurpose,
    ) -> Result<Userfaultfd, MappingProcessError> {
        let is_missing = purpose == UserfaultPurpose::MissingPages;
        let mut kept = lock(&self.kept);
        if is_missing {
            self.close(&mut kept);
        }
        let options = CreateOptions {
            user_mode_only: purpose == UserfaultPurpose::WriteTracking,
            keep: is_missing,
            seccomp: self.seccomp,
        };
        let created = create_userfaultfd(&self.process, options)?;
        self.stopped(created.stopped);
        if is_missing {
            *kept = created.kept;
        }
        // The VMM frees memory without a request. Where an agent reads events, the kernel reports
        // it. A VMM that frees waits until its event is read, so tracking must not ask for it.
        let has_reader = purpose != UserfaultPurpose::WriteTracking;
        let removals = if has_reader { feature::EVENT_REMOVE } else { 0 };
        let features = purpose.features() | removals;
        let opened = Userfaultfd::of_another_process(created.fd, features);
        Ok(opened.inspect_err(|_| self.close(&mut kept))?)
    }

    fn is_mapped(&self, range: AddressRange) -> Result<bool, MappingProcessError> {
        Ok(self.process.mappings()?.is_mapped(range.start, range.length))
    }

    fn open_pagemap(&self) -> Result<OwnedFd, MappingProcessError> {
        Ok(self.process.pagemap()?)
    }

    fn memory_complete(&self) {
        self.close(&mut lock(&self.kept));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
