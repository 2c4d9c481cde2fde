//! Postcopy, seen from the destination: the guest runs, and its memory follows.
//!
//! - [`fault_forwarder`]: asking the source for what the guest waits for;
//! - [`page_receiver`]: receiving and placing, on all streams at once, until all is here;
//! - [`assembly`]: host pages that come in pieces;
//! - [`recover`]: after a lost connection;
//! - this file: the phases.
//!
//! What remains is a hole here by now. The VMM registers its mappings for missing pages before it
//! loads its state, since its devices may touch memory as they load. From then on faults are
//! answered, until all is here and the holes are plain holes again: also while the connections are
//! lost, as far as the source is not needed for it. See [`crate::memory::missing_pages`] for what
//! happens to a page.

pub mod assembly;
pub mod fault_forwarder;
pub mod page_receiver;
pub mod recover;

use super::accept::Accepted;
use super::place::Remaining;
use super::receive::Received;
use super::{load, take_ownership};
use crate::job::{Job, JobError};
use crate::memory::missing_pages::MissingPages;
use crate::memory::pool;
use crate::missing_faults::{FaultRegistration, StopEvent, handle_faults};
use crate::transport::Listener;
use fault_forwarder::{FaultForwarder, RequestStreams};
use page_receiver::PageReceiver;
use pageferry_protocol::control::job::{Phase, RunState};
use std::os::fd::AsFd;
use std::sync::Arc;

/// A guest that runs, or is about to, and lacks memory.
pub struct PostcopyGuest {
    job: Arc<Job>,
    missing_pages: Arc<MissingPages>,
    session: [u8; 16],
    /// Where its source may connect again.
    listeners: Vec<Listener>,
    requests: RequestStreams,
    /// The source gave the guest up: it runs here, or is about to.
    ours: bool,
}

/// Lets the guest run, or stay paused as `guest_is` says, and receives what it is missing.
pub fn receive_guest_first(
    job: &Arc<Job>, accepted: &mut Accepted, listener: Option<Listener>, remaining: Remaining,
    received: Received, guest_is: RunState,
) -> Result<(), JobError> {
    let mut registered = FaultRegistration::new(job);
    let uffd = job.hooks.register_faults(job.options().hook_timeout)?;
    remaining.make_holes(&job.memory)?;
    // After that: a hole has no reservation. The guest is still the source's, which resumes it if
    // this fails.
    pool::reserve(&job.memory, &remaining.missing)?;
    let missing_pages = MissingPages::new(
        &job.memory,
        Arc::new(remaining.missing),
        uffd,
        accepted.acknowledge,
        job.live.clone(),
    );
    let missing_pages = Arc::new(missing_pages?);
    job.set_missing(missing_pages.missing());
    job.memory.set_missing_pages(Some(missing_pages.clone()));
    missing_pages.drop_recorded(remaining.given_back.recorded());
    drop(remaining.given_back);
    let mut guest = PostcopyGuest {
        job: job.clone(),
        missing_pages: missing_pages.clone(),
        session: accepted.session,
        listeners: listener.into_iter().collect(),
        requests: RequestStreams::default(),
        ours: false,
    };
    let stop = StopEvent::new()?;
    std::thread::scope(|scope| {
        let mut asking = FaultForwarder::new(job, &missing_pages, guest.requests.clone());
        let (missing_pages, stopping, stop) = (&*missing_pages, stop.stop_on_drop(), stop.as_fd());
        let faults = scope.spawn(move || {
            // Whoever receives waits for the source, and hears of the end in no other way.
            handle_faults(job, missing_pages, &mut asking, stop, |_| job.cancel.force());
        });
        let arrived = guest.run(accepted, received, guest_is);
        registered.complete = arrived.is_ok();
        // What is a hole now is zero for good: all is here, or no guest ever runs here. Nobody
        // waits any more, before the VMM is asked for anything else: it may be waiting for one who
        // does.
        if registered.complete || !guest.ours {
            missing_pages.unregister();
        }
        drop(stopping);
        faults.join().map_err(|_| JobError::Panicked)?;
        arrived
    })?;
    drop(registered);
    guest.finish_with_source(accepted);
    Ok(())
}

impl PostcopyGuest {
    /// Loads the state, takes the guest over, and receives the rest, however often the connections
    /// are lost.
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
                    return Err(JobError::State(
                        "the connections broke while the VMM loaded its state".into(),
                    ));
                }
                let told = take_ownership(&job, primary, writer, guest_is, &mut ours)?;
                job.enter(Phase::Postcopy);
                Ok(told?)
            });
        self.ours = ours;
        match outcome {
            // Also if the VMM does not resume it: it is nowhere else, and a VMM that is late waits
            // for memory, perhaps.
            Err(error) if ours => self.recover(accepted, error),
            outcome => outcome,
        }
    }
}
