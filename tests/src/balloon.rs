// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A balloon that takes random runs of pages from the guest and gives them back.
//!
//! There are two ways. Either the pages are freed, and the guest gets them back without a message
//! to the agent, as with free page reporting, or with a balloon that deflates by touching. Or they
//! are discarded, and populated before the guest gets them back, as a VMM does that keeps the
//! record itself.

use crate::Error;
use crate::random::Random;
use crate::usage::Usage;
use pageferry_client::{BlockRange, Client, ErrorCode, Punch};
use pageferry_protocol::memory::PageRange;
use std::sync::Arc;

/// A balloon over all blocks of a memory.
#[derive(Debug)]
pub struct Balloon {
    client: Client,
    usage: Arc<Usage>,
    random: Random,
    way: Way,
    /// The pages that it holds.
    held: Vec<(u32, PageRange)>,
}

/// How the agent learns which pages the balloon takes and gives back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Pages are freed. The agent does not learn when they are given back.
    Free,
    /// Pages are discarded, and populated when they are given back.
    Discard(Punch),
}

/// The byte range of pages of a block, for the client.
pub fn byte_range(block: u32, pages: PageRange) -> BlockRange {
    BlockRange { block, offset: pages.offset(), length: pages.bytes() }
}

/// True if the agent refused because it is busy, so that the VMM tries again later.
pub fn is_busy(error: &pageferry_client::Error) -> bool {
    matches!(error, pageferry_client::Error::Refused { code: ErrorCode::Busy, .. })
}

impl Balloon {
    /// An empty balloon.
    pub fn new(client: Client, usage: Arc<Usage>, way: Way, seed: u64) -> Self {
        Self { client, usage, random: Random::new(seed), way, held: Vec::new() }
    }

    /// The pages that it holds.
    pub fn held(&self) -> &[(u32, PageRange)] {
        &self.held
    }

    /// Takes `runs` runs of up to `longest` pages, or less if the guest has no more. One request
    /// names all of them. Returns the number of pages that it took, which is 0 while the VMM is
    /// paused.
    ///
    /// # Errors
    /// If the client refuses, which it never should.
    pub fn inflate(&mut self, runs: usize, longest: u64) -> Result<u64, Error> {
        let usage = self.usage.clone();
        Ok(usage.while_running(|| self.take(runs, longest))?.unwrap_or(0))
    }

    fn take(&mut self, runs: usize, longest: u64) -> Result<u64, Error> {
        let usage = self.usage.clone();
        let blocks = usage.memory().blocks();
        let mut taken = Vec::new();
        for _ in 0..runs {
            let Some(block) = blocks.get(self.random.below(blocks.len() as u64) as usize) else {
                break;
            };
            let unit = block.layout().granularity / pageferry_protocol::memory::PAGE_SIZE;
            let first = self.random.below(block.pages()) / unit * unit;
            let count = (1 + self.random.below(longest.max(1)))
                .next_multiple_of(unit)
                .min(block.pages() - first);
            let wanted = PageRange::new(first, count);
            // Runs do not contain pages that the balloon holds already.
            let usable = usage.usable(block.id())?;
            for run in usable.runs(wanted).collect::<Vec<_>>() {
                usage.give_up(block.id(), run)?;
                taken.push((block.id(), run));
            }
        }
        let ranges: Vec<BlockRange> =
            taken.iter().map(|(block, run)| byte_range(*block, *run)).collect();
        match self.way {
            Way::Free => self.client.free(&ranges)?,
            Way::Discard(punch) => self.client.discard(&ranges, punch)?,
        };
        self.held.extend(&taken);
        Ok(taken.iter().map(|(_, run)| run.count).sum())
    }

    /// Gives back up to `runs` of the runs that it holds, chosen at random. Returns the number of
    /// pages that it gave back. That is 0 if the VMM is paused or the agent is busy, which is not
    /// an error.
    ///
    /// # Errors
    /// If the agent refuses for another reason.
    pub fn deflate(&mut self, runs: usize) -> Result<u64, Error> {
        let usage = self.usage.clone();
        Ok(usage.while_running(|| self.give_back(runs))?.unwrap_or(0))
    }

    fn give_back(&mut self, runs: usize) -> Result<u64, Error> {
        let mut chosen = Vec::new();
        for _ in 0..runs.min(self.held.len()) {
            chosen.push(self.held.swap_remove(self.random.below(self.held.len() as u64) as usize));
        }
        let ranges: Vec<BlockRange> =
            chosen.iter().map(|(block, run)| byte_range(*block, *run)).collect();
        let populated = match self.way {
            Way::Free => Ok(0),
            Way::Discard(_) => self.client.populate(&ranges),
        };
        match populated {
            Ok(_) => {}
            Err(error) => {
                self.held.extend(&chosen);
                return if is_busy(&error) { Ok(0) } else { Err(error.into()) };
            }
        }
        for (block, run) in &chosen {
            self.usage.take_back(*block, *run)?;
        }
        Ok(chosen.iter().map(|(_, run)| run.count).sum())
    }
}
