// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Adding all regions of a [`GuestMemoryMmap`] at once.

use crate::blocks::MemoryRegion;
use crate::client::Client;
use crate::error::Error;
use crate::vm_memory_bitmap::AttachLog;
use pageferry_protocol::memory::pages_in;
use pageferry_protocol::shm::DirtyLog;
use std::os::fd::AsFd;
use std::sync::Arc;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

/// Guest memory whose regions can be handed to an agent: the [`GuestMemoryMmap`] of the `vm-memory`
/// that this crate is built with, which is [`pageferry_client::vm_memory`](crate::vm_memory).
///
/// The bitmap of its regions says how writes of devices are tracked ([`AttachLog`]). That of
/// `vm-memory` itself cannot mark the dirty log, so this does not compile:
///
/// ```compile_fail,E0277
/// use pageferry_client::vm_memory::GuestMemoryMmap;
/// use pageferry_client::vm_memory::bitmap::AtomicBitmap;
/// use pageferry_client::{Client, Error};
///
/// fn add(client: &Client, memory: &GuestMemoryMmap<AtomicBitmap>) -> Result<Vec<u32>, Error> {
///     client.add_guest_memory(memory)
/// }
/// ```
///
/// And neither does the memory of another version of `vm-memory`:
///
/// ```compile_fail,E0277
/// # mod other { pub struct GuestMemoryMmap; }
/// use other::GuestMemoryMmap; // of another version
/// use pageferry_client::{Client, Error};
///
/// fn add(client: &Client, memory: &GuestMemoryMmap) -> Result<Vec<u32>, Error> {
///     client.add_guest_memory(memory)
/// }
/// ```
///
/// Both compile with the right types:
///
/// ```
/// use pageferry_client::vm_memory::GuestMemoryMmap;
/// use pageferry_client::{Client, Error, LogBitmap};
///
/// fn add(client: &Client, memory: &GuestMemoryMmap<LogBitmap>) -> Result<Vec<u32>, Error> {
///     client.add_guest_memory(memory)
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not guest memory of vm-memory 0.18, with which pageferry-client is built",
    label = "not `pageferry_client::vm_memory::GuestMemoryMmap`",
    note = "a VMM with another version of vm-memory: use `pageferry_client::vm_memory`, or depend on vm-memory 0.18",
    note = "a VMM without vm-memory: use `Client::add_blocks`"
)]
pub trait GuestRegions {
    /// The regions in the order of the guest physical addresses. Attaches their bitmaps to `log`.
    ///
    /// # Errors
    /// If a region has no file, or its bitmap is attached to another log.
    fn attach(&self, log: &Arc<DirtyLog>) -> Result<Vec<MemoryRegion<'_>>, Error>;
}

impl<B> GuestRegions for GuestMemoryMmap<B>
where
    B: Bitmap + AttachLog + 'static,
{
    fn attach(&self, log: &Arc<DirtyLog>) -> Result<Vec<MemoryRegion<'_>>, Error> {
        self.iter().map(|region| attach(region, log)).collect()
    }
}

impl<M: GuestRegions> GuestRegions for Arc<M> {
    fn attach(&self, log: &Arc<DirtyLog>) -> Result<Vec<MemoryRegion<'_>>, Error> {
        M::attach(self, log)
    }
}

/// Attaches the bitmap of a region to the log, and finds the file of the region.
fn attach<'a, B>(
    region: &'a GuestRegionMmap<B>, log: &Arc<DirtyLog>,
) -> Result<MemoryRegion<'a>, Error>
where
    B: Bitmap + AttachLog,
{
    let (gpa, length) = (region.start_addr().raw_value(), region.len());
    let file = region.file_offset().ok_or(Error::RegionWithoutFile { gpa, length })?;
    // The trait of the region has a method `bitmap` that returns only a slice.
    let mapping = region.get_mmap();
    if !mapping.bitmap().attach_log(log, pages_in(gpa)) {
        return Err(Error::BitmapAttached { gpa });
    }
    let (memory, fd_offset) = (file.file().as_fd(), file.start());
    Ok(MemoryRegion { gpa, length, vmm_address: mapping.as_ptr() as u64, memory, fd_offset })
}

impl Client {
    /// Adds every region of `memory` as a block, and attaches its bitmap to the dirty log. Returns
    /// the ids of the blocks in the order of the guest physical addresses: 0, 1, ... in the first
    /// call. [`Client::add_blocks`] says more about ids and names.
    ///
    /// # Errors
    /// If a region has no file, its bitmap is attached to another log, or for the reasons of
    /// [`Client::add_blocks`]. No block is added then.
    pub fn add_guest_memory(&self, memory: &impl GuestRegions) -> Result<Vec<u32>, Error> {
        self.add_blocks(&memory.attach(self.log())?)
    }
}

#[cfg(test)]
mod tests {
    /// The message for another version names the one of the workspace, and an attribute takes no
    /// constant.
    #[test]
    fn the_message_names_the_version_that_is_used() {
        // Not in the package, so not `include_str`.
        let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
        let workspace = std::fs::read_to_string(workspace).unwrap();
        let line = workspace.lines().find(|line| line.starts_with("vm-memory = ")).unwrap();
        let version = line.split('"').nth(1).unwrap();
        let named = format!("vm-memory {version}");
        let source = include_str!("guest_memory.rs");
        let attribute = source.split("on_unimplemented(").nth(1).unwrap();
        assert_eq!(attribute.split(")]").next().unwrap().matches(&named).count(), 2, "{named}");
    }
}
