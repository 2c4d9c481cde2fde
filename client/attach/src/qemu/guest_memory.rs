// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Finds the guest's memory in a QEMU: which blocks there are, and their files.
//!
//! QEMU tells its RAM blocks and where the guest sees them ([`super::ram_layout`]). The kernel
//! tells which file is mapped at the address of each (`/proc/PID/maps`).

use super::monitor::{Monitor, MonitorError};
use super::ram_layout::{self, GuestRam};
use super::suitability::DEVICE_FOLDERS;
use crate::process::mappings::{Mapping, Mappings};
use crate::process::target::{ProcessError, TargetProcess};
use pageferry_client::BlockSpec;
use rustix::fs::Dev;
use rustix::io::Errno;
use serde_json::{Value, json};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Unit of the ids of blocks, in bytes of guest physical addresses.
const ID_UNIT: u64 = 1 << 20;

/// Why the guest's memory cannot be handed over.
#[derive(Debug, thiserror::Error)]
pub enum GuestMemoryError {
    /// The monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// What QEMU says about its memory is not understood.
    #[error("QEMU's account of its memory")]
    Layout(#[from] ram_layout::Error),
    /// QEMU has no memory that is shared.
    #[error(
        "QEMU has no guest memory in shared files: start it with `pageferry qemu run`, or with -object \
         memory-backend-file,id=ram,size=SIZE,share=on,mem-path=/dev/shm/FILE -machine memory-backend=ram"
    )]
    NoSharedMemory,
    /// A RAM block is not mapped as one file.
    #[error(
        "RAM block {block} of QEMU: a part of {hva:#x} + {length:#x} is no mapping of its file"
    )]
    NotOneFile {
        /// The name of the block.
        block: String,
        /// Its address in QEMU.
        hva: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// Another process serves the file.
    #[error(
        "the file of RAM block {block} is the memory of a guest that pageferry serves already: give each QEMU a file \
         of its own (mem-path)"
    )]
    ServedAlready {
        /// The name of the block.
        block: String,
    },
    /// The file cannot be opened or locked.
    #[error("cannot lock the file of RAM block {block}")]
    NotClaimed {
        /// The name of the block.
        block: String,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// Blocks get their ids from their addresses.
    #[error(
        "RAM block {block} of QEMU is at guest address {gpa:#x}, in the same MiB as another one"
    )]
    SameId {
        /// The name of the block.
        block: String,
        /// Its guest physical address.
        gpa: u64,
    },
}

/// A block of guest memory, and its file.
#[derive(Debug)]
pub(super) struct FoundBlock {
    pub(super) ram: GuestRam,
    id: u32,
    name: String,
    file: OwnedFd,
    fd_offset: u64,
    /// Device and inode of the file.
    file_id: (Dev, u64),
}

impl FoundBlock {
    pub(super) fn spec(&self) -> BlockSpec<'_> {
        BlockSpec {
            id: self.id,
            name: &self.name,
            gpa: self.ram.gpa,
            length: self.ram.length,
            memory: self.file.as_fd(),
            fd_offset: self.fd_offset,
            vmm_address: self.ram.hva,
            granularity: 4096,
            discarded: false,
        }
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Device and inode of the file.
    pub(super) fn file_id(&self) -> (Dev, u64) {
        self.file_id
    }

    /// True if both are the same memory: the same RAM block at the same address, in the same file.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let place = |block: &Self| (block.id, block.file_id, block.fd_offset);
        place(self) == place(other) && self.ram == other.ram
    }

    /// True if QEMU still maps this file there. Memory that was taken out and put in again has
    /// another file.
    pub(super) fn is_mapped(&self, mappings: &Mappings) -> bool {
        file_of(mappings, &self.ram).is_ok_and(|(first, fd_offset)| {
            ((first.device, first.inode), fd_offset) == (self.file_id, self.fd_offset)
        })
    }
}

/// The id of the block at a guest physical address. Both ends of a migration have to choose the
/// same ids, also for memory that was plugged in later, so an id is the number of the MiB where the
/// block begins.
pub(super) fn id_at(gpa: u64) -> Option<u32> {
    u32::try_from(gpa / ID_UNIT).ok()
}

