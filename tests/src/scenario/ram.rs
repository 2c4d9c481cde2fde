// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory whose pages hold stamps.

use super::SOON;
use crate::deadline::wait_until;
use crate::files;
use pageferry_client::{BlockRange, BlockSpec, Client};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use rustix::fs::{FallocateFlags, MemfdFlags};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use vm_memory::bitmap::Bitmap;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, WriteVolatile};

/// A block of guest memory; pages hold a stamp in their first bytes.
#[derive(Debug)]
pub struct Ram {
    /// Its id.
    pub id: u32,
    /// Its guest physical address.
    pub gpa: u64,
    /// How many pages it has.
    pub pages: u64,
    /// Where it begins in its file.
    pub fd_offset: u64,
    /// Its file.
    pub fd: OwnedFd,
    /// Where a guest would touch it; most tests have no need for one.
    mapping: Option<Arc<MmapRegion>>,
}

/// A touch of a page on a thread of its own.
#[derive(Debug)]
pub struct Touch(JoinHandle<std::io::Result<u64>>);

impl Touch {
    /// Of a page of this mapping, as the kernel does it for a device.
    pub fn of<B: Bitmap + Send + Sync + 'static>(mapping: Arc<MmapRegion<B>>, page: u64) -> Self {
        Self(std::thread::spawn(move || {
            let (mut from, to) = std::io::pipe()?;
            let mut to = OwnedFd::from(to);
            let stamp = mapping.get_slice((page * PAGE_SIZE) as usize, 8).unwrap();
            to.write_all_volatile(&stamp).map_err(std::io::Error::other)?;
            let mut bytes = [0; 8];
            from.read_exact(&mut bytes)?;
            Ok(u64::from_le_bytes(bytes))
        }))
    }

    /// True as long as nothing answers it.
    pub fn waits(&self) -> bool {
        !self.0.is_finished()
    }

    /// The stamp that was found.
    ///
    /// # Errors
    /// EFAULT where a guest would get SIGBUS.
    pub fn found(self) -> std::io::Result<u64> {
        wait_until("the touch to be answered", SOON, || self.0.is_finished()).unwrap();
        self.0.join().unwrap()
    }
}

impl Ram {
    /// A memfd that cannot shrink, all of it a hole.
    pub fn new(id: u32, gpa: u64, pages: u64, fd_offset: u64) -> Self {
        let ram = Self::without_seal(id, gpa, pages, fd_offset);
        files::seal(&ram.fd).unwrap();
        ram
    }

    fn without_seal(id: u32, gpa: u64, pages: u64, fd_offset: u64) -> Self {
        let fd = files::unsealed_memfd("ram", fd_offset + pages * PAGE_SIZE, MemfdFlags::empty())
            .unwrap();
        Self { id, gpa, pages, fd_offset, fd, mapping: None }
    }

    /// The same memory, mapped.
    pub fn mapped(mut self) -> Self {
        let file = FileOffset::new(File::from(self.fd.try_clone().unwrap()), self.fd_offset);
        self.mapping =
            Some(Arc::new(MmapRegion::from_file(file, (self.pages * PAGE_SIZE) as usize).unwrap()));
        self
    }

    /// Where it is mapped; 0 if nowhere.
    pub fn address(&self) -> u64 {
        self.mapping.as_ref().map_or(0, |mapping| mapping.as_ptr() as u64)
    }

    /// Touches a page as the kernel does for a device: it waits as a guest would, and a lost page
    /// is an error and no signal.
    pub fn touch(&self, page: u64) -> Touch {
        Touch::of(self.mapping.clone().unwrap(), page)
    }

    /// Where [`Ram::odd`] lies in the guest.
    pub const ODD_GPA: u64 = 0x7000;

    /// A block at an odd place.
    pub fn odd(pages: u64) -> Self {
        Self::new(3, Self::ODD_GPA, pages, 0x5000)
    }

    /// The same memory, whose page `n` holds the stamp `1000 + n`.
    pub fn stamped(self) -> Self {
        (0..self.pages).for_each(|page| self.write(page, 1000 + page));
        self
    }

    /// The same, but its file can shrink.
    pub fn unsealed(pages: u64) -> Self {
        Self::without_seal(3, Self::ODD_GPA, pages, 0x5000)
    }

    /// Hands it over to the agent.
    pub fn add_to(&self, client: &Client) {
        let name = format!("block{}", self.id);
        let block = files::block(self.id, &name, self.fd.as_fd(), self.pages * PAGE_SIZE);
        client
            .add_block(BlockSpec {
                gpa: self.gpa,
                fd_offset: self.fd_offset,
                vmm_address: self.address(),
                ..block
            })
            .unwrap();
    }

    /// Writes a stamp without a mark in the log.
    pub fn write(&self, page: u64, stamp: u64) {
        rustix::io::pwrite(&self.fd, &stamp.to_le_bytes(), self.fd_offset + page * PAGE_SIZE)
            .unwrap();
    }

    /// Writes a stamp as a guest's device does: the mark comes after the write.
    pub fn write_and_mark(&self, client: &Client, page: u64, stamp: u64) {
        self.write(page, stamp);
        client.log().mark(PageRange::new(self.gpa / PAGE_SIZE + page, 1));
    }

    /// The stamp of a page.
    pub fn stamp(&self, page: u64) -> u64 {
        let mut bytes = [0; 8];
        assert_eq!(
            rustix::io::pread(&self.fd, &mut bytes, self.fd_offset + page * PAGE_SIZE).unwrap(),
            8
        );
        u64::from_le_bytes(bytes)
    }

    /// True if the page is not allocated.
    pub fn is_hole(&self, page: u64) -> bool {
        files::is_hole(&self.fd, self.fd_offset + page * PAGE_SIZE).unwrap()
    }

    /// Frees pages, and tells nobody.
    pub fn punch(&self, first: u64, count: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(
            &self.fd,
            flags,
            self.fd_offset + first * PAGE_SIZE,
            count * PAGE_SIZE,
        )
        .unwrap();
    }

    /// Pages as a discard or a populate names them.
    pub fn range(&self, first: u64, count: u64) -> BlockRange {
        BlockRange { block: self.id, offset: first * PAGE_SIZE, length: count * PAGE_SIZE }
    }
}

/// All pages hold the same, and nothing is allocated at the destination that is not at the source.
pub fn assert_same(source: &Ram, destination: &Ram) {
    for page in 0..source.pages {
        assert_eq!(destination.stamp(page), source.stamp(page), "page {page}");
        assert!(
            destination.is_hole(page) || !source.is_hole(page),
            "page {page} is allocated at the destination alone"
        );
    }
}
