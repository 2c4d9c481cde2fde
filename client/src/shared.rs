//! Memory that survives the agent: memfds that the client makes, maps, and hands over.
//!
//! They are sealed at their size, so that neither side can turn the other's access into SIGBUS by truncating the file.

use crate::error::Error;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::os::fd::OwnedFd;

/// A memfd of `length` bytes, all holes, that can neither grow nor shrink.
///
/// # Errors
/// If the kernel refuses.
pub(crate) fn sealed_memfd(name: &str, length: u64) -> Result<OwnedFd, Error> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create(name, flags).map_err(Error::kernel("create a memfd"))?;
    ftruncate(&fd, length).map_err(Error::kernel("size a memfd"))?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(Error::kernel("seal a memfd"))?;
    Ok(fd)
}
