// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a job places pages, and why not better: for its status and the log.

use crate::lock::lock;
use pageferry_protocol::control::job::{JobStatus, Placing};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// How a job places pages.
#[derive(Debug, Default)]
pub struct PlacingReport {
    state: Mutex<(Placing, Option<String>)>,
    huge_pages: AtomicU64,
}

impl PlacingReport {
    /// A block places so. The status names the best way of all blocks.
    pub fn uses(&self, placing: Placing) {
        let mut state = lock(&self.state);
        state.0 = state.0.max(placing);
    }

    /// Says why a block is placed in this way, if an operator should know. The first reason is kept
    /// and logged.
    pub fn explain(&self, why: String) {
        let mut state = lock(&self.state);
        if state.1.is_none() {
            log::info!("placing of pages: {why}");
            state.1 = Some(why);
        }
    }

    /// No more huge pages are made.
    pub fn ends_huge_pages(&self, why: String) {
        let mut state = lock(&self.state);
        state.0 = state.0.min(Placing::Pages);
        let why = format!("no more huge pages are made: {why}");
        log::info!("{why}");
        state.1 = Some(why);
    }

    /// The kernel made a huge page.
    pub fn made_huge_page(&self) {
        self.huge_pages.fetch_add(1, Ordering::Relaxed);
    }

    /// Logs how many huge pages a job has made, if any.
    pub fn log_huge_pages(&self, job: u64) {
        let made = self.huge_pages.load(Ordering::Relaxed);
        if made > 0 {
            log::info!("job {job}: {made} huge pages were made");
        }
    }

    /// Writes the report into a status.
    pub fn report(&self, status: &mut JobStatus) {
        let state = lock(&self.state);
        status.placing = state.0;
        status.placing_reason.clone_from(&state.1);
        status.counters.huge_pages = self.huge_pages.load(Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_has_the_best_way_and_the_first_reason() {
        let report = PlacingReport::default();
        let reported = || {
            let mut status = JobStatus::default();
            report.report(&mut status);
            (status.placing, status.placing_reason, status.counters.huge_pages)
        };
        assert_eq!(reported(), (Placing::None, None, 0));
        report.uses(Placing::Write);
        report.explain("one".into());
        report.uses(Placing::HugePages);
        report.uses(Placing::Pages);
        report.explain("two".into());
        report.made_huge_page();
        assert_eq!(reported(), (Placing::HugePages, Some("one".into()), 1));
        report.ends_huge_pages("three".into());
        let why = "no more huge pages are made: three".to_owned();
        assert_eq!(reported(), (Placing::Pages, Some(why), 1));
    }
}
