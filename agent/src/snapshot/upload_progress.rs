// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How far the upload of a snapshot to a store is: the sentence in the status of its job. A status
//! has no numbers for it, because its layout is fixed. So `pageferry` reads them from the sentence.

use pageferry_protocol::control::job::{JobKind, JobStatus};

/// What the sentence begins with.
const UPLOADS: &str = "uploads to the store: ";

/// The sentence of an upload that has put `done` of `all` bytes.
pub fn sentence(done: u64, all: u64) -> String {
    format!("{UPLOADS}{done} of {all} bytes")
}

/// The bytes that are in the store, and all bytes; `None` if the job does not upload.
pub fn of_status(status: &JobStatus) -> Option<(u64, u64)> {
    let is_running = status.kind == JobKind::Snapshot && !status.phase.is_final();
    let sentence = Some(status.error_text()).filter(|_| is_running)?;
    let numbers = sentence.strip_prefix(UPLOADS)?.strip_suffix(" bytes")?;
    let (done, all) = numbers.split_once(" of ")?;
    Some((done.parse().ok()?, all.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::control::job::Phase;

    #[test]
    fn progress_is_read_from_its_sentence_and_from_no_other() {
        let read = |sentence: &str, phase| {
            let error = Some(sentence.to_owned());
            of_status(&JobStatus { kind: JobKind::Snapshot, phase, error, ..JobStatus::default() })
        };
        assert_eq!(read(&sentence(5, u64::MAX), Phase::Saving), Some((5, u64::MAX)));
        assert_eq!(read(&sentence(5, 9), Phase::Failed), None);
        for other in ["", "waits for the store: no route", "uploads to the store: 5 of all bytes"] {
            assert_eq!(read(other, Phase::Saving), None, "{other}");
        }
    }
}
