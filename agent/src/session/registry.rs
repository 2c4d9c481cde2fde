// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The blocks and the dirty log of a session: adding and removing them.
//!
//! A job holds a reference to a [`GuestMemory`], which never changes. To change a block or the log,
//! this file makes a new `GuestMemory` and puts it into the session. It refuses that while a job
//! runs, so a job and its session always have the same memory.

use super::shared::{DeferredDrop, SharedSession};
use super::{Session, invalid};
use crate::memory::block::GuestLog;
use crate::memory::clone_view::CloneView;
use crate::memory::current::CurrentAgent;
use crate::memory::{Backing, Block, GuestMemory};
use crate::waiting::may_wait;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, MAX_MEM_SLOTS};
use pageferry_protocol::shm::{DirtyLog, MappedBitmap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A block that a VMM offers.
#[derive(Debug)]
pub struct NewBlock {
    /// Its id, its name, and its place in the guest.
    pub geometry: BlockGeometry,
    /// The file.
    pub memory: OwnedFd,
    /// Offset in the file in bytes.
    pub fd_offset: u64,
    /// The address at which the VMM has mapped it; 0 if it is not mapped.
    pub vmm_address: u64,
    /// The bitmap of discarded pages, if the VMM has one.
    pub bitmap: Option<OwnedFd>,
    /// The bitmap of owed pages, if the VMM has one.
    pub owed: Option<OwnedFd>,
    /// The memory of a clone, whose base is `memory`.
    pub clone: Option<CloneView>,
}

impl SharedSession {
    /// Adds all of these blocks, or none, and returns them. Checks their files without the lock,
    /// because a file system may be slow.
    pub(super) fn add_blocks(&self, new: Vec<NewBlock>) -> Result<Vec<Arc<Block>>, RemoteError> {
        let geometries: Vec<BlockGeometry> =
            new.iter().map(|block| block.geometry.clone()).collect();
        self.lock().table_with(&geometries)?;
        let made = new.into_iter().map(|block| {
            let id = block.geometry.id;
            make_block(block).map(Arc::new).map_err(|mut error| {
                error.sentence = format!("block {id}: {}", error.sentence);
                error
            })
        });
        let added = made.collect::<Result<Vec<_>, _>>()?;
        // Only this connection changes blocks, but another one may have started a job meanwhile. So
        // the check is repeated.
        let mut session = self.lock();
        let table = session.table_with(&geometries)?;
        let blocks = [session.memory.blocks(), &added].concat();
        session.replace(blocks, table);
        Ok(added)
    }

    /// Sets the dirty log: `length` bytes of `fd` from `offset` on.
    pub(super) fn set_log(&self, fd: OwnedFd, offset: u64, length: u64) -> Result<(), RemoteError> {
        self.lock().check_idle("the log cannot be changed")?;
        may_wait("map the dirty log");
        let log = DirtyLog::map_sparse(fd, offset, length).map_err(|error| {
            let RemoteError { code, sentence } = invalid(&error);
            RemoteError::new(code, format!("log: {sentence}"))
        })?;
        let mut session = self.lock();
        session.check_idle("the log cannot be changed")?;
        session.end_checkpoint("the dirty log was replaced");
        let log = Some(Arc::new(GuestLog::new(log)));
        let (blocks, table) = (session.memory.blocks().to_vec(), session.memory.table().clone());
        session.set_memory(GuestMemory::new(blocks, table, log));
        Ok(())
    }
}

impl Session {
    /// The table of all blocks, with `new` added.
    fn table_with(&self, new: &[BlockGeometry]) -> Result<BlockTable, RemoteError> {
        self.check_idle("memory cannot be added")?;
        let mut table = self.memory.table().clone();
        for geometry in new {
            table.insert(geometry.clone(), MAX_MEM_SLOTS).map_err(|error| invalid(&error))?;
        }
        Ok(table)
    }

    /// Removes the block with this id. A device may still be changing it: see
    /// [`SharedSession::wait_for_devices`].
    pub(super) fn remove_block(&mut self, id: u32) -> Result<(), RemoteError> {
        self.check_idle("memory cannot be removed")?;
        let mut table = self.memory.table().clone();
        if table.remove(id).is_none() {
            return Err(RemoteError::new(
                ErrorCode::NotFound,
                format!("block {id} does not exist"),
            ));
        }
        let blocks =
            self.memory.blocks().iter().filter(|block| block.geometry.id != id).cloned().collect();
        self.replace(blocks, table);
        Ok(())
    }

    /// Removes all blocks. A device may still be changing them, as in [`Session::remove_block`].
    pub(super) fn clear_blocks(&mut self) -> Result<(), RemoteError> {
        self.check_idle("memory cannot be removed")?;
        self.replace(Vec::new(), BlockTable::new());
        Ok(())
    }

    /// Sets the fence: from now on `current` says whether this agent may act.
    pub(super) fn fence(&mut self, current: CurrentAgent) -> Result<(), RemoteError> {
        self.check_idle("the fence cannot be set")?;
        if self.memory.current.is_fenced() {
            let sentence = "features: bit 0, fence, came with an earlier hello already";
            return Err(RemoteError::new(ErrorCode::State, sentence));
        }
        let (blocks, table) = (self.memory.blocks().to_vec(), self.memory.table().clone());
        let memory = GuestMemory::new(blocks, table, self.memory.log.clone());
        let memory = memory.following(&self.memory).owned_by(Arc::new(current));
        self.memory = Arc::new(memory);
        Ok(())
    }

    fn replace(&mut self, blocks: Vec<Arc<Block>>, table: BlockTable) {
        self.end_checkpoint("blocks were added or removed");
        self.set_memory(GuestMemory::new(blocks, table, self.memory.log.clone()));
    }

    /// Sets the memory. The old memory is dropped on another thread, because to drop the last
    /// reference may free a guest's memory.
    pub(super) fn set_memory(&mut self, memory: GuestMemory) {
        let memory = memory.following(&self.memory);
        let before = std::mem::replace(&mut self.memory, Arc::new(memory));
        self.retired.push(DeferredDrop::Memory(before));
    }
}

fn make_block(new: NewBlock) -> Result<Block, RemoteError> {
    may_wait("check a block's file");
    let NewBlock { geometry, memory, fd_offset, vmm_address, bitmap, owed, clone } = new;
    if fd_offset % pageferry_protocol::memory::PAGE_SIZE != 0 {
        let sentence = format!("fd_offset {fd_offset:#x} is not a multiple of the page size");
        return Err(RemoteError::new(ErrorCode::Invalid, sentence));
    }
    let is_clone = clone.is_some();
    let end = vmm_address.checked_add(geometry.length);
    if is_clone && (vmm_address == 0 || end.is_none_or(|end| end > i64::MAX as u64)) {
        let sentence = format!(
            "vmm_address is {vmm_address:#x}, allowed for a clone is where {:#x} bytes are mapped",
            geometry.length
        );
        return Err(RemoteError::new(ErrorCode::Invalid, sentence));
    }
    let backing = match clone {
        None => Backing::new(memory, fd_offset, geometry.length),
        Some(view) => Backing::of_clone(memory, fd_offset, geometry.length, view),
    };
    let backing = backing.map_err(|error| invalid(&error))?;
    if !backing.is_sealed() && !is_clone {
        log::debug!(
            "block {}: the file has no F_SEAL_SHRINK; if it shrinks, migrations of it fail",
            geometry.id
        );
    }
    let pages = geometry.pages();
    let map = |what, fd: Option<OwnedFd>| {
        let mapped = fd.map(|fd| MappedBitmap::shared_sparse(fd, pages)).transpose();
        mapped.map_err(|error| {
            let RemoteError { code, sentence } = invalid(&error);
            RemoteError::new(code, format!("{what}: {sentence}"))
        })
    };
    let (bitmap, owed) = (map("discard bitmap", bitmap)?, map("bitmap of owed pages", owed)?);
    let block = Block::new(geometry, backing, vmm_address, bitmap);
    let block = block.map_err(|error| invalid(&error))?;
    Ok(match owed {
        Some(owed) => block.owing(owed),
        None => block,
    })
}
