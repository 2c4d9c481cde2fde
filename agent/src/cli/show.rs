// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Formats the status of a job: as a table, as JSON, or as a sentence about its failure.

use crate::job::GUEST_UNCERTAIN;
use crate::snapshot::upload_progress;
use pageferry_protocol::control::job::{JobKind, JobStatus, Phase, Placing, RunState};
use pageferry_protocol::control::reply::JobStarted;
use pageferry_protocol::error::printable;
use pageferry_protocol::memory::PAGE_SIZE;
use serde_json::{Map, Value, json};
use std::io::{self, Write};
use std::path::Path;

/// The status of a job as a JSON object: its kind, its phase, its error, and the counters of its
/// kind.
pub fn to_json(status: &JobStatus) -> Map<String, Value> {
    let mut object = Map::new();
    object.insert("job".into(), json!(status.job));
    object.insert("kind".into(), json!(status.kind.name()));
    object.insert("status".into(), json!(status.phase.name()));
    object.insert("run_state".into(), json!(status.guest.map(RunState::name)));
    let arrived = (status.kind == JobKind::Incoming).then_some(status.arrived);
    object.insert("arrived".into(), json!(arrived));
    let error = json!(status.error);
    let completed = status.phase == Phase::Completed;
    let (error, warning) = if completed { (Value::Null, error) } else { (error, Value::Null) };
    object.insert("error".into(), error);
    object.insert("warning".into(), warning);
    let places = matches!(status.kind, JobKind::Incoming | JobKind::Restore);
    let is_known = places && status.placing != Placing::None;
    object.insert("placing".into(), json!(is_known.then(|| status.placing.name())));
    object.insert("placing_reason".into(), json!(status.placing_reason));
    object.insert("trackers".into(), json!(status.trackers.names().collect::<Vec<_>>()));
    object.extend(
        status.counters.of_kind(status.kind).map(|(name, value)| (name.to_owned(), json!(value))),
    );
    object
}

/// Formats a number of bytes for operators, such as "1.0 GiB".
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let step = (0..UNITS.len() - 1)
        .find(|step| count >> (10 * (step + 1)) == 0)
        .unwrap_or(UNITS.len() - 1);
    match step {
        0 => format!("{count} B"),
        _ => format!("{:.1} {}", count as f64 / (1u64 << (10 * step)) as f64, UNITS[step]),
    }
}

/// Formats a time in microseconds for operators, such as "1.50 s".
pub fn time(micros: u64) -> String {
    match micros {
        0..1_000 => format!("{micros} us"),
        1_000..1_000_000 => format!("{:.1} ms", micros as f64 / 1e3),
        _ => format!("{:.2} s", micros as f64 / 1e6),
    }
}

/// The phase of a job in words. That of `--json` is its name alone.
pub fn phase(status: &JobStatus) -> &'static str {
    match (status.kind, status.phase) {
        (JobKind::Incoming, Phase::Connecting) => "waits for a source to connect",
        (JobKind::Snapshot, Phase::Saving) if upload_progress::of_status(status).is_some() => {
            "uploading"
        }
        (_, phase) => phase.name(),
    }
}

/// Says where the guest of a job is, and its run state.
fn guest_line(status: &JobStatus, guest: RunState) -> String {
    let place = match (status.kind, status.phase) {
        (JobKind::Outgoing, Phase::Completed) => "at the destination",
        (JobKind::Outgoing, phase) if phase.is_postcopy() => {
            "at the destination, or on its way there"
        }
        (JobKind::Outgoing, Phase::Unconfirmed) => {
            "paused here, or at the destination (unconfirmed)"
        }
        (JobKind::Incoming, _) if !status.arrived => "at the source",
        (JobKind::Restore, _) if status.counters.time_to_run_us == 0 => "in the image",
        _ => "here",
    };
    let moved = status.kind == JobKind::Outgoing && status.phase == Phase::Completed;
    if moved && guest == RunState::Running {
        // Its destination may leave it paused, and does not tell.
        return place.to_owned();
    }
    // The operator of the VMM may pause and resume it since then, and does not tell.
    let when = if status.phase.is_final() { " when the job ended" } else { "" };
    format!("{place}, run state {}{when}", guest.name())
}

