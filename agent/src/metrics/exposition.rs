// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The metrics, as text. `docs/metrics.md` describes each of them, and a test compares the two.
//!
//! All series are there from the start, with the value 0. So an increase from nothing to one is an
//! increase, also for Prometheus.
//!
//! This file has the gauges. Those called `pageferry_job_*` are about the job that runs, or ran
//! last. `sums` has what sums up over all jobs of the agent.

use super::format::Format;
use super::page::{Page, Written};
use super::sample::Sample;
use super::sums;
use crate::stats::totals::KINDS;
use pageferry_protocol::control::job::{Counters, Phase};
use pageferry_protocol::memory::PAGE_SIZE;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::{Registry, Unit};
use std::fmt::Error;
use std::time::{SystemTime, UNIX_EPOCH};

/// The numbers of one scrape.
#[derive(Debug, Clone)]
pub struct Exposition {
    /// What was read from the agent.
    pub sample: Sample,
    /// The size of the discarded memory.
    pub discarded_bytes: u64,
    /// When the agent started.
    pub started: SystemTime,
}

impl Exposition {
    /// The text of the metrics.
    ///
    /// # Errors
    /// If a name or a label is not allowed. All are constants, so a test would have found it.
    pub fn encode(self, format: Format) -> Result<String, Error> {
        let mut registry = Registry::with_prefix("pageferry");
        registry.register_collector(Box::new(self));
        format.encode(&registry)
    }
}

impl Collector for Exposition {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Written {
        let mut page = Page::new(encoder);
        self.agent(&mut page)?;
        self.memory(&mut page)?;
        self.job(&mut page)?;
        self.migration(&mut page)?;
        sums::write(&mut page, &self.sample.session.totals)
    }
}

impl Exposition {
    fn counters(&self) -> &Counters {
        &self.sample.session.status.counters
    }

    fn agent(&self, page: &mut Page<'_>) -> Written {
        // A name that a VMM gives could be another one each time.
        let vm = self.sample.session.vm_name.as_deref().map(|name| ("vm", name));
        let labels: Vec<_> =
            [("version", env!("CARGO_PKG_VERSION"))].into_iter().chain(vm).collect();
        page.info("agent", "The agent.", &labels)?;
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        page.gauge(
            "agent_start_time",
            Some(Unit::Seconds),
            "When the agent started, in seconds since 1970.",
            started.as_secs_f64(),
        )?;
        page.gauge(
            "vmm_connected",
            None,
            "1 if a VMM is connected.",
            u64::from(self.sample.session.vmm_connected),
        )?;
        page.gauge(
            "control_connections",
            None,
            "Connections to the control socket, with the VMM's.",
            self.sample.connections as u64,
        )
    }

    fn memory(&self, page: &mut Page<'_>) -> Written {
        let blocks = self.sample.session.memory.blocks();
        let bytes: u64 = blocks.iter().map(|block| block.geometry.length).sum();
        page.gauge("memory_blocks", None, "Blocks of guest memory.", blocks.len() as u64)?;
        page.gauge("memory", Some(Unit::Bytes), "Size of the guest's memory.", bytes)?;
        page.gauge(
            "memory_discarded",
            Some(Unit::Bytes),
            "Size of the guest's memory that is discarded, up to a second ago.",
            self.discarded_bytes,
        )
    }

