// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The trackers that the VMM has declared. The client declares them to every agent.

use crate::control::Control;
use crate::error::Error;
use pageferry_protocol::control::Trackers;
use pageferry_protocol::control::request::Request;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// What every agent is told.
#[derive(Debug, Default)]
pub(crate) struct DeclaredTrackers {
    sources: Trackers,
    /// Of this process, for write-protect scanning.
    pagemap: Option<OwnedFd>,
}

impl DeclaredTrackers {
    pub(crate) fn new(sources: Trackers, pagemap: Option<OwnedFd>) -> Self {
        Self { sources, pagemap }
    }

    /// What was declared; the empty set if nothing was.
    pub(crate) fn sources(&self) -> Trackers {
        self.sources
    }

    /// Tells an agent, if anything was declared.
    pub(crate) fn send(&self, control: &mut Control) -> Result<(), Error> {
        if !self.sources.is_declared() {
            return Ok(());
        }
        let fds: Vec<BorrowedFd<'_>> = self.pagemap.iter().map(AsFd::as_fd).collect();
        control.request(&Request::SetTrackers { sources: self.sources }, &fds, |_| Ok(()))
    }
}
