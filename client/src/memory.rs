// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest memory as the client keeps it: the dirty log and the blocks. All of it survives the
//! agent.
//!
//! # Locks
//!
//! The lock of the session comes before this lock. A thread holds this one only to look something
//! up or to insert it, and never while it waits. So the hook channel may take it at any time.

use crate::block::Block;
use crate::error::Error;
use crate::memfd::sealed_memfd;
use crate::sync::lock;
use pageferry_protocol::memory::{BlockGeometry, BlockTable, MAX_MEM_SLOTS, PAGE_SIZE};
use pageferry_protocol::shm::DirtyLog;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

/// The dirty log and the blocks.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) log_fd: OwnedFd,
    pub(crate) log: Arc<DirtyLog>,
    /// Bytes of the guest physical address space that the log covers.
    covers: u64,
    blocks: Mutex<Blocks>,
}

#[derive(Debug, Default)]
struct Blocks {
    /// Checks each new block against the others.
    table: BlockTable,
    by_id: BTreeMap<u32, Arc<Block>>,
}

impl Memory {
    /// A log that covers `covers` bytes of guest physical addresses, and no blocks.
    pub(crate) fn new(covers: u64) -> Result<Self, Error> {
        // Whole pages of log: a page holds 32,768 bits, which is 128 MiB of guest.
        let length = covers.div_ceil(PAGE_SIZE).div_ceil(8).max(1).next_multiple_of(PAGE_SIZE);
        let log_fd = sealed_memfd("pageferry-log", length)?;
        let log = DirtyLog::map(log_fd.as_fd(), 0, length)
            .map_err(|source| Error::Mapping { what: "dirty log", source })?;
        Ok(Self {
            log_fd,
            covers: log.pages() * PAGE_SIZE,
            log: Arc::new(log),
            blocks: Mutex::default(),
        })
    }

    /// Length of the file of the log in bytes.
    pub(crate) fn log_bytes(&self) -> u64 {
        self.log.pages() / 8
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        lock(&self.blocks)
    }

    /// The block with this id.
    pub(crate) fn block(&self, id: u32) -> Option<Arc<Block>> {
        self.blocks().by_id.get(&id).cloned()
    }

    /// All blocks in the order of their ids.
    pub(crate) fn all(&self) -> Vec<Arc<Block>> {
        self.blocks().by_id.values().cloned().collect()
    }

    /// Checks a new block against the log and the other blocks, and reserves its id and range.
    pub(crate) fn reserve(&self, geometry: &BlockGeometry) -> Result<(), Error> {
        self.blocks().table.insert(geometry.clone(), MAX_MEM_SLOTS)?;
        let BlockGeometry { id, gpa, length, .. } = *geometry;
        if gpa + length > self.covers {
            self.forget(id);
            return Err(Error::OutsideLog { id, gpa, length, covers: self.covers });
        }
        Ok(())
    }

    /// Inserts a block that was reserved.
    pub(crate) fn insert(&self, block: Arc<Block>) {
        self.blocks().by_id.insert(block.geometry.id, block);
    }

    /// Removes the block and its reservation.
    pub(crate) fn forget(&self, id: u32) {
        let mut blocks = self.blocks();
        blocks.table.remove(id);
        blocks.by_id.remove(&id);
    }
}
