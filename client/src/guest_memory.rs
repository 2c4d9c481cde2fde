// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Adding all regions of a [`GuestMemoryMmap`] at once.

use crate::block::BlockSpec;
use crate::client::Client;
use crate::error::Error;
use crate::vm_memory_bitmap::AttachLog;
use pageferry_protocol::memory::{PAGE_SIZE, pages_in};
use std::os::fd::AsFd;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

impl Client {
    /// Adds every region of `memory` as a block, and attaches its bitmap to the dirty log. Returns
    /// the ids of the blocks: 0, 1, ... in the order of the guest physical address. A block is
    /// named `ram@` and that address in hexadecimal; its granularity is its host page size.
    ///
    /// # Errors
    /// If a region has no file, its bitmap is attached to another log, or for the reasons of
    /// [`Client::add_block`]. No block is added then.
    pub fn add_guest_memory<B>(&self, memory: &GuestMemoryMmap<B>) -> Result<Vec<u32>, Error>
    where
        B: Bitmap + AttachLog + 'static,
    {
        let mut ids = Vec::new();
        for (id, region) in (0..).zip(memory.iter()) {
            if let Err(error) = self.add_region(id, region) {
                for id in ids {
                    // Nothing uses them yet. A job that was started in between is of no use without
                    // the rest.
                    let _ = self.remove_block(id);
                }
                return Err(error);
            }
            ids.push(id);
        }
        Ok(ids)
    }

    fn add_region<B>(&self, id: u32, region: &GuestRegionMmap<B>) -> Result<(), Error>
    where
        B: Bitmap + AttachLog,
    {
        let (gpa, length) = (region.start_addr().raw_value(), region.len());
        // The trait of the region has methods of the same names that return less.
        let mapping = region.get_mmap();
        let file = mapping.file_offset().ok_or(Error::RegionWithoutFile { gpa, length })?;
        let memory = file.file().as_fd();
        if !mapping.bitmap().attach_log(self.log(), pages_in(gpa)) {
            return Err(Error::BitmapAttached { gpa });
        }
        self.add_block(BlockSpec {
            id,
            name: &format!("ram@{gpa:#x}"),
            gpa,
            length,
            memory,
            fd_offset: file.start(),
            vmm_address: mapping.as_ptr() as u64,
            granularity: PAGE_SIZE,
            discarded: false,
        })
        .map(drop)
    }
}
