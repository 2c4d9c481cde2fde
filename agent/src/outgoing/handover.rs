// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hand-over of the stopped guest, with the commit point
//! ([`one-owner`](crate::invariants#one-owner)).
//!
//! While the guest is paused, the source sends the VMM's state and the totals, and waits until the
//! destination has loaded the state. Then it has its VMM relinquish the guest, sends the commit,
//! and waits for the confirmation. It never resumes the guest after it has sent the commit, and
//! always can before.
//!
//! The pause has a deadline, which depends on the bytes that must be sent. If it passes before the
//! commit point, the guest continues here. If the confirmation does not come, the job is
//! *unconfirmed*, and an operator must look at both sides.

use super::connect::{Primary, SessionId};
use super::job::OutgoingJob;
use super::migration::Migration;
use super::stop::Stop;
use crate::job::pause::{PausedGuest, SavedState};
use crate::job::{JobError, add};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::stream::payload::{StatePart, Totals};
use pageferry_protocol::stream::record::FLAG_PAUSED;
use pageferry_protocol::stream::{Kind, RecordHeader};
use std::os::fd::OwnedFd;

/// Gives up ownership of the guest, and waits until the destination confirms that the guest is
/// there. The VMM keeps `session`, so that another agent can recover the migration. It is all
/// zeroes if there will be nothing to recover.
pub fn commit(
    job: &OutgoingJob, guest: &mut PausedGuest, primary: &mut Primary, session: SessionId,
) -> Result<(), JobError> {
    // From here on a cancel is refused. After the hook the VMM does not resume the guest by itself,
    // even if it loses this agent.
    job.cancel.commit_point()?;
    let relinquish = Hook::Relinquish { session, release: job.options().release };
    if let Err(error) = job.hooks.ask(&relinquish, job.hook_timeout) {
        // No commit was sent, so the guest is still ours. The drop has the VMM resume it.
        job.cancel.revert_commit_point();
        return Err(error.into());
    }
    // The VMM may have given this agent up since it answered, and its operator may be about to run
    // the guest. Nothing that waits may come between this check and the commit.
    job.check_vmm_connected()?;
    // ---- The commit point. Nothing after it resumes the guest here.
    guest.give_up();
    let confirmed = send_commit(job, primary);
    guest.count_downtime();
    confirmed.map_err(|source| JobError::Unconfirmed { source: Box::new(source) })
}

fn send_commit(job: &OutgoingJob, primary: &mut Primary) -> Result<(), JobError> {
    let bytes = primary.writer.write_plain(Kind::Commit, 0)?;
    add(&job.live.wire_bytes, bytes);
    // Before it answers, the destination has its VMM resume the guest, which is one hook.
    primary.reader.set_timeout(job.options().peer_timeout + job.hook_timeout);
    primary.expect(Kind::Resumed, "the destination's confirmation").map(|_| ())
}

impl Migration {
    /// Sets the deadline of the pause in precopy: the time to send the state and the dirty pages.
    pub(super) fn expect_state_and_pages(&self, stop: &mut Stop, state: &SavedState) {
        let pages = self.dirty.remaining().saturating_mul(PAGE_SIZE);
        self.expect_to_send(stop, state.bytes().saturating_add(pages));
    }

    /// Sets the deadline of the pause in postcopy: the time to send the state. The pages follow
    /// when the guest runs.
    pub(super) fn expect_state(&self, stop: &mut Stop, state: &SavedState) {
        self.expect_to_send(stop, state.bytes());
    }

    fn expect_to_send(&self, stop: &mut Stop, bytes: u64) {
        let options = self.job.options();
        let (measured, limit) = (self.measurements.bandwidth(), options.bandwidth);
        // The measured bandwidth may be older than the limit that an operator has set.
        let bandwidth =
            if limit == 0 || measured == 0 { measured.max(limit) } else { measured.min(limit) };
        stop.set_bytes_to_send(&options, bytes, bandwidth);
    }

    /// The run state that the guest will have at the destination: its own, or what the operator of
    /// this migration wants.
    pub(super) fn run_state_there(&self, state: &SavedState) -> RunState {
        let arrives = self.job.options().resume.apply(state.guest);
        self.job.set_guest_state(arrives);
        arrives
    }

    /// Sends the VMM's state on the primary.
    pub(super) fn send_state(&mut self, state: &SavedState) -> Result<(), JobError> {
        let mut offset = 0;
        for piece in &state.pieces {
            self.send_piece(piece, state.file.as_ref(), offset)?;
            offset += piece.length;
        }
        Ok(())
    }

    fn send_piece(
        &mut self, piece: &PieceSize, file: Option<&OwnedFd>, start: u64,
    ) -> Result<(), JobError> {
        let mut buffer = vec![0; StatePart::MAX_BYTES.min(piece.length as usize)];
        let mut offset = 0;
        loop {
            let count = (piece.length - offset).min(buffer.len() as u64) as usize;
            let bytes = &mut buffer[..count];
            if let Some(file) = file {
                read_exactly(file, bytes, start + offset)?;
            }
            let payload =
                StatePart { name: &piece.name, length: piece.length, offset, bytes }.encode();
            let header = RecordHeader::plain(Kind::State, 0, payload.len());
            self.streams.senders[0].write(&self.job, header, &payload)?;
            offset += count as u64;
            if offset >= piece.length {
                return Ok(());
            }
        }
    }

