// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An incoming migration.
//!
//! - [`job`]: the job, as the session and the threads see it;
//! - [`accept`]: accepts connections until a source fits;
//! - [`gate`]: who may wait for that, and who has to leave;
//! - [`refusals`]: what the log and the status say about those who were refused;
//! - [`handshake`]: one connection until it belongs to a migration, or is refused;
//! - [`offer`]: whether the guest of a source fits this VMM;
//! - [`receive`]: reads the streams, with a barrier after each pass;
//! - [`decompress`]: decompresses pages;
//! - [`place`]: places pages into the files ([`never-populate`](crate::invariants#never-populate)
//!   and [`same-memory`](crate::invariants#same-memory));
//! - [`postcopy`]: the guest runs first, and its memory follows;
//! - [`error`]: why the destination refuses what arrives;
//! - this file: the phases.
//!
//! In precopy the agent receives all passes, compares the totals, has the VMM load its state, waits
//! for the commit, and has the VMM resume the guest ([`one-owner`](crate::invariants#one-owner)).
//! If it fails before the commit, it tells the source why, and the guest continues there.

pub mod accept;
pub mod decompress;
pub mod error;
pub mod gate;
pub mod handshake;
pub mod job;
pub mod offer;
pub mod place;
pub mod postcopy;
pub mod receive;
pub mod refusals;

pub use error::IncomingError;

use crate::devices::state_pieces;
use crate::hooks::state_file;
use crate::job::JobError;
use crate::job::consent::GivenUpGuest;
use crate::tracking::checkpoint::SharedCheckpoint;
use crate::transport::{Listener, RecordReader, RecordWriter, StreamError, TransportError};
use accept::Source;
use job::IncomingJob;
use offer::Accepted;
use pageferry_protocol::control::hook::{GuestOrigin, Hook};
use pageferry_protocol::control::job::{Phase, RunState};
use pageferry_protocol::stream::answer::encode_error;
use pageferry_protocol::stream::payload::Totals;
use pageferry_protocol::stream::{Kind, RecordHeader};
use place::Placer;
use receive::Received;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

/// How long the source's last records are still read after this side failed, so that the source
/// gets the error.
const DRAIN: Duration = Duration::from_millis(500);

/// How a guest is received.
#[derive(Debug)]
pub struct IncomingPlan {
    /// Where the guest comes from.
    pub source: Source,
    /// An operator started the job, not the VMM: the address at which it listens. The agent asks
    /// the VMM before it changes memory.
    pub consent_for: Option<String>,
    /// The changes since the last image. A guest that comes ends this record, since it replaces the
    /// memory.
    pub checkpoint: SharedCheckpoint,
}

/// Waits for a guest, receives it, and ends the job.
pub fn run(job: &Arc<IncomingJob>, plan: IncomingPlan) {
    let outcome = receive_guest(job, plan);
    job.finish(outcome);
}

fn receive_guest(job: &Arc<IncomingJob>, plan: IncomingPlan) -> Result<(), JobError> {
    let IncomingPlan { source, consent_for, checkpoint } = plan;
    job.enter(Phase::Connecting);
    let (mut accepted, listener) = accept::accept(job, source)?;
    // The status named the sources that were refused before. That is over.
    job.note("");
    // A source is here, and its guest fits: only now the VMM gives its own guest up.
    let ask = |address| GivenUpGuest::ask(job.common(), GuestOrigin::Migration { address });
    let outcome = consent_for.map(ask).transpose().and_then(|given_up| {
        // No tracker sees what the job writes.
        checkpoint.end("a guest came by a migration");
        checkpoint.stop_idle();
        if let Some(own) = given_up {
            own.replace();
        }
        receive_on(job, &mut accepted, listener)
    });
    if let Err(error) = &outcome {
        send_error(&mut accepted, error);
    }
    outcome
}

fn receive_on(
    job: &Arc<IncomingJob>, accepted: &mut Accepted, listener: Option<Listener>,
) -> Result<(), JobError> {
    job.enter(Phase::Preparing);
    // Only a postcopy needs the listener again.
    let listener = listener.filter(|_| accepted.may_postcopy());
    let placer = Placer::prepare(job.common(), accepted.huge_pages(job.options.huge_pages))?;
    accepted.send_accept(job)?;
    job.enter(Phase::Passes);
    let received = receive::receive(job, accepted, &placer)?;
    verify(&received)?;
    let guest = job.options.resume.apply(received.guest);
    job.set_guest_state(guest);
    if received.postcopy {
        return postcopy::receive_guest_first(
            job,
            accepted,
            listener,
            placer.into_remaining(),
            received,
            guest,
        );
    }
    job.enter(Phase::Loading);
    load(job, received)?;
    // If the RESUMED record was not sent, the source is unconfirmed, and its operator decides.
    let _ = take_ownership(job, &mut accepted.readers[0], &accepted.writer, guest, &mut false)?;
    Ok(())
}

