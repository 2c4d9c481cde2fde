// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Adding all regions of a [`GuestMemoryMmap`] at once.

use crate::blocks::MemoryRegion;
use crate::client::Client;
use crate::error::Error;
use crate::vm_memory_bitmap::AttachLog;
use pageferry_protocol::memory::pages_in;
use std::os::fd::AsFd;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

impl Client {
    /// Adds every region of `memory` as a block, and attaches its bitmap to the dirty log. Returns
    /// the ids of the blocks in the order of the guest physical addresses: 0, 1, ... in the first
    /// call. [`Client::add_blocks`] says more about ids and names.
    ///
    /// # Errors
    /// If a region has no file, its bitmap is attached to another log, or for the reasons of
    /// [`Client::add_blocks`]. No block is added then.
    pub fn add_guest_memory<B>(&self, memory: &GuestMemoryMmap<B>) -> Result<Vec<u32>, Error>
    where
        B: Bitmap + AttachLog + 'static,
    {
        let regions: Vec<_> =
            memory.iter().map(|region| self.attach(region)).collect::<Result<_, _>>()?;
        self.add_blocks(&regions)
    }

    /// Attaches the bitmap of a region to the log, and finds the file of the region.
    fn attach<'a, B>(&self, region: &'a GuestRegionMmap<B>) -> Result<MemoryRegion<'a>, Error>
    where
        B: Bitmap + AttachLog,
    {
        let (gpa, length) = (region.start_addr().raw_value(), region.len());
        let file = region.file_offset().ok_or(Error::RegionWithoutFile { gpa, length })?;
        // The trait of the region has a method `bitmap` that returns only a slice.
        let mapping = region.get_mmap();
        if !mapping.bitmap().attach_log(self.log(), pages_in(gpa)) {
            return Err(Error::BitmapAttached { gpa });
        }
        let (memory, fd_offset) = (file.file().as_fd(), file.start());
        Ok(MemoryRegion { gpa, length, vmm_address: mapping.as_ptr() as u64, memory, fd_offset })
    }
}
