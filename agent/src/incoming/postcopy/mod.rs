// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Postcopy at the destination: the guest runs first, and its memory follows.
//!
//! - [`fault_forwarder`]: requests the pages that the guest waits for;
//! - [`page_receiver`]: receives and places pages on all streams until none is missing;
//! - [`assembly`]: assembles host pages that are larger than a page;
//! - [`recover`]: waits for the source after a lost connection;
//! - this file: the phases.
//!
//! 1. The pages that remain were announced, and are holes.
//! 2. The VMM registers its mappings for missing faults. This happens before it loads its state,
//!    because its devices may touch memory as they load. From now on faults are answered.
//! 3. The VMM loads its state. The source commits, and the guest runs here.
//! 4. The remaining pages are received and placed.
//! 5. When no page is missing, the mappings are unregistered, and the holes are plain holes again.
//!
//! If this agent is lost after step 3, the next one continues with the pages that are still owed
//! ([`ContinuedPostcopy`]), and waits for the source as after a lost connection.
//!
//! Faults are answered until the end, also while the connections are lost, if the source is not
//! needed for the answer. [`crate::memory::missing_pages`] describes what happens to one page.

pub mod assembly;
pub mod fault_forwarder;
pub mod page_receiver;
pub mod recover;

use super::handshake::KnownSource;
use super::job::IncomingJob;
use super::offer::Accepted;
use super::place::Remaining;
use super::receive::Received;
use super::{load, take_ownership};
use crate::job::{CancelledBy, JobError};
use crate::memory::host_page_set::HostPageSet;
use crate::memory::missing_pages::MissingPages;
use crate::memory::pool;
use crate::missing_faults::{FaultRegistration, StopEvent, handle_faults};
use crate::transport::Listener;
use fault_forwarder::{FaultForwarder, RequestStreams};
use page_receiver::PageReceiver;
use pageferry_protocol::control::job::{Phase, RunState};
use pageferry_protocol::control::journal::Journal;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// A guest that runs or is about to run, and whose memory is not complete.
pub struct PostcopyGuest {
    job: Arc<IncomingJob>,
    missing_pages: Arc<MissingPages>,
    /// The source, which may connect again.
    source: KnownSource,
    /// The addresses at which the source may connect again.
    listeners: Vec<Listener>,
    requests: RequestStreams,
    /// The source gave the guest up. It runs here, or is about to.
    ours: bool,
}

/// Resumes the guest, or leaves it paused, as `guest_is` says, and receives its missing memory.
pub fn receive_guest_first(
    job: &Arc<IncomingJob>, accepted: &mut Accepted, listener: Option<Listener>,
    remaining: Remaining, received: Received, guest_is: RunState,
) -> Result<(), JobError> {
    let registered = FaultRegistration::new(job.common());
    let uffd = job.hooks.register_faults(job.hook_timeout)?;
    remaining.make_holes(&job.memory)?;
    // After the punch, because a hole has no reservation. If this fails, the guest is still the
    // source's, which resumes it.
    pool::reserve(job.memory.blocks(), &remaining.missing)?;
    job.memory.owe(&remaining.missing);
    let missing_pages = MissingPages::new(
        job.memory.blocks(),
        Arc::new(remaining.missing),
        uffd,
        accepted.acknowledge,
        job.live.clone(),
    );
    let missing_pages = Arc::new(missing_pages?);
    job.set_remaining(missing_pages.missing());
    job.memory.set_missing_pages(Some(missing_pages.clone()));
    missing_pages.drop_recorded(remaining.given_back.recorded());
    drop(remaining.given_back);
    if let Some(listener) = &listener {
        job.keep_journal(&Journal::Incoming {
            session: accepted.session,
            peer: accepted.source().peer.map(|peer| peer.encode()).unwrap_or_default(),
            address: listener.address().to_owned(),
            acknowledge: accepted.acknowledge,
            options: job.options.clone(),
        });
    }
    let guest = PostcopyGuest::new(job, missing_pages, accepted.source(), listener);
    guest.arrive(registered, |guest| {
        guest.run(accepted, received, guest_is).map(|()| Some(accepted))
    })
}

/// The rest of a postcopy whose agent was lost here. The guest runs.
pub struct ContinuedPostcopy(PostcopyGuest);

impl ContinuedPostcopy {
    /// From now on discards know of the pages that are `missing`. The source of the migration
    /// connects to `listener`, and may want to be told which pages are placed.
    /// `uffd` is that of the mappings.
    ///
    /// # Errors
    /// If there is no memory for it. It can be tried again then, which is why this is not left to
    /// the job: a job that fails loses the guest.
    pub fn new(
        job: &Arc<IncomingJob>, (source, acknowledge): (KnownSource, bool), listener: Listener,
        missing: HostPageSet, uffd: OwnedFd,
    ) -> Result<Self, JobError> {
        let (blocks, live) = (job.memory.blocks(), job.live.clone());
        let missing_pages = MissingPages::new(blocks, Arc::new(missing), uffd, acknowledge, live)?;
        let missing_pages = Arc::new(missing_pages);
        job.set_remaining(missing_pages.missing());
        job.memory.set_missing_pages(Some(missing_pages.clone()));
        let mut guest = PostcopyGuest::new(job, missing_pages, source, Some(listener));
        guest.ours = true;
        Ok(Self(guest))
    }

