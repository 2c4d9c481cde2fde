// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Huge pages for a guest that runs before its memory has arrived.
//!
//! The kernel keeps a pool of huge pages for each size. If the pool runs out while the guest runs,
//! the guest waits in a fault until an operator adds huge pages. So the agent reserves the missing
//! pages before the guest moves ([`reserve`]), and the kernel itself does the accounting. A shared
//! mapping of a part of a hugetlbfs file reserves the pages of that part that are neither allocated
//! nor reserved, or fails. The reservation stays with the file after the mapping is gone
//! (`hugetlb_reserve_pages()` in the kernel's `mm/hugetlb.c`). So the account is right for every
//! VMM: one that has mapped its memory with a reservation, one that has not (`MAP_NORESERVE`, the
//! default of vm-memory), and one that has freed pages since, which drops the reservation of those
//! pages.
//!
//! Pages that are reserved and never allocated stay with the file until the VMM closes it, so
//! another attempt can use them.
//!
//! A reservation has no NUMA node. So a VMM that binds its memory to one node can still run out of
//! huge pages, and so can a VMM whose control group has a limit. Then the operator gets the text of
//! [`advice`].

use super::backing::{BackingError, BackingKind};
use super::block::Block;
use super::host_page_set::HostPageSet;
use super::huge;
use crate::opener;
use pageferry_protocol::memory::PageRange;
use rustix::io::Errno;
use std::path::Path;
use std::sync::Arc;

/// The pool does not have enough huge pages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "block {id} needs {missing} more huge pages of {} kB, and {free} are free and not reserved: raise {}/nr_hugepages",
    size >> 10,
    folder(*size)
)]
pub struct Shortage {
    /// The block that needs them.
    pub id: u32,
    /// Size of a huge page in bytes.
    pub size: u64,
    /// Huge pages that are missing and could not be reserved.
    pub missing: u64,
    /// Free huge pages of the pool that nobody has reserved.
    pub free: u64,
}

/// Why huge pages could not be reserved.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// The pool is too small.
    #[error(transparent)]
    Shortage(#[from] Shortage),
    /// The file cannot be mapped.
    #[error("block {id}")]
    Backing {
        /// The block.
        id: u32,
        /// The cause.
        #[source]
        source: BackingError,
    },
}

/// Reserves a huge page for every missing one. Does nothing for blocks that are not on hugetlbfs.
///
/// # Errors
/// If the pool does not have enough huge pages.
pub fn reserve(blocks: &[Arc<Block>], missing: &HostPageSet) -> Result<(), ReserveError> {
    for (at, block) in blocks.iter().enumerate() {
        let host_pages = missing.block(at);
        if block.backing.kind() != BackingKind::Hugetlb {
            continue;
        }
        for run in host_pages.bits().runs(host_pages.bits().all()) {
            match huge::reserve(&block.backing, host_pages.pages(run)) {
                Ok(()) => {}
                Err(BackingError::Kernel { source: Errno::NOMEM, .. }) => {
                    let rest = PageRange::new(run.first, host_pages.bits().all().end() - run.first);
                    return Err(shortage(block, host_pages.bits().count(rest)).into());
                }
                Err(source) => return Err(ReserveError::Backing { id: block.geometry.id, source }),
            }
        }
    }
    Ok(())
}

/// Checks that the missing huge pages will fit after everything that the blocks hold now is freed.
/// For memory that still has a guest: that guest must not be given up before it is known that the
/// new one fits.
///
/// # Errors
/// If the pool does not have enough huge pages.
pub fn check_available(blocks: &[Arc<Block>], missing: &HostPageSet) -> Result<(), ReserveError> {
    let hugetlb = || {
        blocks.iter().enumerate().filter(|(_, block)| block.backing.kind() == BackingKind::Hugetlb)
    };
    let mut sizes: Vec<u64> = hugetlb().map(|(_, block)| block.backing.host_page_size()).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let fits = |size: u64| {
        let of_size = || hugetlb().filter(|(_, block)| block.backing.host_page_size() == size);
        let needed: u64 = of_size()
            .map(|(at, _)| missing.block(at).bits().count(missing.block(at).bits().all()))
            .sum();
        let held: u64 = of_size()
            .map(|(at, block)| block.backing.allocated_pages() / missing.block(at).unit())
            .sum();
        needed <= unreserved(size) + held
    };
    if sizes.into_iter().all(fits) {
        return Ok(());
    }
    // Only the kernel knows what the files have reserved for themselves.
    reserve(blocks, missing)
}

/// What an operator can do when there is no memory for a page of this block.
pub fn advice(block: &Block) -> String {
    let (id, size) = (block.geometry.id, block.backing.host_page_size());
    match block.backing.kind() {
        BackingKind::Hugetlb => format!(
            "no huge page of {} kB is available for block {id}, and {} are free and not reserved: raise {}/nr_hugepages; if some are free, the VMM's NUMA node or control group has none left",
            size >> 10,
            unreserved(size),
            folder(size)
        ),
        _ => format!(
            "no memory is available for block {id}: free some, or raise the limit of the VMM's control group or the size of its tmpfs"
        ),
    }
}

fn shortage(block: &Block, missing: u64) -> Shortage {
    let size = block.backing.host_page_size();
    Shortage { id: block.geometry.id, size, missing, free: unreserved(size) }
}

/// The folder in which the kernel shows the pool of huge pages of this size in bytes.
pub(super) fn folder(size: u64) -> String {
    format!("/sys/kernel/mm/hugepages/hugepages-{}kB", size >> 10)
}

/// The number of huge pages of this size that anyone can get: free ones that are not reserved, and
/// those that the kernel may still allocate beyond the pool.
fn unreserved(size: u64) -> u64 {
    let figure = |name: &str| -> u64 {
        let path = format!("{}/{name}", folder(size));
        let text = opener::read(Path::new(&path), 64).unwrap_or_default();
        str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    let beyond = figure("nr_overcommit_hugepages").saturating_sub(figure("surplus_hugepages"));
    figure("free_hugepages").saturating_sub(figure("resv_hugepages")) + beyond
}