/// How a job places pages, and why not better.
fn placing_line(status: &JobStatus) -> Option<String> {
    let how = match status.placing {
        Placing::None => return None,
        Placing::Write => "by writing to the file, one thread at a time".to_owned(),
        Placing::Pages => "through a mapping, page by page".to_owned(),
        Placing::HugePages => {
            "through a mapping, in huge pages where all of 2 MiB comes".to_owned()
        }
    };
    let made = match (status.placing, status.counters.huge_pages) {
        (Placing::HugePages, made) | (_, made @ 1..) => format!("; {made} huge pages"),
        _ => String::new(),
    };
    let reason = status.placing_reason.as_ref().map_or(String::new(), |why| format!(" ({why})"));
    Some(how + &made + &reason)
}

/// The lines that `pageferry status` prints: name and value.
pub fn table(status: &JobStatus) -> Vec<(&'static str, String)> {
    let counters = &status.counters;
    let pages = |count: u64| format!("{count} ({})", bytes(count * PAGE_SIZE));
    let mut lines = vec![
        ("job", format!("{} {}", status.job, status.kind.name())),
        ("status", phase(status).to_owned()),
    ];
    lines.extend(status.guest.map(|guest| ("guest", guest_line(status, guest))));
    if status.kind == JobKind::Incoming {
        let arrived = if status.arrived {
            "yes: the guest is this VMM's"
        } else {
            "no: the guest is not here"
        };
        lines.push(("guest arrived", arrived.to_owned()));
    }
    lines.push(("trackers", status.trackers.to_string()));
    lines.extend(match status.kind {
        JobKind::None => Vec::new(),
        JobKind::Outgoing => vec![
            ("passes", counters.passes.to_string()),
            ("pages sent", pages(counters.pages_sent)),
            ("zero pages", pages(counters.zero_pages)),
            ("freed pages", pages(counters.freed_pages)),
            ("discarded pages", pages(counters.discarded_pages)),
            ("stray pages", pages(counters.stray_pages)),
            ("on the wire", bytes(counters.wire_bytes)),
            ("remaining", pages(counters.remaining_pages)),
            ("bandwidth", format!("{}/s", bytes(counters.bandwidth))),
            ("dirty rate", format!("{} pages/s", counters.dirty_pages_per_s)),
            ("sync", time(counters.sync_us)),
            ("throttle", format!("{} %", counters.throttle_percent)),
            ("expected downtime", time(counters.expected_downtime_us)),
            ("downtime", time(counters.downtime_us)),
            ("total", time(counters.total_us)),
        ],
        JobKind::Incoming => vec![
            ("passes", counters.passes.to_string()),
            ("pages received", pages(counters.pages_received)),
            ("zero pages", pages(counters.zero_pages)),
            ("discarded pages", pages(counters.discarded_pages)),
            ("stray pages", pages(counters.stray_pages)),
            ("on the wire", bytes(counters.wire_bytes)),
            ("remaining", pages(counters.remaining_pages)),
            ("total", time(counters.total_us)),
        ],
        JobKind::Snapshot => vec![
            ("pages saved", pages(counters.pages_saved)),
            ("zero pages read", pages(counters.zero_pages)),
            ("discarded pages", pages(counters.discarded_pages)),
            ("as in the base", pages(counters.unchanged_pages)),
            ("in the image", bytes(counters.image_bytes)),
            ("remaining", pages(counters.remaining_pages)),
            ("saved for writes", pages(counters.copied_before_write_pages)),
            ("saved for discards", pages(counters.copied_before_discard_pages)),
            ("downtime", time(counters.downtime_us)),
            ("total", time(counters.total_us)),
        ],
        JobKind::Restore => vec![
            ("pages restored", pages(counters.pages_restored)),
            ("discarded pages", pages(counters.discarded_pages)),
            ("from the image", bytes(counters.image_bytes)),
            ("remaining", pages(counters.remaining_pages)),
            ("working set", pages(counters.working_set_pages)),
            ("guest ready after", time(counters.time_to_run_us)),
            ("total", time(counters.total_us)),
        ],
    });
    lines.extend(placing_line(status).map(|line| ("placing", line)));
    lines.extend(fault_lines(status));
    if let Some((done, all)) = upload_progress::of_status(status) {
        lines.push(("in the store", format!("{} of {}", bytes(done), bytes(all))));
    } else if let Some(error) = &status.error {
        let label = if status.phase == Phase::Completed { "warning" } else { "error" };
        lines.push((label, error.clone()));
    }
    lines
}