/// The end of every incoming migration: reports that the state is loaded, waits for the commit, and
/// resumes the guest, or leaves it paused, as `guest` says.
///
/// The inner result says whether the source was told. `ours` becomes true at the commit point: from
/// then on the guest is here, even if the VMM does not resume it or answers late.
fn take_ownership(
    job: &IncomingJob, primary: &mut RecordReader, writer: &RecordWriter, guest: RunState,
    ours: &mut bool,
) -> Result<Result<(), TransportError>, JobError> {
    writer.write_plain(Kind::Loaded, 0)?;
    job.enter(Phase::Committing);
    wait_commit(job, primary)?;
    // ---- The commit point: the guest is ours. It is resumed, whatever happens to the connection.
    job.cancel.commit_point()?;
    *ours = true;
    job.guest_arrived();
    // The guest may populate memory as soon as it runs.
    job.allow_populates();
    let resume = Hook::Resume { force: false, paused: guest.is_paused() };
    let resumed = job.hooks.ask(&resume, job.hook_timeout);
    // The error says that the guest is here: "failed" alone would let an operator believe that it
    // did not arrive.
    resumed.map_err(|source| JobError::NotResumed { source })?;
    let sent = writer.write_plain(Kind::Resumed, 0).map(|_| ());
    if let Err(error) = &sent {
        log::warn!(
            "the guest is here, but the source could not be told: {}",
            crate::error::chain(error)
        );
    }
    Ok(sent)
}

/// Compares what was received with what the source says it sent.
fn verify(received: &Received) -> Result<(), JobError> {
    compare(&received.claimed, &received.counted)
}

/// Compares totals field by field.
///
/// # Errors
/// The first field that differs.
pub fn compare(theirs: &Totals, own: &Totals) -> Result<(), JobError> {
    let mut pairs = theirs.named().into_iter().zip(own.named());
    match pairs.find(|((_, theirs), (_, own))| theirs != own) {
        Some(((field, theirs), (_, own))) => {
            Err(IncomingError::Totals { field, theirs, own }.into())
        }
        None => Ok(()),
    }
}

fn load(job: &IncomingJob, received: Received) -> Result<(), JobError> {
    let file = state_file(&received.state);
    let (pieces, file) = file.map_err(|errno| JobError::Io {
        what: "create a file for the VMM's state",
        source: errno.into(),
    })?;
    let mut pieces = pieces;
    let lost = state_pieces::take(&job.devices, &mut pieces, file.as_fd())
        .map_err(JobError::from_io("load the state of the agent's devices"))?;
    if let Some(lost) = lost {
        job.warn(lost);
    }
    job.hooks.ask_with(&Hook::LoadState { pieces }, &[file.as_fd()], job.hook_timeout)?;
    Ok(())
}

fn wait_commit(job: &IncomingJob, primary: &mut RecordReader) -> Result<(), JobError> {
    // Before the commit the source has its VMM relinquish the guest, which is one more hook.
    primary.set_timeout(job.options.peer_timeout + job.hook_timeout);
    let record = primary.read()?;
    match record.kind {
        Kind::Commit => Ok(()),
        kind => Err(StreamError::unexpected(kind, record.payload, "the commit").into()),
    }
}

/// Tells the source why this side failed.
fn send_error(accepted: &mut Accepted, error: &JobError) {
    if matches!(error, JobError::Peer(_)) {
        return;
    }
    let payload = encode_error(&error.to_remote());
    // If the source does not read, it is not told.
    let writer = RecordWriter::new(accepted.writer.socket().with_deadline(DRAIN));
    if writer.write(RecordHeader::plain(Kind::Error, 0, payload.len()), &payload).is_ok() {
        accepted.writer.socket().end_sending();
        // A source that was silent or slow until now would only make this side wait.
        if !matches!(
            error,
            JobError::Transport(TransportError::Silent(_) | TransportError::RecordTimeout { .. })
        ) {
            accepted.readers[0].drain(DRAIN);
        }
    }
}
