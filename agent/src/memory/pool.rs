//! Huge pages for a guest that runs before its memory is here.
//!
//! The kernel keeps huge pages in a pool per size. If the pool runs out while the guest runs, the
//! guest waits in a fault, and nobody can help it but an operator. So what is missing is reserved
//! before the guest moves ([`reserve`]), by the kernel's own account: to map a part of a hugetlbfs
//! file shared reserves the pages of that part which are neither allocated nor reserved yet, or
//! fails, and the reservation stays with the file when the mapping goes (`hugetlb_reserve_pages()`
//! in the kernel's `mm/hugetlb.c`). So it is right for a VMM that has mapped its memory with a
//! reservation, for one that has not (`MAP_NORESERVE`, the default of vm-memory), and for one that
//! has freed pages since, which drops the reservation of those pages.
//!
//! What is reserved and never allocated stays with the file until the VMM closes it: another
//! attempt uses it.
//!
//! A reservation does not say on which NUMA node. A VMM that binds its memory to one node can still
//! run out, and so can one whose control group has a limit. See [`advice`] for what is said then.

use super::backing::{BackingError, BackingKind};
use super::host_page_set::HostPageSet;
use super::huge;
use super::{Block, GuestMemory};
use pageferry_protocol::memory::PageRange;
use rustix::io::Errno;

/// There are not enough huge pages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "block {id}: {missing} huge pages of {} kB are missing, and {free} are free that are not reserved by others: raise {}/nr_hugepages",
    size >> 10,
    folder(*size)
)]
pub struct Shortage {
    /// The block.
    pub id: u32,
    /// Bytes of a huge page.
    pub size: u64,
    /// Huge pages that the guest has content for, and that are not there.
    pub missing: u64,
    /// Free ones of the pool that nobody has reserved.
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
        /// What is wrong.
        #[source]
        source: BackingError,
    },
}

/// Reserves a huge page for every one that is missing. Nothing happens on other memory.
///
/// # Errors
/// If the pool does not have so many.
pub fn reserve(memory: &GuestMemory, missing: &HostPageSet) -> Result<(), ReserveError> {
    for (at, block) in memory.blocks().iter().enumerate() {
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

/// Refuses what will not fit once all that the blocks hold now is freed. For memory that still has
/// a guest, which is not to be given up for nothing.
///
/// # Errors
/// If the pool does not have as many huge pages as are missing.
pub fn check_available(memory: &GuestMemory, missing: &HostPageSet) -> Result<(), ReserveError> {
    let hugetlb = || {
        memory
            .blocks()
            .iter()
            .enumerate()
            .filter(|(_, block)| block.backing.kind() == BackingKind::Hugetlb)
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
    // What the files have reserved for themselves only the kernel knows.
    reserve(memory, missing)
}

/// What an operator can do when a page of this block cannot be had for want of memory.
pub fn advice(block: &Block) -> String {
    let (id, size) = (block.geometry.id, block.backing.host_page_size());
    match block.backing.kind() {
        BackingKind::Hugetlb => format!(
            "no huge page of {} kB can be had for block {id}, and {} are free that are not reserved: raise {}/nr_hugepages; or the VMM's NUMA node or control group has none left",
            size >> 10,
            unreserved(size),
            folder(size)
        ),
        _ => format!(
            "no memory can be had for block {id}: free some, or raise the limit of the VMM's control group, or the size of its tmpfs"
        ),
    }
}

fn shortage(block: &Block, missing: u64) -> Shortage {
    let size = block.backing.host_page_size();
    Shortage { id: block.geometry.id, size, missing, free: unreserved(size) }
}

/// Where the kernel shows the pool of this size in bytes.
pub(super) fn folder(size: u64) -> String {
    format!("/sys/kernel/mm/hugepages/hugepages-{}kB", size >> 10)
}

/// Huge pages of this size that anyone can have: free ones that are not reserved, and those that
/// the kernel may still make beyond the pool.
fn unreserved(size: u64) -> u64 {
    let figure = |name: &str| -> u64 {
        let text = std::fs::read_to_string(format!("{}/{name}", folder(size)));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    let beyond = figure("nr_overcommit_hugepages").saturating_sub(figure("surplus_hugepages"));
    figure("free_hugepages").saturating_sub(figure("resv_hugepages")) + beyond
}