/// The lines about faults, and about the pages that were fetched because of them. Empty if there
/// were no such pages.
fn fault_lines(status: &JobStatus) -> Vec<(&'static str, String)> {
    let counters = &status.counters;
    let pages = |count: u64| format!("{count} ({})", bytes(count * PAGE_SIZE));
    let pair = |one, other| format!("{}, {}", time(one), time(other));
    let latency = || {
        [
            ("fault p50, p90", pair(counters.fault_p50_us, counters.fault_p90_us)),
            ("fault p99, max", pair(counters.fault_p99_us, counters.fault_max_us)),
        ]
    };
    let fetched = || {
        [
            ("requested", pages(counters.requested_pages)),
            ("pushed", pages(counters.pushed_pages)),
            ("dropped by discard", pages(counters.dropped_pages)),
        ]
    };
    let mut lines = Vec::new();
    if counters.faults > 0 {
        lines.push(("faults", counters.faults.to_string()));
        lines.extend(latency());
    }
    if counters.write_faults > 0 {
        lines.push(("write faults", counters.write_faults.to_string()));
        lines.extend(latency());
    }
    if counters.requested_pages + counters.pushed_pages > 0 {
        lines.extend(fetched());
        let released = ("released here", pages(counters.released_pages));
        lines.extend((status.kind == JobKind::Outgoing).then_some(released));
    }
    if counters.disconnected_us > 0 {
        lines.push(("without connection", time(counters.disconnected_us)));
    }
    lines
}

/// Prints a status.
///
/// # Errors
/// If the output cannot be written.
pub fn print(status: &JobStatus, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", Value::Object(to_json(status)))
    } else {
        table(status).iter().try_for_each(|line| write_line(&mut out, line))
    }
}

/// Writes a line of a table.
pub(super) fn write_line(out: &mut impl Write, line: &(&str, String)) -> io::Result<()> {
    writeln!(out, "{:18} {}", line.0, line.1)
}

/// Prints the outcome of a request.
///
/// # Errors
/// If the output cannot be written.
pub fn done(what: &str, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json { writeln!(out, "{}", json!({ "status": what })) } else { writeln!(out, "{what}") }
}

/// Says where a job listens. Port 0 has become the port that the kernel chose.
///
/// # Errors
/// If the output cannot be written.
pub fn listening(started: &JobStarted, json: bool) -> io::Result<()> {
    let JobStarted { job, address } = started;
    if json {
        writeln!(io::stdout().lock(), "{}", json!({ "job": job, "listening": address }))
    } else {
        writeln!(io::stderr().lock(), "job {job} listens at {}", printable(address))
    }
}

/// Says that a job was started, which the command does not watch.
///
/// # Errors
/// If the output cannot be written.
pub fn started(started: &JobStarted, listens: bool, json: bool) -> io::Result<()> {
    let JobStarted { job, address } = started;
    let mut out = io::stdout().lock();
    match (json, listens) {
        (true, true) => writeln!(out, "{}", json!({ "job": job, "listening": address })),
        (true, false) => writeln!(out, "{}", json!({ "job": job })),
        (false, true) => writeln!(out, "job {job} listens at {}", printable(address)),
        (false, false) => writeln!(out, "job {job} has started"),
    }
}

