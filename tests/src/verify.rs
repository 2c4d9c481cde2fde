// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What must hold after a migration (`never-populate` and `same-memory`), checked in the files
//! under the memory of both sides.

use crate::Error;
use crate::memory::{TestBlock, TestMemory};
use pageferry_client::Client;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;

/// Pages compared at once.
const STEP: u64 = 64;

/// What was compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Compared {
    /// Populated pages that are allocated on either side and equal.
    pub equal: u64,
    /// Discarded pages, all of them holes at the destination.
    pub discarded: u64,
}

impl std::ops::AddAssign for Compared {
    fn add_assign(&mut self, other: Self) {
        self.equal += other.equal;
        self.discarded += other.discarded;
    }
}

/// Compares all blocks while both guests are paused. The source's client says which pages are
/// discarded.
///
/// # Errors
/// The first page that is wrong.
pub fn same_memory(
    source: &TestMemory, client: &Client, destination: &TestMemory,
) -> Result<Compared, Error> {
    let mut compared = Compared::default();
    for block in source.blocks() {
        let discarded = client.discarded(block.id()).ok_or(Error::NoBlock(block.id()))?;
        compared += same_block(block, &discarded, destination.block(block.id())?, |_| true)?;
    }
    Ok(compared)
}

/// Compares one block. Compares the content of a populated page only if `is_stable` holds for it.
///
/// # Errors
/// The first page that is wrong.
pub fn same_block(
    source: &TestBlock, discarded: &MappedBitmap, destination: &TestBlock,
    is_stable: impl Fn(u64) -> bool,
) -> Result<Compared, Error> {
    let id = source.id();
    let ours = source.extents()?;
    // If the file system does not report holes, only content can be compared.
    let theirs = if tells_holes(destination) { destination.extents()? } else { Vec::new() };
    for run in &theirs {
        if let Some(page) = discarded.next_set(*run) {
            return Err(Error::Mismatch(format!(
                "block {id}, page {page:#x}: discarded, but the destination has it"
            )));
        }
        if let Some(page) = first_outside(*run, &ours).filter(|page| is_stable(*page)) {
            return Err(Error::Mismatch(format!(
                "block {id}, page {page:#x}: a hole at the source, but allocated at the destination"
            )));
        }
    }
    let mut equal = 0;
    // The destination has a hole wherever the source has one, as checked above. So only the
    // source's extents have content.
    for run in &ours {
        for first in (run.first..run.end()).step_by(STEP as usize) {
            let pages = PageRange::new(first, STEP.min(run.end() - first));
            equal += compare(source, destination, pages, |page| {
                !discarded.contains(page) && is_stable(page)
            })?;
        }
    }
    Ok(Compared { equal, discarded: discarded.count(discarded.all()) })
}

fn tells_holes(block: &TestBlock) -> bool {
    !matches!(block.layout().backing, crate::memory::Backing::HugePages)
}

/// The first page of `run` that is in none of `extents`, which are in order.
fn first_outside(run: PageRange, extents: &[PageRange]) -> Option<u64> {
    let mut page = run.first;
    let from = extents.partition_point(|extent| extent.end() <= page);
    for extent in extents.get(from..).unwrap_or_default() {
        if extent.first > page || page >= run.end() {
            break;
        }
        page = extent.end();
    }
    (page < run.end()).then_some(page)
}

fn compare(
    source: &TestBlock, destination: &TestBlock, pages: PageRange, counts: impl Fn(u64) -> bool,
) -> Result<u64, Error> {
    let mut sides = [vec![0; pages.bytes() as usize], vec![0; pages.bytes() as usize]];
    let [ours, theirs] = &mut sides;
    source.read(pages.offset(), ours)?;
    destination.read(pages.offset(), theirs)?;
    let mut equal = 0;
    let size = PAGE_SIZE as usize;
    for (page, (ours, theirs)) in (pages.first..).zip(ours.chunks(size).zip(theirs.chunks(size))) {
        if !counts(page) {
            continue;
        }
        if let Some(at) = ours.iter().zip(theirs).position(|(ours, theirs)| ours != theirs) {
            let (id, ours, theirs) = (source.id(), ours[at], theirs[at]);
            return Err(Error::Mismatch(format!(
                "block {id}, page {page:#x}, byte {at:#x}: {ours:#04x} at the source, {theirs:#04x} at the destination"
            )));
        }
        equal += 1;
    }
    Ok(equal)
}
