// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long a job asks the kernel for huge pages: until memory is short, or in pieces.
//!
//! A huge page that the kernel makes takes no memory that its small pages would not take, too, once
//! all have arrived. But for a huge page the kernel also swaps, takes memory from others, and moves
//! pages to get 2 MiB in a row. A small page fits anywhere. So a job asks for no more huge pages
//! once the host, or a control group of the agent, has little left that the kernel can give without
//! swapping. It also stops if the kernel has refused several times in a row.
//!
//! The job does not begin again: what is short once is short again, and each try costs.

use super::placing_report::PlacingReport;
use super::spare_memory::SpareMemory;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// After so many huge pages in a row that the kernel did not make, no more are asked for.
const MAX_REFUSALS: u32 = 4;
/// With less than this left, memory is short. In bytes.
const LEAST_SPARE: u64 = 64 << 20;
/// Memory is looked at before every so many huge pages, of 32 MiB together.
const LOOK_EVERY: u32 = 16;

/// Whether a job asks the kernel for more huge pages.
#[derive(Debug)]
pub struct HugePageSupply {
    report: Arc<PlacingReport>,
    spare: SpareMemory,
    asked: AtomicU32,
    refusals: AtomicU32,
    is_over: AtomicBool,
}

impl HugePageSupply {
    /// The supply of a job whose status shows `report`.
    pub fn new(report: &Arc<PlacingReport>, spare: SpareMemory) -> Self {
        let (asked, refusals) = (AtomicU32::new(0), AtomicU32::new(0));
        Self { report: report.clone(), spare, asked, refusals, is_over: AtomicBool::new(false) }
    }

    /// True if the kernel may be asked for a huge page now.
    pub fn may_ask(&self) -> bool {
        if self.is_over.load(Ordering::Relaxed) {
            return false;
        }
        if !self.asked.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOOK_EVERY) {
            return true;
        }
        match self.spare.shortage(LEAST_SPARE) {
            None => true,
            Some(what) => {
                self.end(format!("memory is short: {what}"));
                false
            }
        }
    }

    /// The kernel made a huge page.
    pub fn made(&self) {
        self.refusals.store(0, Ordering::Relaxed);
        self.report.made_huge_page();
    }

    /// The kernel made none.
    pub fn refused(&self, errno: Errno) {
        if self.refusals.fetch_add(1, Ordering::Relaxed) + 1 == MAX_REFUSALS {
            self.end(format!("the kernel made none, {MAX_REFUSALS} times in a row: {errno}"));
        }
    }

    fn end(&self, why: String) {
        if !self.is_over.swap(true, Ordering::Relaxed) {
            self.report.ends_huge_pages(why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::control::job::JobStatus;

    fn reason(report: &PlacingReport) -> Option<String> {
        let mut status = JobStatus::default();
        report.report(&mut status);
        status.placing_reason
    }

    #[test]
    fn refusals_in_a_row_end_the_supply() {
        let report = Arc::default();
        let supply = HugePageSupply::new(&report, SpareMemory::unlimited());
        for _ in 0..MAX_REFUSALS {
            supply.refused(Errno::NOMEM);
            supply.made();
        }
        assert!(supply.may_ask());
        for _ in 0..MAX_REFUSALS {
            assert!(supply.may_ask());
            supply.refused(Errno::NOMEM);
        }
        assert!(!supply.may_ask());
        assert!(reason(&report).unwrap().contains("the kernel made none, 4 times in a row"));
    }

    #[test]
    fn short_memory_ends_the_supply_at_the_next_look() {
        let report = Arc::default();
        let group = tempfile::tempdir().unwrap();
        let file = |name, content: u64| {
            std::fs::write(group.path().join(name), content.to_string()).unwrap();
        };
        file("memory.max", 1 << 30);
        file("memory.current", (1 << 30) - LEAST_SPARE);
        let supply = HugePageSupply::new(&report, SpareMemory::of_group(group.path()));
        for _ in 0..LOOK_EVERY {
            assert!(supply.may_ask());
        }
        file("memory.current", (1 << 30) - LEAST_SPARE + 1);
        assert!(!supply.may_ask());
        file("memory.current", 0);
        assert!(!supply.may_ask());
        let reason = reason(&report).unwrap();
        assert!(reason.contains("memory is short: the control group "), "{reason}");
    }
}