/// What an operator is told about a job that did not complete: why, and what to do. `socket` is the
/// path of its agent.
pub fn failure(status: &JobStatus, socket: &Path) -> String {
    let (job, kind, socket) = (status.job, status.kind.name(), shell_word(socket));
    let is_gone = status.error_text().starts_with("the VMM is gone")
        || status.error_text().ends_with(GUEST_UNCERTAIN);
    let (how, advice) = match (status.kind, status.phase) {
        (_, Phase::Idle) => return "no job was started yet".into(),
        (JobKind::Incoming, Phase::PostcopyPaused) => (
            "is paused",
            "to recover it, on the host of its source: pageferry recover --socket PATH; it still \
             listens here"
                .to_owned(),
        ),
        (_, Phase::PostcopyPaused) => (
            "is paused",
            format!(
                "to recover it: pageferry recover --socket {socket}; if the destination is gone \
                 for good, see docs/postcopy.md, \"When the source is unconfirmed\""
            ),
        ),
        (_, Phase::Unconfirmed) => (
            "is unconfirmed",
            format!(
                "docs/postcopy.md, \"When the source is unconfirmed\", says what to check before: \
                 pageferry resume --socket {socket} --force"
            ),
        ),
        (kind, Phase::Cancelled) if !is_gone => {
            ("was cancelled", outcome_for_guest(kind, status.arrived))
        }
        (kind, _) if !is_gone => ("failed", outcome_for_guest(kind, status.arrived)),
        (_, Phase::Cancelled) => ("was cancelled", String::new()),
        _ => ("failed", String::new()),
    };
    let separator = if advice.is_empty() { "" } else { "; " };
    // "was cancelled by an operator", and not "was cancelled: cancelled by an operator".
    let why = match status.error_text().strip_prefix("cancelled ") {
        Some(by) if status.phase == Phase::Cancelled => format!(" {by}"),
        _ => format!(": {}", status.error_text()),
    };
    format!("job {job} ({kind}) {how}{why}{separator}{advice}")
}

/// What became of the guest of a job that failed or was cancelled.
fn outcome_for_guest(kind: JobKind, arrived: bool) -> String {
    match kind {
        JobKind::Outgoing => "the guest is here, as it was before the migration",
        JobKind::Incoming if arrived => "the guest has arrived, and belongs to this VMM",
        JobKind::Incoming => "the guest has not arrived, and its source still has it",
        JobKind::Snapshot => "there is no new image, and the guest is as it was before",
        JobKind::Restore | JobKind::None => "",
    }
    .to_owned()
}