    /// Sends END on every stream, with the totals of that stream, and on the primary with the
    /// totals of all. If `remaining` is given, so many pages follow in postcopy. The guest will be
    /// as `arrives` says.
    pub(super) fn send_end(
        &mut self, remaining: Option<u64>, arrives: RunState,
    ) -> Result<(), JobError> {
        let job = self.job.clone();
        let mut sum = Totals { remaining_pages: remaining.unwrap_or(0), ..Totals::default() };
        for sender in self.streams.senders.iter_mut().rev() {
            sum.data_pages += sender.totals.data_pages;
            sum.zero_pages += sender.totals.zero_pages;
            sum.discarded_pages += sender.totals.discarded_pages;
            sum.stray_pages += sender.totals.stray_pages;
            sum.passes = sender.totals.passes;
            let is_primary = sender.is_primary();
            let payload = if is_primary { sum } else { sender.totals }.encode();
            let number = PageRange::new(u64::from(remaining.is_some()), 0);
            let flags = if arrives.is_paused() { FLAG_PAUSED } else { 0 };
            sender.write(
                &job,
                RecordHeader::new(Kind::End, flags, 0, number, payload.len()),
                &payload,
            )?;
        }
        Ok(())
    }
}

/// Waits until the destination has compared the totals and loaded the state. That ends the deadline
/// of the pause.
pub fn wait_loaded(job: &OutgoingJob, primary: &mut Primary, stop: &Stop) -> Result<(), JobError> {
    let options = job.options();
    // Before it answers, the destination compares the totals, and calls two hooks: one registers
    // the memory (in postcopy) and one loads the state.
    let patience = options.peer_timeout + 2 * options.hook_timeout;
    primary.reader.set_timeout(patience);
    primary.expect(Kind::Loaded, "that the destination has loaded the state")?;
    stop.end_deadline();
    Ok(())
}

fn read_exactly(file: &OwnedFd, buffer: &mut [u8], start: u64) -> Result<(), JobError> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(file, &mut buffer[done..], start + done as u64) {
            Ok(0) => {
                let message = format!(
                    "the VMM's state file ends at byte {:#x}, before its pieces do",
                    start + done as u64
                );
                return Err(JobError::State(message));
            }
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                return Err(JobError::Io { what: "read the VMM's state", source: errno.into() });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hooks::Hooks;
    use crate::job::{Job, notifier};
    use crate::memory::test_support::memory;
    use crate::outgoing::connect::Streams;
    use crate::tracking::TrackerChoice;
    use crate::transport::{RecordReader, RecordWriter, StreamSocket};
    use pageferry_protocol::control::job::{JobKind, OutgoingOptions};
    use std::sync::Arc;
    use std::time::Duration;

    /// A migration of a guest with this many dirty pages. The measured bandwidth is 4 MiB/s.
    fn migration(pages: u64) -> Migration {
        let (memory, hooks) = (Arc::new(memory(&[pages])), Arc::new(Hooks::new(None)));
        let options = OutgoingOptions::default();
        let (common, notify) = ((&options).into(), notifier().unwrap());
        let job = Job::new(1, JobKind::Outgoing, memory, hooks, common, notify).unwrap();
        let job = Arc::new(OutgoingJob::new(Arc::new(job), options).unwrap());
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let socket = StreamSocket::with_stop(socket.into(), Duration::ZERO, &job.stop).unwrap();
        let primary = Primary {
            writer: RecordWriter::new(socket.clone()),
            reader: RecordReader::new(socket),
        };
        let streams =
            Streams { primary, senders: Vec::new(), urgent: Vec::new(), host_pages: Vec::new() };
        let choice = TrackerChoice::default();
        let session = SessionId::default();
        let mut migration = Migration::new(&job, session, None, streams, &choice).unwrap();
        migration.measurements.record_pass(1024, 4 << 20, Duration::from_secs(1));
        migration.dirty.remaining = pages;
        migration
    }

    #[test]
    fn the_deadline_of_postcopy_does_not_count_the_memory() {
        let migration = migration(4096);
        let (piece, options) =
            (PieceSize { name: "vcpu".into(), length: 8 << 20 }, migration.job.options());
        let state = SavedState { guest: RunState::Running, pieces: vec![piece], file: None };
        let mut stop = Stop::begin(&migration.job.stop, &options);
        migration.expect_state(&mut stop, &state);
        assert_eq!(stop.allowed(), Stop::limit(&options, 8 << 20, 4 << 20));
        migration.expect_state_and_pages(&mut stop, &state);
        assert_eq!(stop.allowed(), Stop::limit(&options, (8 << 20) + 4096 * PAGE_SIZE, 4 << 20));
    }
}
