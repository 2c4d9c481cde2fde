// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Huge pages of 2 MiB: the kernel's pool of them, and files made of them.

use crate::Error;
use crate::deadline::wait_until;
use crate::vmm::PATIENCE;
use pageferry_agent::memory::huge_page_supply::HugePageSupply;
use pageferry_agent::memory::large_pages::LargePages;
use pageferry_agent::memory::spare_memory::SpareMemory;
use pageferry_agent::memory::{Backing, BackingError};
use pageferry_client::error::chain;
use pageferry_protocol::memory::PAGE_SIZE;
use rustix::fs::{
    FallocateFlags, FlockOperation, MemfdFlags, fallocate, flock, ftruncate, memfd_create,
};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

/// The pool's figures.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Makes huge pages of all whole 2 MiB of a memfd or a file on tmpfs, whose content is 1 and then
/// zeroes. False, and says so, if this kernel makes none.
///
/// # Errors
/// If the kernel refuses to write.
pub fn make_all_huge(file: &File) -> Result<bool, Error> {
    let length = file.metadata().map_err(Error::io("look at the file"))?.len();
    let memory = |error: BackingError| Error::Memory(chain(&error));
    let fd = file.try_clone().map_err(Error::io("duplicate the file"))?;
    let backing = Backing::new(fd.into(), 0, length).map_err(memory)?;
    let supply = HugePageSupply::new(&Arc::default(), SpareMemory::of_this_process());
    let large = LargePages::new(&backing, &Arc::new(supply), &Arc::default()).map_err(memory)?;
    for start in (0..length / HUGE_PAGE).map(|number| number * HUGE_PAGE) {
        backing.write(start, &[1; PAGE_SIZE as usize]).map_err(memory)?;
        if !large.as_ref().is_some_and(|large| large.make(start)) {
            eprintln!("skipped: the kernel makes no huge page");
            return Ok(false);
        }
    }
    Ok(true)
}

/// Huge pages for one test. On drop, the kernel's pool gets its old size again.
#[derive(Debug)]
pub struct HugePages {
    added: u64,
    /// Size of the pool before.
    used: u64,
    /// A file lock that is held while this is open. Other processes that run such tests wait for
    /// it.
    _alone_here: File,
    _alone: MutexGuard<'static, ()>,
}

impl HugePages {
    /// Makes sure that at least `pages` are free, and that no other test of this or another process
    /// takes them.
    ///
    /// # Errors
    /// If there are fewer and the pool cannot grow.
    pub fn reserve(pages: u64) -> Result<Self, Error> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let alone_here = File::open(POOL).map_err(Error::io(format!("open {POOL}")))?;
        flock(&alone_here, FlockOperation::LockExclusive)
            .map_err(Error::kernel("lock the pool of huge pages"))?;
        let (before, used) = (persistent()?, used()?);
        let missing = pages.saturating_sub(Self::free()?);
        if missing > 0 {
            resize(before + missing)?;
        }
        // The kernel adds as many pages as it finds room for.
        let pool = Self {
            added: persistent()?.saturating_sub(before),
            used,
            _alone_here: alone_here,
            _alone: alone,
        };
        let fd = hugetlb_memfd(pages * HUGE_PAGE)
            .map_err(Error::kernel("create a memfd of huge pages"))?;
        fallocate(&fd, FallocateFlags::empty(), 0, pages * HUGE_PAGE)
            .map_err(Error::kernel("allocate huge pages; see /proc/sys/vm/nr_hugepages"))?;
        Ok(pool)
    }

    /// Pages of the pool that are neither used nor reserved.
    ///
    /// # Errors
    /// If the kernel has no huge pages of this size.
    pub fn free() -> Result<u64, Error> {
        Ok(figure("free_hugepages")?.saturating_sub(figure("resv_hugepages")?))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // A page that an ending thread still maps would stay in the pool forever.
        let given_back = wait_until("huge pages given back", PATIENCE, || {
            used().is_ok_and(|used| used <= self.used)
        });
        let shrunk = match self.added {
            0 => Ok(()),
            added => persistent().and_then(|now| resize(now.saturating_sub(added))),
        };
        if let Err(error) = given_back.and(shrunk) {
            log::warn!("the pool of huge pages may stay too large: {}", error.sentence());
        }
    }
}

/// Pages of the pool, without surplus pages.
fn persistent() -> Result<u64, Error> {
    Ok(figure("nr_hugepages")?.saturating_sub(figure("surplus_hugepages")?))
}

/// Pages of the pool that are in use.
fn used() -> Result<u64, Error> {
    Ok(figure("nr_hugepages")?.saturating_sub(figure("free_hugepages")?))
}

fn figure(name: &str) -> Result<u64, Error> {
    let path = format!("{POOL}/{name}");
    let text = fs::read_to_string(&path).map_err(Error::io(format!("read {path}")))?;
    text.trim().parse().map_err(|error| Error::Argument(format!("{path}: {error}")))
}

fn resize(pages: u64) -> Result<(), Error> {
    let path = format!("{POOL}/nr_hugepages");
    fs::write(&path, pages.to_string()).map_err(Error::io(format!("write {pages} to {path}")))
}

/// A memfd of huge pages.
///
/// # Errors
/// If the kernel has none, or `length` is not a multiple of their size.
pub fn hugetlb_memfd(length: u64) -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let fd = memfd_create("pageferry-test-huge", flags)?;
    ftruncate(&fd, length)?;
    Ok(fd)
}
