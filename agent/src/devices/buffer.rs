// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One buffer of a queue: a chain of descriptors, as the driver wrote it.
//!
//! Everything here comes from the guest: addresses and lengths may lie anywhere, and a chain may
//! be a circle. The library ends a chain after as many descriptors as its table has, and a table of
//! indirect descriptors can have 65535. The device does not offer those.

use super::guest_map::DeviceMemory;
use pageferry_protocol::memory::PageRange;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The memory of the front-end, as the library has mapped it.
pub type Mapped = GuestMemoryMmap<BitmapMmapRegion>;

/// The most descriptors of a queue, and so of a buffer.
pub const MAX_DESCRIPTORS: usize = 1024;
/// The most bytes of a buffer that a device reads.
pub const MAX_READ: u64 = 1 << 20;
/// The longest answer of a device.
const MAX_ANSWER: u64 = 64;

/// A piece of guest physical memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Address.
    pub gpa: u64,
    /// Length.
    pub length: u64,
}

/// A buffer.
#[derive(Debug)]
pub struct Buffer<'a> {
    mapped: &'a Mapped,
    head: u16,
    /// What the driver has written.
    readable: Vec<Piece>,
    /// What the device may write.
    writable: Vec<Piece>,
    answer: Vec<u8>,
}

impl<'a> Buffer<'a> {
    /// The buffer with these descriptors.
    ///
    /// # Errors
    /// If there are more than [`MAX_DESCRIPTORS`].
    pub fn new<M>(mapped: &'a Mapped, chain: DescriptorChain<M>) -> Result<Self, &'static str>
    where
        M: std::ops::Deref + Clone,
        M::Target: vm_memory::GuestMemory,
    {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        for descriptor in chain {
            if readable.len() + writable.len() == MAX_DESCRIPTORS {
                return Err("a buffer has more descriptors than a queue");
            }
            let piece = Piece { gpa: descriptor.addr().0, length: u64::from(descriptor.len()) };
            if descriptor.is_write_only() {
                writable.push(piece);
            } else {
                readable.push(piece);
            }
        }
        Ok(Self { mapped, head, readable, writable, answer: Vec::new() })
    }

    /// The index of its first descriptor, by which the driver knows it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may write.
    pub fn writable(&self) -> &[Piece] {
        &self.writable
    }

    /// What the driver has written, up to `most` bytes. `None` if it does not lie in memory.
    pub fn read(&self, most: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        for piece in &self.readable {
            let left = most - bytes.len();
            if left == 0 {
                break;
            }
            let length = left.min(usize::try_from(piece.length).unwrap_or(most));
            let start = bytes.len();
            bytes.resize(start + length, 0);
            self.mapped.read_slice(&mut bytes[start..], GuestAddress(piece.gpa)).ok()?;
        }
        Some(bytes)
    }

    /// The pages that the device reads or writes: what the driver has written, up to
    /// [`MAX_READ`], and the first [`MAX_ANSWER`] bytes for its answer. A free page that the driver
    /// names is among the latter, and most of them are not touched.
    pub(super) fn touched_pages(&self, view: &DeviceMemory<'_>) -> Vec<(usize, PageRange)> {
        let mut pages = Vec::new();
        let mut add = |pieces: &[Piece], most: u64| {
            let mut left = most;
            for piece in pieces {
                let length = piece.length.min(left);
                pages.extend(view.pages(piece.gpa, length));
                left -= length;
            }
        };
        add(&self.readable, MAX_READ);
        if !self.readable.is_empty() {
            add(&self.writable, MAX_ANSWER);
        }
        pages
    }

    /// Sets the answer of the device, which is written when the buffer is returned. False, and no
    /// answer, if there is no room for it.
    pub fn set_answer(&mut self, answer: &[u8]) -> bool {
        let room: u64 = self.writable.iter().map(|piece| piece.length).sum();
        let fits = answer.len() as u64 <= room;
        if fits {
            self.answer = answer.to_vec();
        }
        fits
    }

    /// The parts of the answer, and where they go.
    pub(super) fn answer(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let mut rest = &self.answer[..];
        self.writable.iter().map_while(move |piece| {
            let length = rest.len().min(usize::try_from(piece.length).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at(length);
            rest = later;
            (!now.is_empty()).then_some((piece.gpa, now))
        })
    }

    /// Writes the answer. Returns how many bytes lie in memory. Only inside of
    /// [`GuestMemory::write_by_device`](crate::memory::GuestMemory::write_by_device).
    pub(super) fn write_answer(&self) -> u32 {
        let mut written = 0;
        for (gpa, bytes) in self.answer() {
            if self.mapped.write_slice(bytes, GuestAddress(gpa)).is_err() {
                break;
            }
            written += bytes.len() as u32;
        }
        written
    }
}
