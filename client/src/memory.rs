// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest memory as the client keeps it: the dirty log and the blocks. All of it survives the
//! agent.
//!
//! # Locks
//!
//! The lock of the session comes before this lock. A thread holds this one only to look something
//! up or to insert it, and never while it waits. So the hook channel may take it at any time.

use crate::addresses::AddressMap;
use crate::block::{Block, BlockSpec};
use crate::error::Error;
use crate::mapped_file::check_private_mapping;
use crate::mapping_process::{MappingProcess, Userfaults};
use crate::memfd::sealed_memfd;
use crate::private_memory::PrivateMemory;
use crate::registration::Registered;
use crate::sync::lock;
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::{BlockGeometry, BlockTable, MAX_MEM_SLOTS, PAGE_SIZE};
use pageferry_protocol::shm::DirtyLog;
use pageferry_protocol::userfault::UserfaultSource;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

/// The dirty log and the blocks.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) log_fd: OwnedFd,
    pub(crate) log: Arc<DirtyLog>,
    /// For the registrations of the mappings of the blocks.
    pub(crate) userfaults: Arc<Userfaults>,
    /// The registration that the mappings have now.
    pub(crate) registered: Arc<Registered>,
    /// Bytes of the guest physical address space that the log covers.
    covers: u64,
    blocks: Mutex<Blocks>,
}

#[derive(Debug, Default)]
struct Blocks {
    /// Checks each new block against the others.
    table: BlockTable,
    by_id: BTreeMap<u32, Arc<Block>>,
    by_gpa: AddressMap,
    /// Those that are mapped.
    by_vmm_address: AddressMap,
}

impl Memory {
    /// A log that covers `covers` bytes of guest physical addresses, and no blocks. `mapped_by` is
    /// the process that maps the blocks; `None` for this one.
    pub(crate) fn new(
        covers: u64, mapped_by: Option<Arc<dyn MappingProcess>>,
    ) -> Result<Self, Error> {
        let userfaults =
            mapped_by.map_or_else(|| Userfaults::Own(UserfaultSource::new()), Userfaults::Of);
        // Whole pages of log: a page holds 32,768 bits, which is 128 MiB of guest.
        let length = covers.div_ceil(PAGE_SIZE).div_ceil(8).max(1).next_multiple_of(PAGE_SIZE);
        let log_fd = sealed_memfd("pageferry-log", length)?;
        let log = DirtyLog::map(log_fd.as_fd(), 0, length)
            .map_err(|source| Error::Mapping { what: "dirty log", source })?;
        Ok(Self {
            log_fd,
            covers: log.pages() * PAGE_SIZE,
            log: Arc::new(log),
            userfaults: Arc::new(userfaults),
            registered: Arc::default(),
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

    /// The ranges of blocks at these guest physical addresses.
    pub(crate) fn guest_ranges(&self, gpa: u64, length: u64) -> Result<Vec<BlockRange>, Error> {
        self.blocks().by_gpa.ranges(gpa, length).map_err(|gap| gap.error("guest", gpa, length))
    }

    /// The ranges of blocks at these addresses of the VMM.
    pub(crate) fn host_ranges(&self, address: u64, length: u64) -> Result<Vec<BlockRange>, Error> {
        let ranges = self.blocks().by_vmm_address.ranges(address, length);
        ranges.map_err(|gap| gap.error("host", address, length))
    }

    /// The `count` lowest ids that no block has.
    pub(crate) fn unused_ids(&self, count: usize) -> Vec<u32> {
        let blocks = self.blocks();
        (0..=u32::MAX).filter(|id| !blocks.by_id.contains_key(id)).take(count).collect()
    }

    /// Checks a new block against the log, its file and the other blocks, and adds it. The caller
    /// has locked the session. A clone's block is a private mapping.
    pub(crate) fn add(&self, spec: &BlockSpec<'_>, is_clone: bool) -> Result<Arc<Block>, Error> {
        let geometry = BlockGeometry {
            id: spec.id,
            name: spec.name.to_owned(),
            gpa: spec.gpa,
            length: spec.length,
            granularity: spec.granularity,
        };
        self.blocks().reserve(&geometry, spec.vmm_address, self.covers)?;
        // Without the lock: this asks the kernel.
        let made = match is_clone {
            false => Block::new(geometry, spec),
            true => self.new_clone(geometry, spec),
        };
        let block = match made {
            Ok(block) => Arc::new(block),
            Err(error) => {
                self.forget(spec.id);
                return Err(error);
            }
        };
        self.blocks().by_id.insert(spec.id, Arc::clone(&block));
        Ok(block)
    }

    fn new_clone(&self, geometry: BlockGeometry, spec: &BlockSpec<'_>) -> Result<Block, Error> {
        let id = spec.id;
        match *self.userfaults {
            Userfaults::Of(_) => return Err(Error::ForeignClone { id }),
            Userfaults::Own(_) if spec.vmm_address == 0 => return Err(Error::NotMapped { id }),
            Userfaults::Own(_) => {}
        }
        check_private_mapping(spec)?;
        let place = (spec.vmm_address, spec.length);
        let memory = PrivateMemory::new(spec.name, place, &self.userfaults, &self.registered);
        memory.check()?;
        Block::new_clone(geometry, spec, memory)
    }

    /// Removes the block.
    pub(crate) fn forget(&self, id: u32) {
        let mut blocks = self.blocks();
        blocks.table.remove(id);
        blocks.by_id.remove(&id);
        blocks.by_gpa.remove(id);
        blocks.by_vmm_address.remove(id);
    }
}

impl Blocks {
    /// Reserves the id, the name and the addresses of a block. Changes nothing if they are taken.
    fn reserve(
        &mut self, geometry: &BlockGeometry, vmm_address: u64, covers: u64,
    ) -> Result<(), Error> {
        let BlockGeometry { id, gpa, length, .. } = *geometry;
        self.table.insert(geometry.clone(), MAX_MEM_SLOTS)?;
        let checked = if gpa + length > covers {
            Err(Error::OutsideLog { id, gpa, length, covers })
        } else {
            self.check_mapping(id, vmm_address, length)
        };
        if let Err(error) = checked {
            self.table.remove(id);
            return Err(error);
        }
        self.by_gpa.insert(gpa, length, id);
        if vmm_address != 0 {
            self.by_vmm_address.insert(vmm_address, length, id);
        }
        Ok(())
    }

    /// An address of the VMM belongs to one block at most: a fault there must have one meaning.
    fn check_mapping(&self, id: u32, vmm_address: u64, length: u64) -> Result<(), Error> {
        if vmm_address == 0 {
            return Ok(());
        }
        if vmm_address.checked_add(length).is_none() {
            return Err(Error::MappingOverflow { id, vmm_address, length });
        }
        match self.by_vmm_address.overlapping(vmm_address, length) {
            Some(other) => Err(Error::MappingOverlap { id, vmm_address, length, other }),
            None => Ok(()),
        }
    }
}
