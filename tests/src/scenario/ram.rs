// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory whose pages hold stamps.

use super::SOON;
use crate::deadline::wait_until;
use crate::files;
use crate::guest_mapping::GuestMapping;
use crate::huge_pages::make_all_huge;
use pageferry_client::{BlockRange, BlockSpec, Client};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use rustix::fs::{FallocateFlags, MemfdFlags};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use vm_memory::bitmap::Bitmap;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, WriteVolatile};

/// A block of guest memory. Each page holds a stamp in its first bytes.
#[derive(Debug)]
pub struct Ram {
    /// Its id.
    pub id: u32,
    /// Its guest physical address.
    pub gpa: u64,
    /// Its number of pages.
    pub pages: u64,
    /// Its offset in its file.
    pub fd_offset: u64,
    /// Its file.
    pub fd: OwnedFd,
    /// The mapping through which a guest would touch it. Most tests need none.
    mapping: Option<Arc<MmapRegion>>,
    /// The same, at an address at which the kernel can map huge pages.
    huge: Option<GuestMapping>,
}

/// A read of a page on its own thread, which may wait for a fault.
#[derive(Debug)]
pub struct Touch(JoinHandle<std::io::Result<u64>>);

impl Touch {
    /// Reads a page of this mapping through the kernel, as a device does.
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

    /// True while the read waits.
    pub fn waits(&self) -> bool {
        !self.0.is_finished()
    }

    /// The stamp that was found.
    ///
    /// # Errors
    /// EFAULT if a guest would get SIGBUS.
    pub fn found(self) -> std::io::Result<u64> {
        wait_until("the touch to be answered", SOON, || self.0.is_finished()).unwrap();
        self.0.join().unwrap()
    }
}

impl Ram {
    /// A memfd that cannot shrink. All of it is a hole.
    pub fn new(id: u32, gpa: u64, pages: u64, fd_offset: u64) -> Self {
        let ram = Self::without_seal(id, gpa, pages, fd_offset);
        files::seal(&ram.fd).unwrap();
        ram
    }

    fn without_seal(id: u32, gpa: u64, pages: u64, fd_offset: u64) -> Self {
        let fd = files::unsealed_memfd("ram", fd_offset + pages * PAGE_SIZE, MemfdFlags::empty())
            .unwrap();
        Self { id, gpa, pages, fd_offset, fd, mapping: None, huge: None }
    }

    /// The same memory, mapped.
    pub fn mapped(mut self) -> Self {
        let file = FileOffset::new(File::from(self.fd.try_clone().unwrap()), self.fd_offset);
        self.mapping =
            Some(Arc::new(MmapRegion::from_file(file, (self.pages * PAGE_SIZE) as usize).unwrap()));
        self
    }

    /// Memory that begins at this page of its file, in huge pages. `None`, and says so, if this
    /// kernel makes none. Page `n` holds a stamp, `1000 + n`.
    pub fn huge(first: u64, pages: u64) -> Option<Self> {
        let mut ram = Self::new(3, Self::ODD_GPA, pages, first * PAGE_SIZE);
        let file = File::from(ram.fd.try_clone().unwrap());
        if !make_all_huge(&file).unwrap() {
            return None;
        }
        let length = file.metadata().unwrap().len();
        ram.huge = Some(GuestMapping::new(&file, length as usize).unwrap());
        Some(ram.stamped())
    }

    /// Writes a stamp as the guest does, through the mapping of [`Ram::huge`].
    pub fn store(&self, page: u64, stamp: u64) {
        let byte = self.fd_offset + page * PAGE_SIZE;
        let word = self.huge.as_ref().unwrap().word(byte as usize);
        word.store(stamp, Ordering::Relaxed);
    }

    /// The address of its mapping, or 0.
    pub fn address(&self) -> u64 {
        if let Some(huge) = &self.huge {
            return huge.address() + self.fd_offset;
        }
        self.mapping.as_ref().map_or(0, |mapping| mapping.as_ptr() as u64)
    }

    /// Reads a page through the kernel, as a device does. It waits like a guest, but a lost page is
    /// an error instead of a signal.
    pub fn touch(&self, page: u64) -> Touch {
        Touch::of(self.mapping.clone().unwrap(), page)
    }

    /// The guest physical address of [`Ram::odd`].
    pub const ODD_GPA: u64 = 0x7000;

    /// A block whose address and file offset fit no word of a bitmap.
    pub fn odd(pages: u64) -> Self {
        Self::new(3, Self::ODD_GPA, pages, 0x5000)
    }

    /// Such a block, whose page `n` holds the stamp `1000 + n`.
    pub fn stamped(self) -> Self {
        (0..self.pages).for_each(|page| self.write(page, 1000 + page));
        self
    }

    /// Like [`Ram::new`], with a file that can shrink.
    pub fn unsealed(pages: u64) -> Self {
        Self::without_seal(3, Self::ODD_GPA, pages, 0x5000)
    }

    /// Adds it to the agent.
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

    /// Writes a stamp like a device: the mark comes after the write.
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

    /// Punches a hole without a message to the agent.
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

    /// The byte range of pages, for a discard or a populate.
    pub fn range(&self, first: u64, count: u64) -> BlockRange {
        BlockRange { block: self.id, offset: first * PAGE_SIZE, length: count * PAGE_SIZE }
    }
}

/// Checks that all pages are the same, and that only pages that are allocated at the source are
/// allocated at the destination.
pub fn assert_same(source: &Ram, destination: &Ram) {
    for page in 0..source.pages {
        assert_eq!(destination.stamp(page), source.stamp(page), "page {page}");
        assert!(
            destination.is_hole(page) || !source.is_hole(page),
            "page {page} is allocated at the destination alone"
        );
    }
}
