// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The process of a VMM as the client sees it: where userfaultfds for its mappings come from.

use super::injection::Seccomp;
use super::target::TargetProcess;
use super::userfault::{CreateOptions, RemoteFd, close_kept, create_userfaultfd};
use pageferry_client::{
    AddressRange, MappingProcess, MappingProcessError, UserfaultPurpose, Userfaultfd,
};
use pageferry_protocol::userfault::feature;
use std::fmt::{Debug, Formatter};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
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
    tracking_check: OnceLock<TrackingCheck>,
}

/// Finds out whether all writes to guest memory can be tracked now.
struct TrackingCheck(Box<dyn Fn() -> Result<(), MappingProcessError> + Send + Sync>);

impl Debug for TrackingCheck {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("TrackingCheck")
    }
}

impl VmmProcess {
    /// Nothing is done to the process yet. `seccomp` is what is known about its filters.
    pub fn new(process: TargetProcess, seccomp: Seccomp) -> Self {
        let (kept, longest_stop, tracking_check) =
            (Mutex::default(), Mutex::default(), OnceLock::new());
        Self { process, seccomp, kept, longest_stop, tracking_check }
    }

    /// The process.
    pub fn process(&self) -> &TargetProcess {
        &self.process
    }

    /// From now on, `check` is asked whenever tracking is to start. Later calls change nothing.
    pub fn check_tracking(
        &self, check: impl Fn() -> Result<(), MappingProcessError> + Send + Sync + 'static,
    ) {
        let _ = self.tracking_check.set(TrackingCheck(Box::new(check)));
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
        if purpose == UserfaultPurpose::WriteTracking
            && let Some(TrackingCheck(check)) = self.tracking_check.get()
        {
            check()?;
        }
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
