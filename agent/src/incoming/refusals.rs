// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Says why connections were refused: in the log, and in the status of the job that waits.
//!
//! Everybody who reaches the port can be refused as often as they like, so neither may grow or
//! change with each of them:
//!
//! - Strangers get one line a second in the log, with their number.
//! - A stranger that has shown a certificate or sent a hello may be a source, and anybody can do
//!   that, too. Of these the log has another line a second, and the status a note, which changes
//!   once a second at most, and has at most 1 KiB.
//! - A peer that has proved something gets a line of its own, within the limit of the log, and such
//!   a note.
//! - If this side cannot let anybody in, because of its own files, the log says so once a second.
//! - What a known peer was told stays for ten seconds before it gives way to what a stranger was
//!   told.

use super::gate::{Origin, Stage};
use super::job::IncomingJob;
use crate::job::JobError;
use crate::transport::backoff::LineLimit;
use crate::transport::{StreamError, TransportError};
use std::time::{Duration, Instant};

/// Longest note in bytes.
const NOTE: usize = 1024;
/// Least time between two notes.
const NOTE_EVERY: Duration = Duration::from_secs(1);
/// How long a note about a known peer is not replaced by one about a stranger.
const KEPT: Duration = Duration::from_secs(10);

/// A note, and whether it is about a known peer.
#[derive(Debug, PartialEq, Eq)]
struct Note {
    is_of_known: bool,
    text: String,
}

/// What is said about connections that were refused.
#[derive(Debug, Default)]
pub struct Refusals {
    strangers: LineLimit,
    claims: LineLimit,
    own_files: LineLimit,
    /// When the status was changed last, and whether for a known peer.
    noted: Option<(Instant, bool)>,
    /// What the status gets next.
    next: Option<Note>,
}

impl Refusals {
    /// Says why a connection that had got to `stage` was refused, and where it came from.
    pub fn say(
        &mut self, job: &IncomingJob, (stage, origin): (Stage, Origin), why: &JobError,
        now: Instant,
    ) {
        if stage != Stage::Known && !names_itself(why) {
            let what = format!("a connection from a host {origin} was dropped");
            return self.strangers.warn(&what, why, now);
        }
        let text = crate::error::chain(why);
        if is_about_this_side(why) {
            self.own_files.warn("no source can be let in", why, now);
        } else if stage != Stage::Known {
            self.claims.warn(&format!("a source {origin} was refused"), why, now);
        } else {
            log::warn!("a source {origin} was refused: {text}");
        }
        let is_of_known = stage == Stage::Known;
        let is_kept = |(noted, was_known): &(Instant, bool)| {
            *was_known && now.saturating_duration_since(*noted) < KEPT
        };
        let known_goes_first = self.noted.as_ref().is_some_and(is_kept)
            || self.next.as_ref().is_some_and(|next| next.is_of_known);
        if is_of_known || !known_goes_first {
            let text =
                format!("a source {origin} was refused, and the agent waits for the next: {text}");
            self.next = Some(Note { is_of_known, text });
        }
        self.note(job, now);
    }

    /// When [`Refusals::note`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        // Without a note before, this one was written at once.
        self.next.as_ref().and(self.noted).map(|(noted, _)| noted + NOTE_EVERY)
    }

    /// Tells the operator of the waiting job why a source was refused, if it is time to. The status
    /// of a paused postcopy stays as it is, because it shows the reason of the pause.
    pub fn note(&mut self, job: &IncomingJob, now: Instant) {
        if self.due().is_some_and(|due| due > now) {
            return;
        }
        let Some(Note { is_of_known, mut text }) = self.next.take() else { return };
        let ends = text.char_indices().map(|(at, letter)| at + letter.len_utf8());
        text.truncate(ends.take_while(|end| *end <= NOTE).last().unwrap_or(0));
        self.noted = Some((now, is_of_known));
        job.note(&text);
    }
}

/// True if the peer has said enough about itself that its operator will know it: its hello, or a
/// certificate. Also for what is wrong with the certificates here.
fn names_itself(why: &JobError) -> bool {
    match why {
        JobError::Stream(StreamError::Hello(_)) => true,
        JobError::Transport(TransportError::Trust(error)) => error.is_about_credentials(),
        _ => false,
    }
}

/// True if the files of this side are wrong, whoever comes.
fn is_about_this_side(why: &JobError) -> bool {
    matches!(why, JobError::Transport(TransportError::Trust(error)) if error.is_about_this_side())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;
    use crate::memory::test_support::job_of;
    use pageferry_protocol::control::job::{IncomingOptions, JobKind, Phase};
    use std::sync::Arc;

    fn job() -> IncomingJob {
        let job = job_of(JobKind::Incoming, Arc::new(GuestMemory::default()));
        IncomingJob::new(job, IncomingOptions::default()).unwrap()
    }

    fn refused(text: &str) -> JobError {
        JobError::Protocol(text.into())
    }

    fn of_stranger() -> JobError {
        use pageferry_protocol::stream::hello::HelloError;
        StreamError::Hello(HelloError::Version { min: 77, max: 78 }).into()
    }

    #[test]
    fn the_status_names_the_last_refused_source_once_a_second() {
        let (job, mut refusals, start) = (job(), Refusals::default(), Instant::now());
        for text in ["first", "second", "third"] {
            refusals.say(&job, (Stage::Known, Origin::Local), &refused(text), start);
            assert!(job.status().error_text().contains("first"), "{text}");
        }
        assert_eq!(refusals.due(), Some(start + NOTE_EVERY));
        refusals.note(&job, start + NOTE_EVERY);
        assert!(job.status().error_text().contains("third"));
        assert_eq!(refusals.due(), None);
    }

    #[test]
    fn a_stranger_does_not_replace_the_note_of_a_known_peer_for_a_while() {
        let (job, mut refusals, start) = (job(), Refusals::default(), Instant::now());
        refusals.say(&job, (Stage::Known, Origin::Local), &refused("known"), start);
        for after in [Duration::ZERO, 2 * NOTE_EVERY, KEPT - NOTE_EVERY] {
            refusals.say(&job, (Stage::Begun, Origin::Local), &of_stranger(), start + after);
            assert!(job.status().error_text().contains("known"), "{}", job.status().error_text());
        }
        refusals.say(&job, (Stage::Begun, Origin::Local), &of_stranger(), start + KEPT);
        assert!(job.status().error_text().contains("version 77"), "{}", job.status().error_text());
    }

    #[test]
    fn a_stranger_that_says_nothing_changes_nothing() {
        let (job, mut refusals, start) = (job(), Refusals::default(), Instant::now());
        for error in [TransportError::Closed, TransportError::Silent(KEPT)] {
            refusals.say(&job, (Stage::Begun, Origin::Local), &error.into(), start);
        }
        assert_eq!((job.status().error, refusals.due()), (None, None));
    }

    #[test]
    fn a_note_is_short_and_a_paused_postcopy_gets_none() {
        let (job, start) = (job(), Instant::now());
        let refuse = |text: &str| {
            Refusals::default().say(&job, (Stage::Known, Origin::Local), &refused(text), start);
        };
        refuse(&"ü".repeat(NOTE));
        assert!(job.status().error_text().len() < NOTE + 100);
        job.suspend_postcopy(&refused("the connection broke"));
        refuse("not its source");
        let status = job.status();
        let expected = (Phase::PostcopyPaused, "the connection broke");
        assert_eq!((status.phase, status.error_text()), expected);
    }
}
