// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Recovery of a postcopy at the destination: waiting for the source after a lost connection.
//!
//! The guest keeps running until it touches a missing page. The source connects to the address at
//! which it connected before, or to another address at which an operator has this side listen. Then
//! this side sends a bitmap of the pages that are not missing, and the source sends the rest.

use super::super::accept::accept_again;
use super::super::offer::Accepted;
use super::super::send_error;
use super::PostcopyGuest;
use super::page_receiver::{PageReceiver, send_complete};
use crate::job::{JobError, RecoveryRequest, add};
use crate::memory::MemoryError;
use crate::memory::host_page_set::words_of;
use crate::transport::StreamError;
use crate::transport::StreamSocket;
use pageferry_protocol::control::job::Phase;
use pageferry_protocol::memory::PageRange;

use pageferry_protocol::stream::payload::{MAX_BITMAP_PAGES, encode_bitmap};
use pageferry_protocol::stream::{Kind, RecordHeader};
use std::time::Instant;

impl PostcopyGuest {
    /// Waits for the source after the connections broke, and receives the rest. Repeats this as
    /// often as the connections break.
    ///
    /// # Errors
    /// If the VMM is gone, or the job is given up because the agent ends.
    pub(super) fn recover(
        &mut self, accepted: &mut Accepted, mut why: JobError,
    ) -> Result<(), JobError> {
        loop {
            self.requests.disconnect();
            // These two errors would tell the source only that its connection closed.
            if !matches!(why, JobError::Transport(_) | JobError::Cancelled) {
                send_error(accepted, &why);
            }
            accepted.sockets().iter().for_each(StreamSocket::shut_down);
            if let JobError::Memory(MemoryError::Place(error)) = &why
                && error.is_gone()
            {
                return Err(why);
            }
            *accepted = self.pause(&why)?;
            match self.continue_on(accepted) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    self.job.cancel.check()?;
                    why = error;
                }
            }
        }
    }

    /// Waits for the source of a migration that another agent received until it was lost, and
    /// receives the rest.
    ///
    /// # Errors
    /// As [`PostcopyGuest::recover`].
    pub(super) fn wait_for_source(&mut self) -> Result<Accepted, JobError> {
        let why = JobError::Stuck("the agent before was lost: recover the source".into());
        let mut accepted = self.pause(&why)?;
        if let Err(error) = self.continue_on(&mut accepted) {
            self.job.cancel.check()?;
            self.recover(&mut accepted, error)?;
        }
        Ok(accepted)
    }

    /// Shows that the job is paused, for this reason, until the source has connected again.
    fn pause(&mut self, why: &JobError) -> Result<Accepted, JobError> {
        self.job.recovery.pause();
        self.job.suspend_postcopy(why);
        let accepted = self.wait()?;
        self.job.recovery.resume();
        self.job.enter(Phase::Recovering);
        Ok(accepted)
    }

    fn wait(&mut self) -> Result<Accepted, JobError> {
        loop {
            self.job.cancel.clear_sockets();
            let listeners: Vec<_> = self.listeners.iter().collect();
            if let Some(accepted) = accept_again(
                &self.job,
                &listeners,
                self.source,
                Some(self.job.recovery.fd()),
                None,
            )? {
                return Ok(accepted);
            }
            match self.job.recovery.take() {
                Some(RecoveryRequest::Listen(listener)) => {
                    log::info!("job {}: listening at {}, too", self.job.id, listener.address());
                    self.listeners.push(listener);
                }
                Some(RecoveryRequest::Abandon) => return Err(JobError::Abandoned),
                Some(RecoveryRequest::Connect(_)) | None => {}
            }
        }
    }

    fn continue_on(&self, accepted: &mut Accepted) -> Result<(), JobError> {
        accepted.send_accept(&self.job)?;
        self.send_received(accepted)?;
        self.requests.connect(&self.job, &self.missing_pages, &accepted.urgent);
        self.job.continue_postcopy();
        PageReceiver::new(&self.job, &self.missing_pages, accepted).run(|_, _| Ok(()))
    }

    /// Tells the source which pages are not missing: received, never missing, or discarded.
    fn send_received(&self, accepted: &Accepted) -> Result<(), JobError> {
        for geometry in self.job.memory.table().blocks() {
            let id = geometry.id;
            let (at, block) = self.job.memory.find(id).ok_or(StreamError::NoBlock { id })?;
            let missing = self.missing_pages.missing().block(at);
            for first in (0..geometry.pages()).step_by(MAX_BITMAP_PAGES as usize) {
                let range = PageRange::new(first, MAX_BITMAP_PAGES).intersection(&block.all());
                let received = |(word, pages): (u64, u64)| !missing.page_word(word) & pages;
                let payload = encode_bitmap(words_of(range).map(received));
                let header = RecordHeader::new(Kind::Received, 0, id, range, payload.len());
                add(&self.job.live.wire_bytes, accepted.writer.write(header, &payload)?);
            }
        }
        Ok(())
    }

    /// Waits for a source that may not know that all is here. `None` if it does not come in time,
    /// or the agent ends.
    fn wait_to_tell(&self, until: Instant) -> Option<Accepted> {
        let listeners: Vec<_> = self.listeners.iter().collect();
        let recovery = &self.job.recovery;
        loop {
            let asked = Some(recovery.fd());
            let accepted = accept_again(&self.job, &listeners, self.source, asked, Some(until));
            if let Some(accepted) = accepted.ok()? {
                return Some(accepted);
            }
            let is_abandoned = matches!(recovery.take(), Some(RecoveryRequest::Abandon));
            if is_abandoned || Instant::now() >= until {
                return None;
            }
        }
    }

    /// Tells the source that all memory is here: the guest does not need it any more. If the source
    /// cannot be told, it has `peer_timeout` to connect again and ask.
    pub(super) fn finish_with_source(&self, accepted: Option<&mut Accepted>) {
        let until = Instant::now() + self.job.options.peer_timeout;
        let mut outcome = match accepted {
            Some(accepted) => send_complete(&self.job, accepted),
            None => Err(JobError::Stuck("the agent that was connected to it was lost".into())),
        };
        while let Err(error) = outcome {
            log::warn!(
                "job {}: all is here, and the source may not know: {}",
                self.job.id,
                crate::error::chain(&error)
            );
            self.job.cancel.clear_sockets();
            let Some(mut accepted) = self.wait_to_tell(until) else { return };
            outcome = self
                .continue_on(&mut accepted)
                .and_then(|()| send_complete(&self.job, &mut accepted));
        }
    }
}
