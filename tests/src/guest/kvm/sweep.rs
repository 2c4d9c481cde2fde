// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pages that the guest sweeps, and the check that their counters belong to one moment.

use super::error::GuestError;
use pageferry_protocol::memory::{PAGE_SIZE, pages_in};
use std::os::unix::fs::FileExt;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Pages at the start of the first region that the guest runs from and does not sweep.
pub const FIRMWARE_PAGES: u64 = 16;

/// Largest number of ranges in a [`Sweep`]: the table in the firmware has no room for more.
pub const MAX_RANGES: usize = ((PAGE_SIZE - super::firmware::TABLE_OFFSET) / 16 - 1) as usize;

/// The pages that the guest sweeps, and how fast.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sweep {
    /// Guest physical address and number of pages of each range, in the order in which they are
    /// swept.
    pub ranges: Vec<(u64, u64)>,
    /// Number of turns in an empty loop after each page. Zero is the fastest.
    pub spins: u32,
}

impl Sweep {
    /// All of `memory` beyond the firmware, as fast as possible.
    pub fn all<B: Bitmap>(memory: &GuestMemoryMmap<B>) -> Self {
        let mut skip = FIRMWARE_PAGES;
        let range = |region: &vm_memory::GuestRegionMmap<B>| {
            let skip = std::mem::take(&mut skip);
            (region.start_addr().0 + skip * PAGE_SIZE, pages_in(region.len()).saturating_sub(skip))
        };
        Self {
            ranges: memory.iter().map(range).filter(|(_, pages)| *pages > 0).collect(),
            spins: 0,
        }
    }

    /// The same with this many spins after each page.
    #[must_use]
    pub fn spins(mut self, spins: u32) -> Self {
        self.spins = spins;
        self
    }

    /// Number of pages in one sweep.
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|(_, pages)| pages).sum()
    }

    /// Guest physical addresses of the pages, in the order of the sweep.
    pub fn addresses(&self) -> impl Iterator<Item = u64> + '_ {
        self.ranges
            .iter()
            .flat_map(|(gpa, pages)| (0..*pages).map(move |page| gpa + page * PAGE_SIZE))
    }

    /// Checks that all of it lies within `memory`, beyond the firmware.
    pub(super) fn check<B: Bitmap>(&self, memory: &GuestMemoryMmap<B>) -> Result<(), GuestError> {
        let Some(base) = memory.iter().next().map(|region| region.start_addr().0) else {
            return Err(GuestError::Memory("there is none".into()));
        };
        if self.ranges.is_empty() || self.ranges.len() > MAX_RANGES {
            return Err(GuestError::Memory(format!(
                "{} ranges to sweep, 1 to {MAX_RANGES} can be",
                self.ranges.len()
            )));
        }
        for &(gpa, pages) in &self.ranges {
            let bad = |why| Err(GuestError::Range { gpa, pages, why });
            let length = pages.saturating_mul(PAGE_SIZE);
            let Some(region) = memory.find_region(GuestAddress(gpa)) else {
                return bad("no memory there");
            };
            if !gpa.is_multiple_of(PAGE_SIZE) || pages == 0 {
                return bad("not whole pages");
            }
            if length > region.len() - (gpa - region.start_addr().0) {
                return bad("ends outside of its region");
            }
            if gpa < base + FIRMWARE_PAGES * PAGE_SIZE && base < gpa + length {
                return bad("that is where the guest's code is");
            }
        }
        Ok(())
    }
}

/// The counters of the pages of `sweep`, in its order. They are read from the files under `memory`,
/// so that the read does not allocate pages that were never written.
///
/// # Errors
/// If a page is not in `memory`, or a region has no file.
pub fn counters<B: Bitmap>(
    memory: &GuestMemoryMmap<B>, sweep: &Sweep,
) -> Result<Vec<u32>, GuestError> {
    let read = |gpa: u64| {
        let error = |why: &str| GuestError::Memory(format!("{gpa:#x}: {why}"));
        let region =
            memory.find_region(GuestAddress(gpa)).ok_or_else(|| error("no memory there"))?;
        let file = region.file_offset().ok_or_else(|| error("no file under the memory"))?;
        let mut bytes = [0; 4];
        file.file()
            .read_exact_at(&mut bytes, file.start() + (gpa - region.start_addr().0))
            .map_err(|source| error(&source.to_string()))?;
        Ok(u32::from_le_bytes(bytes))
    };
    sweep.addresses().map(read).collect()
}

/// The progress of a guest, according to its counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Counter of the first page, which is the number of sweeps that have begun. It wraps around.
    pub sweeps: u32,
    /// Pages that were written in the last sweep.
    pub pages: usize,
}

/// Checks that counters, in the order of the sweep, belong to one moment: all are equal, except for
/// at most one step down by one.
///
/// # Errors
/// The first page that does not fit.
pub fn check_consistent(counters: impl IntoIterator<Item = u32>) -> Result<Progress, GuestError> {
    let mut counters = counters.into_iter().enumerate();
    let Some((_, sweeps)) = counters.next() else { return Ok(Progress { sweeps: 0, pages: 0 }) };
    let (mut before, mut pages) = (sweeps, 1);
    for (page, counter) in counters {
        let may_step = before == sweeps;
        match before.wrapping_sub(counter) {
            0 if may_step => pages = page + 1,
            0 => {}
            1 if may_step => before = counter,
            _ => return Err(GuestError::Torn { page, counter, before }),
        }
    }
    Ok(Progress { sweeps, pages })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_one_moment_are_consistent() {
        for (counters, sweeps, pages) in [
            (&[7, 7, 7][..], 7, 3),
            (&[7, 6, 6], 7, 1),
            (&[7, 7, 6], 7, 2),
            (&[0, u32::MAX], 0, 1),
            (&[1, 0, 0], 1, 1),
            (&[5], 5, 1),
        ] {
            assert_eq!(
                check_consistent(counters.iter().copied()).unwrap(),
                Progress { sweeps, pages },
                "{counters:?}"
            );
        }
    }

    #[test]
    fn a_page_of_another_moment_is_found() {
        for (counters, at) in [
            (&[7, 7, 5][..], 2),
            (&[7, 8], 1),
            (&[7, 6, 7], 2),
            (&[7, 6, 6, 5], 3),
            (&[7, 0, 7], 1),
            (&[0, 1], 1),
        ] {
            let error = check_consistent(counters.iter().copied()).unwrap_err();
            assert!(
                matches!(error, GuestError::Torn { page, .. } if page == at),
                "{counters:?}: {error}"
            );
        }
    }
}
