//! The blocks and the log of a session. The set that jobs see is replaced as a whole, and only while none runs.

use super::{Session, invalid};
use crate::memory::block::GuestLog;
use crate::memory::{Backing, Block, GuestMemory};
use pageferry_protocol::control::request::{ErrorCode, RemoteError};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, MAX_MEM_SLOTS};
use pageferry_protocol::shm::{DirtyLog, MappedBitmap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A block that a VMM offers.
#[derive(Debug)]
pub struct NewBlock {
    /// Where it lies in the guest.
    pub geometry: BlockGeometry,
    /// The file.
    pub memory: OwnedFd,
    /// Offset in the file in bytes.
    pub fd_offset: u64,
    /// Where the VMM has it mapped; 0 if nowhere.
    pub vmm_address: u64,
    /// The bitmap of discarded pages, if the VMM has one.
    pub bitmap: Option<OwnedFd>,
}

impl Session {
    /// Adds blocks, all or none; returns them.
    pub(super) fn add_blocks(&mut self, new: Vec<NewBlock>) -> Result<Vec<Arc<Block>>, RemoteError> {
        self.check_idle("memory cannot be added")?;
        let mut table = self.memory.table().clone();
        let mut added = Vec::new();
        for block in new {
            let id = block.geometry.id;
            table.insert(block.geometry.clone(), MAX_MEM_SLOTS).map_err(|error| invalid(&error))?;
            let made = make_block(block);
            added.push(Arc::new(made.map_err(|mut error| {
                error.sentence = format!("block {id}: {}", error.sentence);
                error
            })?));
        }
        self.replace([self.memory.blocks(), &added].concat(), table);
        Ok(added)
    }

    /// Removes the block with this id.
    pub(super) fn remove_block(&mut self, id: u32) -> Result<(), RemoteError> {
        self.check_idle("memory cannot be removed")?;
        let mut table = self.memory.table().clone();
        if table.remove(id).is_none() {
            return Err(RemoteError::new(ErrorCode::NotFound, format!("block {id} does not exist")));
        }
        let blocks = self.memory.blocks().iter().filter(|block| block.geometry.id != id).cloned().collect();
        self.replace(blocks, table);
        Ok(())
    }

    /// Removes all blocks.
    pub(super) fn clear_blocks(&mut self) -> Result<(), RemoteError> {
        self.check_idle("memory cannot be removed")?;
        self.replace(Vec::new(), BlockTable::new());
        Ok(())
    }

    /// Takes the log that lies in `length` bytes of `fd` from `offset`.
    pub(super) fn set_log(&mut self, fd: OwnedFd, offset: u64, length: u64) -> Result<(), RemoteError> {
        self.check_idle("the log cannot be changed")?;
        let log = DirtyLog::walkable(fd, offset, length).map_err(|error| {
            let RemoteError { code, sentence } = invalid(&error);
            RemoteError::new(code, format!("log: {sentence}"))
        })?;
        self.end_checkpoint("the dirty log was replaced");
        let log = Some(Arc::new(GuestLog::new(log)));
        self.memory = Arc::new(GuestMemory::new(self.memory.blocks().to_vec(), self.memory.table().clone(), log));
        Ok(())
    }

    fn replace(&mut self, blocks: Vec<Arc<Block>>, table: BlockTable) {
        self.end_checkpoint("blocks were added or removed");
        self.memory = Arc::new(GuestMemory::new(blocks, table, self.memory.log.clone()));
    }
}

fn make_block(new: NewBlock) -> Result<Block, RemoteError> {
    let NewBlock { geometry, memory, fd_offset, vmm_address, bitmap } = new;
    if fd_offset % pageferry_protocol::memory::PAGE_SIZE != 0 {
        let sentence = format!("fd_offset {fd_offset:#x} is not a multiple of the page size");
        return Err(RemoteError::new(ErrorCode::Invalid, sentence));
    }
    let backing = Backing::new(memory, fd_offset, geometry.length).map_err(|error| invalid(&error))?;
    if !backing.is_sealed() {
        log::debug!("block {}: the file has no F_SEAL_SHRINK; if it shrinks, migrations of it fail", geometry.id);
    }
    let pages = geometry.pages();
    let bitmap = bitmap.map(|fd| MappedBitmap::walkable(fd, pages)).transpose();
    let bitmap = bitmap.map_err(|error| {
        let RemoteError { code, sentence } = invalid(&error);
        RemoteError::new(code, format!("discard bitmap: {sentence}"))
    })?;
    Block::new(geometry, backing, vmm_address, bitmap).map_err(|error| invalid(&error))
}