    fn job(&self, page: &mut Page<'_>) -> Written {
        let status = &self.sample.session.status;
        let runs = |kind| u64::from(kind == status.kind && !status.phase.is_final());
        let running = KINDS.map(|kind| (kind.name(), runs(kind)));
        page.gauges("job_running", "1 if a job of this kind runs.", "kind", running)?;
        let phases = Phase::ALL.map(|(phase, name)| (name, u64::from(phase == status.phase)));
        page.gauges(
            "job_phase",
            "1 for the phase of the job that runs, or ran last.",
            "phase",
            phases,
        )?;
        let counters = self.counters();
        page.seconds("job_duration", "Time since the start of the job.", counters.total_us)?;
        page.bytes(
            "job_remaining",
            "Memory that is still to be sent, received, saved or restored.",
            counters.remaining_pages * PAGE_SIZE,
        )?;
        page.seconds(
            "job_downtime",
            "How long the job paused the guest. Zero until the guest runs again.",
            counters.downtime_us,
        )?;
        page.seconds(
            "job_time_to_run",
            "Restore: time from the request until the guest ran.",
            counters.time_to_run_us,
        )?;
        page.seconds(
            "job_disconnected",
            "Postcopy: time without a connection.",
            counters.disconnected_us,
        )
    }

    /// What only an outgoing migration measures.
    fn migration(&self, page: &mut Page<'_>) -> Written {
        let counters = self.counters();
        let per_second = || Some(Unit::Other("bytes_per_second".to_owned()));
        page.bytes("job_pass", "Memory in the current pass.", counters.pass_pages * PAGE_SIZE)?;
        page.bytes(
            "job_pass_done",
            "Memory in the current pass that is done.",
            counters.pass_pages_done * PAGE_SIZE,
        )?;
        page.gauge(
            "job_dirty",
            per_second(),
            "Memory that the guest dirtied in the last pass, each second.",
            counters.dirty_pages_per_s * PAGE_SIZE,
        )?;
        page.gauge(
            "job_bandwidth",
            per_second(),
            "Bytes sent in the last pass, each second.",
            counters.bandwidth,
        )?;
        page.seconds(
            "job_expected_downtime",
            "How long the guest would be paused if the job paused it now.",
            counters.expected_downtime_us,
        )?;
        page.seconds(
            "job_sync",
            "How long the last sync of the dirty trackers took.",
            counters.sync_us,
        )?;
        page.gauge(
            "job_throttle",
            Some(Unit::Other("ratio".to_owned())),
            "The part of its time that the guest is throttled, from 0 to 1.",
            counters.throttle_percent as f64 / 100.0,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::shared::SharedSession;

    fn exposition() -> Exposition {
        let session =
            SharedSession::new(crate::job::notifier().unwrap(), crate::vm_name::VmName::default())
                .unwrap()
                .sample();
        let sample = Sample { connections: 3, session };
        Exposition { sample, discarded_bytes: 8192, started: UNIX_EPOCH }
    }

    #[test]
    fn both_formats_have_the_same_series() {
        let sorted = |format| {
            let text = exposition().encode(format).unwrap();
            // The two write the bounds of buckets in different ways.
            let samples =
                text.lines().filter(|line| !line.starts_with('#') && !line.contains("le=\""));
            let mut samples: Vec<_> = samples.map(str::to_owned).collect();
            samples.sort();
            samples
        };
        let series = sorted(Format::OpenMetrics);
        assert!(series.contains(&"pageferry_memory_discarded_bytes 8192".to_owned()), "{series:?}");
        assert!(series.contains(&"pageferry_job_phase{phase=\"idle\"} 1".to_owned()));
        assert_eq!(series, sorted(Format::Prometheus));
        let mut unique = series.clone();
        unique.dedup();
        assert_eq!(series, unique);
    }

    #[test]
    fn every_metric_has_a_sentence_and_ends_in_its_unit() {
        let text = exposition().encode(Format::OpenMetrics).unwrap();
        assert!(text.ends_with("# EOF\n"));
        let lines = |kind: &'static str| text.lines().filter_map(move |l| l.strip_prefix(kind));
        for help in lines("# HELP ") {
            assert!(help.starts_with("pageferry_") && help.ends_with('.'), "{help}");
        }
        assert_eq!(lines("# HELP ").count(), lines("# TYPE ").count());
        for unit in lines("# UNIT ") {
            let (name, unit) = unit.split_once(' ').unwrap();
            assert!(name.ends_with(&format!("_{unit}")), "{name}");
        }
    }
}
