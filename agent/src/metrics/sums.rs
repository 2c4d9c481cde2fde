// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The metrics that sum up over all jobs of the agent.
//!
//! They have one series for each kind of job that can have the sum. Kinds that share a name count
//! each page once under it: `pageferry_pages_total` has no page twice, and pages that are a part of
//! those have names of their own.

use super::page::{Page, Written};
use crate::stats::totals::{JobTotals, KINDS};
use pageferry_protocol::control::job::{Counters, JobKind, Phase};
use prometheus_client::registry::Unit;
use std::time::Duration;

use JobKind::{Incoming, Outgoing, Restore, Snapshot};

/// Reads a counter.
type Read = fn(&Counters) -> u64;

/// Writes all sums.
pub(super) fn write(page: &mut Page<'_>, totals: &JobTotals) -> Written {
    jobs(page, totals)?;
    data(page, totals)?;
    missing_pages(page, totals)?;
    faults(page, totals)
}

/// One counter for each of `kinds`.
fn by_kind(
    page: &mut Page<'_>, totals: &JobTotals, name: &str, unit: Option<Unit>, help: &str,
    kinds: &[(JobKind, Read)],
) -> Written {
    let values = kinds.iter().map(|(kind, read)| ([kind.name()], read(&totals.of(*kind).counters)));
    page.counters(name, unit, help, ["kind"], values)
}

/// How jobs started and ended.
fn jobs(page: &mut Page<'_>, totals: &JobTotals) -> Written {
    let started = KINDS.map(|kind| ([kind.name()], totals.of(kind).started));
    page.counters("jobs_started", None, "Jobs that were started.", ["kind"], started)?;
    let ended = KINDS.into_iter().flat_map(|kind| {
        let ended = totals.of(kind).ended().collect::<Vec<_>>();
        ended.into_iter().map(move |(outcome, count)| (kind, outcome, count))
    });
    // Only an outgoing migration has a commit.
    let possible =
        ended.filter(|(kind, outcome, _)| *outcome != Phase::Unconfirmed || *kind == Outgoing);
    let possible = possible.map(|(kind, outcome, count)| ([kind.name(), outcome.name()], count));
    page.counters("jobs_ended", None, "Jobs that ended, and how.", ["kind", "outcome"], possible)?;
    let passes: [(JobKind, Read); 2] = [(Outgoing, |of| of.passes), (Incoming, |of| of.passes)];
    by_kind(page, totals, "passes", None, "Passes over the memory that have ended.", &passes)?;
    let disconnected = [Outgoing, Incoming].map(|kind| {
        let time = Duration::from_micros(totals.of(kind).counters.disconnected_us);
        ([kind.name()], time.as_secs_f64())
    });
    page.counters(
        "disconnected",
        Some(Unit::Seconds),
        "Postcopy: time without a connection.",
        ["kind"],
        disconnected,
    )
}

/// What was moved, saved and restored.
fn data(page: &mut Page<'_>, totals: &JobTotals) -> Written {
    by_kind(
        page,
        totals,
        "stream",
        Some(Unit::Bytes),
        "Bytes sent (outgoing) and received (incoming): pages, headers and state.",
        &[(Outgoing, |of| of.wire_bytes), (Incoming, |of| of.wire_bytes)],
    )?;
    by_kind(
        page,
        totals,
        "image",
        Some(Unit::Bytes),
        "Bytes of content written to images (snapshot) and read from images (restore).",
        &[(Snapshot, |of| of.image_bytes), (Restore, |of| of.image_bytes)],
    )?;
    let sorts: [(JobKind, &str, Read); 13] = [
        (Outgoing, "content", |of| of.pages_sent),
        (Outgoing, "zero", |of| of.zero_pages),
        (Outgoing, "discarded", |of| of.discarded_pages),
        (Incoming, "content", |of| of.pages_received),
        (Incoming, "zero", |of| of.zero_pages),
        (Incoming, "discarded", |of| of.discarded_pages),
        (Snapshot, "content", |of| of.pages_saved),
        (Snapshot, "zero", |of| of.zero_pages),
        (Snapshot, "discarded", |of| of.discarded_pages),
        (Snapshot, "unchanged", |of| of.unchanged_pages),
        (Restore, "content", |of| of.pages_restored),
        (Restore, "zero", |of| of.zero_pages),
        (Restore, "discarded", |of| of.discarded_pages),
    ];
    let sorts =
        sorts.map(|(kind, sort, read)| ([kind.name(), sort], read(&totals.of(kind).counters)));
    page.counters(
        "pages",
        None,
        "Pages that were sent, received, saved or restored, by what they were.",
        ["kind", "sort"],
        sorts,
    )?;
    by_kind(
        page,
        totals,
        "stray_pages",
        None,
        "Pages of content that were discarded, and written by the guest afterwards.",
        &[(Outgoing, |of| of.stray_pages), (Incoming, |of| of.stray_pages)],
    )?;
    by_kind(
        page,
        totals,
        "freed_pages",
        None,
        "Zero pages that were not read, because the guest had freed them.",
        &[(Outgoing, |of| of.freed_pages)],
    )?;
    let early: [(&str, Read); 2] = [
        ("write", |of| of.copied_before_write_pages),
        ("discard", |of| of.copied_before_discard_pages),
    ];
    let early = early.map(|(cause, read)| ([cause], read(&totals.of(Snapshot).counters)));
    page.counters(
        "captured_pages",
        None,
        "Snapshot: pages that were saved early, because the guest wrote to or discarded them.",
        ["cause"],
        early,
    )
}

/// The pages of guests that ran before their memory was there.
fn missing_pages(page: &mut Page<'_>, totals: &JobTotals) -> Written {
    const KINDS: [JobKind; 3] = [Outgoing, Incoming, Restore];
    let how: [(&str, Read); 3] = [
        ("requested", |of| of.requested_pages),
        ("pushed", |of| of.pushed_pages),
        ("dropped", |of| of.dropped_pages),
    ];
    let missing = KINDS.into_iter().flat_map(|kind| {
        how.map(|(how, read)| ([kind.name(), how], read(&totals.of(kind).counters)))
    });
    page.counters(
        "missing_pages",
        None,
        "Postcopy and lazy restore: pages that were missing, and how that ended.",
        ["kind", "how"],
        missing,
    )?;
    by_kind(
        page,
        totals,
        "released_pages",
        None,
        "Postcopy: pages that the source freed because the destination has them.",
        &[(Outgoing, |of| of.released_pages)],
    )?;
    by_kind(
        page,
        totals,
        "working_set_pages",
        None,
        "Lazy restore: pages of the working set that were read ahead.",
        &[(Restore, |of| of.working_set_pages)],
    )
}

/// Accesses of guests that waited.
fn faults(page: &mut Page<'_>, totals: &JobTotals) -> Written {
    by_kind(
        page,
        totals,
        "faults",
        None,
        "Accesses of the guest that were answered: to missing pages, or writes (snapshot).",
        &[(Incoming, |of| of.faults), (Snapshot, |of| of.write_faults), (Restore, |of| of.faults)],
    )?;
    let waits = [Incoming, Snapshot, Restore].map(|kind| {
        let waits = totals.of(kind).fault_waits;
        (kind.name(), waits.sum().as_secs_f64(), waits.buckets())
    });
    page.histograms(
        "fault_wait",
        "Time from reading a fault to answering it. A few faults are not timed.",
        "kind",
        waits,
    )
}
