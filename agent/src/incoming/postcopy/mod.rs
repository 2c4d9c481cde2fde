//! Postcopy, seen from the destination: the guest runs, and its memory follows.
//!
//! - [`faults`]: asking the source for what the guest waits for;
//! - [`arrive`]: receiving and placing, on all streams at once, until all is here;
//! - [`assembly`]: host pages that come in pieces;
//! - [`recover`]: after a lost connection;
//! - this file: the phases.
//!
//! What remains is a hole here by now. The VMM registers its mappings for missing pages before it
//! loads its state, since its devices may touch memory as they load. From then on faults are
//! answered, until all is here and the holes are plain holes again: also while the connections are
//! lost, as far as the source is not needed for it. See [`crate::memory::arriving`] for what
//! happens to a page.

pub mod arrive;
pub mod assembly;
pub mod faults;
pub mod recover;

use super::accept::Accepted;
use super::place::Remaining;
use super::receive::Received;
use super::{load, take_over};
use crate::faults::{Registered, Stop, answer};
use crate::job::{Job, JobError};
use crate::memory::arriving::Arriving;
use crate::memory::pool;
use crate::transport::Listener;
use arrive::Arrival;
use faults::{Asking, Requests};
use pageferry_protocol::control::job::{Phase, RunState};
use std::os::fd::AsFd;
use std::sync::Arc;

/// A guest that runs, or is about to, and lacks memory.
pub struct Incomplete {
    job: Arc<Job>,
    arriving: Arc<Arriving>,
    session: [u8; 16],
    /// Where its source may connect again.
    listeners: Vec<Listener>,
    requests: Requests,
    /// The source gave the guest up: it runs here, or is about to.
    ours: bool,
}

/// Lets the guest run, or stay paused as `guest_is` says, and receives what it is owed.
pub fn take_guest_first(
    job: &Arc<Job>, accepted: &mut Accepted, listener: Option<Listener>, remaining: Remaining,
    received: Received, guest_is: RunState,
) -> Result<(), JobError> {
    let mut registered = Registered::new(job);
    let uffd = job.hooks.register_faults(job.options().hook_timeout)?;
    remaining.make_holes(&job.memory)?;
    // After that: a hole has no reservation. The guest is still the source's, which resumes it if
    // this fails.
    pool::reserve(&job.memory, &remaining.owed)?;
    let arriving = Arriving::new(
        &job.memory,
        Arc::new(remaining.owed),
        uffd,
        accepted.acknowledge,
        job.live.clone(),
    );
    let arriving = Arc::new(arriving?);
    job.owes(arriving.owed());
    job.memory.set_arriving(Some(arriving.clone()));
    arriving.drop_noted(remaining.given_back.noted());
    drop(remaining.given_back);
    let mut guest = Incomplete {
        job: job.clone(),
        arriving: arriving.clone(),
        session: accepted.session,
        listeners: listener.into_iter().collect(),
        requests: Requests::default(),
        ours: false,
    };
    let stop = Stop::new()?;
    std::thread::scope(|scope| {
        let mut asking = Asking::new(job, &arriving, guest.requests.clone());
        let (arriving, stopping, stop) = (&*arriving, stop.on_drop(), stop.as_fd());
        let faults = scope.spawn(move || {
            // Whoever receives waits for the source, and hears of the end in no other way.
            answer(job, arriving, &mut asking, stop, |_| job.cancel.force());
        });
        let arrived = guest.run(accepted, received, guest_is);
        registered.complete = arrived.is_ok();
        // What is a hole now is zero for good: all is here, or no guest ever runs here. Nobody
        // waits any more, before the VMM is asked for anything else: it may be waiting for one who
        // does.
        if registered.complete || !guest.ours {
            arriving.unregister();
        }
        drop(stopping);
        faults.join().map_err(|_| JobError::Panicked)?;
        arrived
    })?;
    drop(registered);
    guest.part(accepted);
    Ok(())
}

impl Incomplete {
    /// Loads the state, takes the guest over, and receives the rest, however often the connections
    /// are lost.
    fn run(
        &mut self, accepted: &mut Accepted, received: Received, guest_is: RunState,
    ) -> Result<(), JobError> {
        self.requests.connect(&self.job, &self.arriving, &accepted.urgent);
        let (job, mut ours) = (self.job.clone(), false);
        let outcome = Arrival::new(&job, &self.arriving, accepted).run(|primary, writer| {
            job.enter(Phase::Loading);
            load(&job, received)?;
            if !self.arriving.loaded() {
                return Err(JobError::State(
                    "the connections broke while the VMM loaded its state".into(),
                ));
            }
            let told = take_over(&job, primary, writer, guest_is, &mut ours)?;
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
