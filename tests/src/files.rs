// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files as guest memory, for tests that need nothing else of a VMM.

use crate::Error;
use pageferry_client::{
    BlockSpec, Client, HookChannel, HookError, Hooks, RunState, StatePiece, Trackers,
};
use pageferry_protocol::memory::PAGE_SIZE;
use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// A memfd of `size` bytes that cannot shrink. All of it is a hole.
///
/// # Errors
/// If the kernel refuses.
pub fn memfd(size: u64) -> Result<OwnedFd, Error> {
    let fd = unsealed_memfd("ram", size, MemfdFlags::empty())?;
    seal(&fd)?;
    Ok(fd)
}

/// A memfd that can still shrink and be sealed. `kind` gives its page size.
///
/// # Errors
/// If the kernel refuses.
pub fn unsealed_memfd(name: &str, size: u64, kind: MemfdFlags) -> Result<OwnedFd, Error> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | kind;
    let fd = rustix::fs::memfd_create(name, flags).map_err(Error::kernel("create a memfd"))?;
    rustix::fs::ftruncate(&fd, size).map_err(Error::kernel("size a memfd"))?;
    Ok(fd)
}

/// Seals a memfd against shrinking.
///
/// # Errors
/// If the kernel refuses.
pub fn seal(fd: &OwnedFd) -> Result<(), Error> {
    rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK).map_err(Error::kernel("seal a memfd"))
}

/// True if the page at `offset` is not allocated.
///
/// # Errors
/// If the kernel refuses.
pub fn is_hole(fd: impl AsFd, offset: u64) -> Result<bool, Error> {
    match rustix::fs::seek(fd, SeekFrom::Data(offset)) {
        Ok(data) => Ok(data >= offset + PAGE_SIZE),
        Err(Errno::NXIO) => Ok(true),
        Err(source) => Err(Error::Kernel { what: "look for allocated pages", source }),
    }
}

/// The first `length` bytes of a file as a block: populated, with a granularity of one page, at
/// guest address 0, and not mapped.
pub fn block<'a>(id: u32, name: &'a str, memory: BorrowedFd<'a>, length: u64) -> BlockSpec<'a> {
    BlockSpec {
        id,
        name,
        gpa: 0,
        length,
        memory,
        fd_offset: 0,
        vmm_address: 0,
        granularity: PAGE_SIZE,
        discarded: false,
    }
}

/// Mapped guest memory with one memfd for each (GPA, length).
///
/// # Errors
/// If the kernel refuses, or regions overlap.
pub fn mapped(regions: &[(u64, u64)]) -> Result<GuestMemoryMmap<()>, Error> {
    let region = |&(gpa, length): &(u64, u64)| {
        Ok((
            GuestAddress(gpa),
            length as usize,
            Some(FileOffset::new(File::from(memfd(length)?), 0)),
        ))
    };
    let regions = regions.iter().map(region).collect::<Result<Vec<_>, Error>>()?;
    GuestMemoryMmap::from_ranges_with_files(regions)
        .map_err(|error| Error::Memory(error.to_string()))
}

/// The hooks of a VMM whose guest is idle and has no state except its memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Still;

impl Still {
    /// Hands `length` bytes of `memory` to an agent as the only block.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn hand_over(
        client: &Client, channel: HookChannel, memory: impl AsFd, length: u64,
    ) -> Result<(), Error> {
        channel.spawn(Self)?;
        client.add_block(block(0, "ram", memory.as_fd(), length))?;
        // The guest writes nothing, so the log is complete.
        client.set_trackers(Trackers::LOG_IS_COMPLETE)?;
        Ok(())
    }
}

impl Hooks for Still {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }

    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(Vec::new())
    }

    fn load_state(&mut self, _: Vec<StatePiece>) -> Result<(), HookError> {
        Ok(())
    }
}
