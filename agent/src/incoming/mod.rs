//! An incoming migration.
//!
//! - [`accept`]: waiting for the source's streams, and the handshake;
//! - [`receive`]: reading each stream, and the barrier between passes;
//! - [`decompress`]: compressed pages;
//! - [`place`]: pages into the files (laws 2 and 3);
//! - this file: the phases, and the end: verify, load, wait for the commit, resume (law 9).

pub mod accept;
pub mod decompress;
pub mod place;
pub mod receive;

use crate::hooks::state_file;
use crate::job::{Job, JobError};
use crate::outgoing::connect::unexpected;
use crate::transport::TransportError;
use accept::{Accepted, Source};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::Phase;
use pageferry_protocol::stream::hello::encode_error;
use pageferry_protocol::stream::payload::Totals;
use pageferry_protocol::stream::{Kind, RecordHeader};
use place::Placer;
use receive::Received;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

/// How long the source's last records are still read after this side failed, so that it gets to know why.
const DRAIN: Duration = Duration::from_millis(500);

/// Waits for a guest on `source`, takes it, and ends the job.
pub fn run(job: &Arc<Job>, source: Source) {
    let outcome = receive_guest(job, source);
    let outcome = if outcome.is_err() && job.cancel.is_cancelled() { Err(JobError::Cancelled) } else { outcome };
    job.finish(&outcome);
}

fn receive_guest(job: &Arc<Job>, source: Source) -> Result<(), JobError> {
    job.enter(Phase::Connecting);
    let mut accepted = accept::accept(job, source)?;
    let outcome = take_guest(job, &mut accepted);
    if let Err(error) = &outcome {
        say_error(&mut accepted, error);
    }
    outcome
}

fn take_guest(job: &Arc<Job>, accepted: &mut Accepted) -> Result<(), JobError> {
    job.enter(Phase::Preparing);
    let placer = Placer::prepare(job)?;
    accepted.say_accept()?;
    job.enter(Phase::Passes);
    let received = receive::receive(job, accepted, &placer)?;
    verify(&received)?;
    job.enter(Phase::Loading);
    load(job, received)?;
    accepted.writer.write_plain(Kind::Loaded, 0)?;
    job.enter(Phase::Committing);
    wait_commit(job, accepted)?;
    // ---- The line: the guest is ours. It is resumed whatever becomes of the connection.
    job.cancel.cross_the_line()?;
    job.hooks.ask(&Hook::Resume { force: false }, job.options().hook_timeout)?;
    if let Err(error) = accepted.writer.write_plain(Kind::Resumed, 0) {
        log::warn!("the guest runs, but the source does not know: {}", crate::error::chain(&error));
    }
    Ok(())
}

/// Compares what came with what the source says it sent.
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
        Some(((field, theirs), (_, own))) => Err(JobError::Totals { field, theirs, own }),
        None => Ok(()),
    }
}

fn load(job: &Job, received: Received) -> Result<(), JobError> {
    let file = state_file(&received.state);
    let (pieces, file) =
        file.map_err(|errno| JobError::Io { what: "make a file of the state", source: errno.into() })?;
    job.hooks.ask_with(&Hook::LoadState { pieces }, &[file.as_fd()], job.options().hook_timeout)?;
    Ok(())
}

fn wait_commit(job: &Job, accepted: &mut Accepted) -> Result<(), JobError> {
    let options = job.options();
    // The source asks its VMM once more before it commits.
    accepted.readers[0].socket().set_recv_timeout(options.peer_timeout + options.hook_timeout)?;
    let record = accepted.readers[0].read()?;
    match record.kind {
        Kind::Commit => Ok(()),
        kind => Err(unexpected(kind, record.payload, "the commit")),
    }
}

/// Tells the source why this side failed.
fn say_error(accepted: &mut Accepted, error: &JobError) {
    if matches!(error, JobError::Peer(_)) {
        return;
    }
    let payload = encode_error(&error.to_remote());
    if accepted.writer.write(RecordHeader::plain(Kind::Error, 0, payload.len()), &payload).is_ok() {
        accepted.writer.socket().end();
        // Of a source that was silent until now nothing is to be read.
        if !matches!(error, JobError::Transport(TransportError::Silent(_))) {
            accepted.readers[0].drain(DRAIN);
        }
    }
}