    /// Waits for the source, receives all that is owed, and ends the job.
    pub fn run(self, job: &Arc<IncomingJob>) {
        let outcome = self.receive(job);
        job.finish(outcome);
    }

    fn receive(self, job: &Arc<IncomingJob>) -> Result<(), JobError> {
        let Self(guest) = self;
        let registered = FaultRegistration::new(job.common());
        job.guest_arrived();
        guest.missing_pages.drop_settled();
        if !guest.missing_pages.finish_load() {
            return Err(JobError::Cancelled);
        }
        // The lost agent may have read faults, and not answered them.
        guest.missing_pages.retry_all();
        let mut accepted = None;
        guest.arrive(registered, |guest| {
            if guest.missing_pages.missing().remaining_pages() == 0 {
                // The lost agent has brought the last page.
                job.enter(Phase::Postcopy);
                return Ok(None);
            }
            Ok(Some(accepted.insert(guest.wait_for_source()?)))
        })
    }
}

impl PostcopyGuest {
    fn new(
        job: &Arc<IncomingJob>, missing_pages: Arc<MissingPages>, source: KnownSource,
        listener: Option<Listener>,
    ) -> Self {
        Self {
            job: job.clone(),
            missing_pages,
            source,
            listeners: listener.into_iter().collect(),
            requests: RequestStreams::default(),
            ours: false,
        }
    }

    /// Answers faults while `receive` receives all that is missing, and then tells the source, on
    /// the connections that it returns, or when the source connects. The mappings are unregistered
    /// only after that. If this agent is lost before, the next one continues, and tells the source:
    /// otherwise the source would keep the memory of its guest, and wait for ever.
    fn arrive<'a>(
        mut self, mut registered: FaultRegistration<'_>,
        receive: impl FnOnce(&mut Self) -> Result<Option<&'a mut Accepted>, JobError>,
    ) -> Result<(), JobError> {
        let (job, missing_pages) = (self.job.clone(), self.missing_pages.clone());
        let stop = StopEvent::new()?;
        std::thread::scope(|scope| {
            let mut forwarder = FaultForwarder::new(&job, &missing_pages, self.requests.clone());
            let (job, missing_pages) = (&job, &*missing_pages);
            let (stopping, stop) = (stop.stop_on_drop(), stop.as_fd());
            let faults = scope.spawn(move || {
                // The job's thread waits for the source. This is the only way to wake it.
                let give_up = |_| job.cancel.force_cancel(CancelledBy::FaultsLost);
                handle_faults(job, missing_pages, &mut forwarder, stop, give_up);
            });
            let arrived = receive(&mut self).map(|accepted| self.finish_with_source(accepted));
            registered.complete = arrived.is_ok();
            // If all pages are placed, or no guest will ever run here, the holes stay zero. Wake
            // all threads that wait for a page before the next hook: the VMM's thread that answers
            // hooks may be waiting for one of them.
            if registered.complete || !self.ours {
                missing_pages.unregister();
            }
            drop(stopping);
            faults.join().map_err(|_| JobError::Panicked)?;
            arrived
        })?;
        drop(registered);
        Ok(())
    }

    /// Loads the state, receives the ownership of the guest, and receives the rest of its memory.
    /// Recovers as often as the connections are lost.
    fn run(
        &mut self, accepted: &mut Accepted, received: Received, guest_is: RunState,
    ) -> Result<(), JobError> {
        self.requests.connect(&self.job, &self.missing_pages, &accepted.urgent);
        let (job, mut ours) = (self.job.clone(), false);
        let outcome =
            PageReceiver::new(&job, &self.missing_pages, accepted).run(|primary, writer| {
                job.enter(Phase::Loading);
                load(&job, received)?;
                if !self.missing_pages.finish_load() {
                    return Err(JobError::Stuck(
                        "the connections broke while the VMM loaded its state".into(),
                    ));
                }
                let sent = take_ownership(&job, primary, writer, guest_is, &mut ours)?;
                job.enter(Phase::Postcopy);
                Ok(sent?)
            });
        self.ours = ours;
        match outcome {
            // Recover also if the VMM did not resume the guest in time: the guest is nowhere else,
            // and the VMM may be late because it waits for memory.
            Err(error) if ours => self.recover(accepted, error),
            outcome => outcome,
        }
    }
}