/// A path as a shell reads it back.
pub fn shell_word(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+:@%,=".contains(&byte);
    if !text.is_empty() && text.bytes().all(plain) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::control::job::Counters;

    #[test]
    fn paths_are_quoted_where_a_shell_needs_it() {
        assert_eq!(shell_word("/run/vm1.sock".as_ref()), "/run/vm1.sock");
        assert_eq!(shell_word("/run/vm 1's".as_ref()), r"'/run/vm 1'\''s'");
    }

    #[test]
    fn failure_says_why_and_what_to_do() {
        let status = |kind, phase| {
            let error = Some("the disk is full".into());
            failure(
                &JobStatus { job: 3, kind, phase, error, ..JobStatus::default() },
                "/a".as_ref(),
            )
        };
        assert_eq!(
            status(JobKind::Snapshot, Phase::Failed),
            "job 3 (snapshot) failed: the disk is full; there is no new image, and the guest is as \
             it was before"
        );
        assert!(
            status(JobKind::Outgoing, Phase::PostcopyPaused)
                .contains("to recover it: pageferry recover --socket /a; if the destination")
        );
        assert!(
            status(JobKind::Outgoing, Phase::Unconfirmed).contains("resume --socket /a --force")
        );
    }

    #[test]
    fn run_state_is_shown_as_what_is_known() {
        let line = |kind, phase, guest| {
            let status = JobStatus { kind, phase, arrived: true, ..JobStatus::default() };
            guest_line(&status, guest)
        };
        use {JobKind::*, RunState::*};
        assert_eq!(line(Outgoing, Phase::Completed, Running), "at the destination");
        let line_of_paused = line(Outgoing, Phase::Completed, Paused);
        assert_eq!(line_of_paused, "at the destination, run state paused when the job ended");
        let line_of_snapshot = line(Snapshot, Phase::Completed, Running);
        assert_eq!(line_of_snapshot, "here, run state running when the job ended");
        assert_eq!(line(Incoming, Phase::Loading, Running), "here, run state running");
    }

    #[test]
    fn cancelled_job_says_by_whom() {
        let cancelled = |error: &str| {
            let (kind, error) = (JobKind::Outgoing, Some(error.to_owned()));
            let status = JobStatus { kind, phase: Phase::Cancelled, error, ..JobStatus::default() };
            failure(&status, "/a".as_ref())
        };
        assert_eq!(
            cancelled("cancelled by an operator"),
            "job 0 (outgoing) was cancelled by an operator; the guest is here, as it was before \
             the migration"
        );
        assert_eq!(
            cancelled("the VMM is gone, so the job was cancelled"),
            "job 0 (outgoing) was cancelled: the VMM is gone, so the job was cancelled"
        );
    }

    #[test]
    fn nothing_is_promised_about_a_guest_that_nobody_has_seen() {
        for error in ["the VMM is gone: EOF".to_owned(), format!("no disk{GUEST_UNCERTAIN}")] {
            for kind in [JobKind::Outgoing, JobKind::Snapshot] {
                let (phase, error) = (Phase::Failed, Some(error.clone()));
                let status = JobStatus { kind, phase, error, ..JobStatus::default() };
                let said = failure(&status, "/a".as_ref());
                assert!(!said.contains("as it was"), "{said}");
            }
        }
    }

    #[test]
    fn way_of_placing_is_shown_with_its_reason() {
        let line = |placing, huge_pages, reason: &str| {
            let counters = Counters { huge_pages, ..Counters::default() };
            let placing_reason = (!reason.is_empty()).then(|| reason.to_owned());
            placing_line(&JobStatus { placing, counters, placing_reason, ..JobStatus::default() })
        };
        assert_eq!(line(Placing::None, 0, ""), None);
        assert_eq!(
            line(Placing::Write, 0, "no right").unwrap(),
            "by writing to the file, one thread at a time (no right)"
        );
        assert_eq!(
            line(Placing::HugePages, 0, "").unwrap(),
            "through a mapping, in huge pages where all of 2 MiB comes; 0 huge pages"
        );
        assert_eq!(
            line(Placing::Pages, 3, "no more").unwrap(),
            "through a mapping, page by page; 3 huge pages (no more)"
        );
    }

    #[test]
    fn job_that_nobody_has_connected_to_says_that_it_waits() {
        let kind = JobKind::Incoming;
        let status = JobStatus { kind, phase: Phase::Connecting, ..JobStatus::default() };
        assert_eq!(table(&status)[1].1, "waits for a source to connect");
        assert_eq!(to_json(&status)["status"], "connecting");
        let status = JobStatus { kind: JobKind::Outgoing, ..status };
        assert_eq!(table(&status)[1].1, "connecting");
    }

    #[test]
    fn bytes_and_times_are_formatted() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1 << 30), "1.0 GiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
        assert_eq!(time(999), "999 us");
        assert_eq!(time(1_500_000), "1.50 s");
    }

    #[test]
    fn json_has_the_counters_by_name() {
        let object = to_json(&JobStatus { kind: JobKind::Outgoing, ..JobStatus::default() });
        for name in [
            "status",
            "arrived",
            "error",
            "trackers",
            "passes",
            "pages_sent",
            "wire_bytes",
            "downtime_us",
        ] {
            assert!(object.contains_key(name), "{name}");
        }
    }
}
