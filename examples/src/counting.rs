// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that counts in its pages forever, so that a later check can tell whether all its memory
//! arrived. It is a real guest under KVM, or a guest of threads if there is no KVM.

use pageferry_agent::image::Chain;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange, pages_in};
use pageferry_tests::guest::kvm::{FIRMWARE_PAGES, KvmGuest, Sweep, check_consistent, counters};
use pageferry_tests::guest::threads::{PageSet, ThreadGuest, ThreadGuestOptions};
use pageferry_tests::memory::TestMemory;
use pageferry_tests::usage::{Path, Usage};
use pageferry_tests::vmm::{MockVmm, PATIENCE, Tracker};
use pageferry_tests::{Error, deadline};
use std::sync::Arc;

/// The id of the only block.
pub const RAM: u32 = 0;

/// Size of the examples' guest in bytes.
pub const SIZE: u64 = 1 << 30;
/// The firmware, and the pages after it that the guest writes all the time.
pub const BUSY: PageRange = mebibytes(0, 32);
/// The pages in which the examples' guest counts.
pub const COUNTING: Counting = Counting { busy: BUSY };
/// Seed of the content that does not change.
pub const SEED: u64 = 2021;

/// A range of the guest, in MiB.
pub const fn mebibytes(offset: u64, length: u64) -> PageRange {
    PageRange::new(pages_in(offset << 20), pages_in(length << 20))
}

/// The pages in which the guest counts: all pages after its firmware.
#[derive(Debug, Clone, Copy)]
pub struct Counting {
    /// Its firmware, and the pages after it, which it writes all the time.
    pub busy: PageRange,
}

/// A guest that will arrive.
pub enum Expected {
    /// Under KVM.
    Kvm,
    /// A guest of threads, and the number of its writes.
    Threads(Box<dyn Fn() -> u64>),
}

impl Counting {
    fn pages(&self) -> u64 {
        self.busy.count - FIRMWARE_PAGES
    }

    fn sweep(&self) -> Sweep {
        Sweep { ranges: vec![(FIRMWARE_PAGES * PAGE_SIZE, self.pages())], spins: 200 }
    }

    fn threads(&self, usage: &Arc<Usage>) -> Result<ThreadGuest, Error> {
        let busy: PageSet =
            [(RAM, PageRange::new(FIRMWARE_PAGES, self.pages()))].into_iter().collect();
        let (rate, path) = (Some(50_000), Path::MappingAndLog);
        ThreadGuest::new(
            usage,
            ThreadGuestOptions { rate, pages: Some(busy), path, ..Default::default() },
        )
    }

    /// Starts a guest. Returns a description of it.
    ///
    /// # Errors
    /// If it does not run.
    pub fn boot(&self, vmm: &MockVmm) -> Result<&'static str, Error> {
        let usage = vmm.usage().clone();
        let guest = match KvmGuest::new(usage.memory().guest().clone(), self.sweep()) {
            Ok(mut guest) => {
                guest.boot()?;
                vmm.set_tracker(Tracker::Hooks(Box::new(guest.dirty_log()?)))?;
                vmm.set_guest(guest);
                "under KVM, tracked by KVM's dirty log"
            }
            Err(error) => {
                log::warn!("no KVM guest: {error}");
                vmm.set_guest(self.threads(&usage)?);
                "of threads, since KVM is not to be had, tracked by the shared log"
            }
        };
        vmm.start()?;
        Ok(guest)
    }

    /// Creates the place for a guest that arrives.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn expect(&self, vmm: &MockVmm) -> Result<Expected, Error> {
        let usage = vmm.usage().clone();
        if let Ok(guest) = KvmGuest::new(usage.memory().guest().clone(), self.sweep()) {
            vmm.set_guest(guest);
            return Ok(Expected::Kvm);
        }
        let guest = self.threads(&usage)?;
        let writes = guest.watch_writes();
        vmm.set_guest(guest);
        Ok(Expected::Threads(Box::new(writes)))
    }

    /// The counter of the first page.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn first(&self, memory: &TestMemory) -> Result<u32, Error> {
        let word = memory.block(RAM)?.read_word(FIRMWARE_PAGES * PAGE_SIZE)?;
        Ok(word as u32)
    }

    /// The same counter in an image of the guest.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn first_in(&self, image: &std::path::Path) -> Result<u32, Error> {
        let mut page = [0; PAGE_SIZE as usize];
        let chain = Chain::open(image).map_err(|error| Error::Mismatch(error.to_string()))?;
        let read = chain.read(0, PageRange::new(FIRMWARE_PAGES, 1), &mut page);
        read.map_err(|error| Error::Mismatch(error.to_string()))?;
        Ok(u32::from_le_bytes([page[0], page[1], page[2], page[3]]))
    }

    /// Lets the guest that arrived run, pauses it, and checks its counters. `counted` is the
    /// counter of the first page when the source paused it, if that is known. Returns the result in
    /// words.
    ///
    /// # Errors
    /// If the guest does not continue from there, or a counter is wrong.
    pub fn counts_on(
        &self, vmm: &MockVmm, guest: &Expected, counted: u32,
    ) -> Result<String, Error> {
        match guest {
            Expected::Kvm => self.counts_on_in_kvm(vmm, counted),
            Expected::Threads(writes) => counts_on_in_threads(vmm, writes),
        }
    }

    /// A page that arrived in an old version would lag behind forever.
    fn counts_on_in_kvm(&self, vmm: &MockVmm, counted: u32) -> Result<String, Error> {
        let came_with = self.first(vmm.memory())?;
        if came_with < counted {
            return Err(Error::Mismatch(format!(
                "the guest counted to {counted}, and came with {came_with}"
            )));
        }
        deadline::wait_until("three more sweeps of the guest", PATIENCE, || {
            self.first(vmm.memory()).is_ok_and(|sweeps| sweeps.wrapping_sub(came_with) >= 3)
        })?;
        vmm.stop()?;
        let progress = check_consistent(counters(vmm.memory().guest(), &self.sweep())?)?;
        Ok(format!(
            "the guest counts on, from sweep {came_with} to sweep {}, and all its {} counters agree",
            progress.sweeps,
            self.pages()
        ))
    }
}

fn counts_on_in_threads(vmm: &MockVmm, writes: &dyn Fn() -> u64) -> Result<String, Error> {
    deadline::wait_until("more writes of the guest", PATIENCE, || writes() > 10_000)?;
    vmm.stop()?;
    let words = vmm.usage().check()?;
    let came = vmm.record().words_checked;
    Ok(format!(
        "the guest counts on: {came} counters were right when it came, {words} are after {} more writes",
        writes()
    ))
}