/// A short account of QEMU's memory and devices that changes when one is plugged in or out.
pub(super) fn account(monitor: &mut Monitor) -> Result<Value, MonitorError> {
    let mut devices = monitor.command("query-memory-devices", Value::Null)?;
    // The plugged size of virtio-mem changes with every request of the guest.
    for device in devices.as_array_mut().into_iter().flatten() {
        if let Some(fields) = device.get_mut("data").and_then(Value::as_object_mut) {
            fields.remove("size");
            fields.remove("requested-size");
        }
    }
    let mut account = vec![devices, monitor.command("query-memdev", Value::Null)?];
    for folder in DEVICE_FOLDERS {
        account.push(monitor.command("qom-list", json!({ "path": folder }))?);
    }
    Ok(Value::Array(account))
}

/// The guest's memory as it is now.
pub(super) fn find(
    monitor: &mut Monitor, process: &TargetProcess,
) -> Result<Vec<FoundBlock>, GuestMemoryError> {
    let mappings = process.mappings()?;
    let ram = layout(monitor, &mappings)?;
    if ram.is_empty() {
        return Err(GuestMemoryError::NoSharedMemory);
    }
    let mut found: Vec<FoundBlock> = Vec::new();
    for ram in ram {
        let (first, fd_offset) = file_of(&mappings, &ram)?;
        let file = process.descriptor_of(first.device, first.inode)?;
        let id = id_at(ram.gpa).filter(|id| found.iter().all(|other| other.id != *id));
        let same_id = || GuestMemoryError::SameId { block: ram.block.clone(), gpa: ram.gpa };
        let id = id.ok_or_else(same_id)?;
        let name = format!("{}@{:#x}", ram.block, ram.block_offset);
        let file_id = (first.device, first.inode);
        found.push(FoundBlock { id, name, file, fd_offset, file_id, ram });
    }
    Ok(found)
}

fn layout(monitor: &mut Monitor, mappings: &Mappings) -> Result<Vec<GuestRam>, GuestMemoryError> {
    let ram_blocks = ram_layout::parse_ram_blocks(&monitor.human("info ramblock")?)?;
    let flat_view = ram_layout::parse_flat_view(&monitor.human("info mtree -f")?)?;
    let devices = monitor.command("query-memory-devices", Value::Null)?;
    let devices = ram_layout::parse_devices(&devices)?;
    let is_shared = |hva: u64| {
        let mapping = mappings.iter().find(|mapping| (mapping.start..mapping.end).contains(&hva));
        mapping.is_some_and(|mapping| mapping.shared && mapping.inode != 0)
    };
    Ok(ram_layout::guest_ram(&ram_blocks, &flat_view, &devices, is_shared)?)
}

/// The first mapping of a part of a RAM block, and where the part begins in the file. All of it
/// must be mapped from that file, in order.
fn file_of<'a>(
    mappings: &'a Mappings, ram: &GuestRam,
) -> Result<(&'a Mapping, u64), GuestMemoryError> {
    let broken = || GuestMemoryError::NotOneFile {
        block: ram.block.clone(),
        hva: ram.hva,
        length: ram.length,
    };
    let end = ram.hva.checked_add(ram.length).ok_or_else(broken)?;
    let at = |address: u64| {
        mappings.iter().find(|mapping| (mapping.start..mapping.end).contains(&address))
    };
    let first = at(ram.hva).ok_or_else(broken)?;
    let fd_offset = first.offset + (ram.hva - first.start);
    let mut next = ram.hva;
    while next < end {
        let mapping = at(next).ok_or_else(broken)?;
        let is_same = (mapping.device, mapping.inode) == (first.device, first.inode);
        let follows = mapping.offset + (next - mapping.start) == fd_offset + (next - ram.hva);
        if !mapping.shared || !is_same || !follows {
            return Err(broken());
        }
        next = mapping.end;
    }
    Ok((first, fd_offset))
}
