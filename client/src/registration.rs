// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A userfaultfd registration of the mappings of all blocks, for missing pages or for writes to
//! protected pages.

use crate::error::Error;
use crate::mapping_process::{UserfaultPurpose, Userfaults};
use crate::memory::Memory;
use crate::sync::lock;
use pageferry_protocol::userfault::{
    AddressRange, Events, RegisterMode, UserfaultError, Userfaultfd,
};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long the last removals are waited for. The VMM may not get a processor for a while.
const LAST_REMOVALS: Duration = Duration::from_secs(20);

/// The userfaultfd with which the mappings of the blocks are registered now. It is locked while
/// that changes.
#[derive(Debug, Default)]
pub(crate) struct Registered(Mutex<Option<Arc<Userfaultfd>>>);

impl Registered {
    /// Calls `with` with the current one, which stays the current one meanwhile.
    pub(crate) fn with_current<T>(&self, with: impl FnOnce(Option<&Userfaultfd>) -> T) -> T {
        with(lock(&self.0).as_deref())
    }
}

/// The registration. Dropping it unregisters the mappings.
#[derive(Debug)]
pub(crate) struct Registration {
    pub(crate) uffd: Arc<Userfaultfd>,
    current: Arc<Registered>,
    pub(crate) ranges: Vec<AddressRange>,
    host_pages: Vec<u64>,
    purpose: UserfaultPurpose,
    userfaults: Arc<Userfaults>,
}

impl Registration {
    /// Opens a userfaultfd for this purpose and registers the mappings of all blocks.
    ///
    /// # Errors
    /// If a block is not mapped, there is no userfaultfd, or a mapping cannot be registered. Then
    /// no mapping stays registered.
    pub(crate) fn register_all(memory: &Memory, purpose: UserfaultPurpose) -> Result<Self, Error> {
        let userfaults = Arc::clone(&memory.userfaults);
        let (uffd, current) = (Arc::new(userfaults.open(purpose)?), Arc::clone(&memory.registered));
        let (ranges, host_pages) = (Vec::new(), Vec::new());
        let mut registered = Self { uffd, current, ranges, host_pages, purpose, userfaults };
        let all = Arc::clone(&registered.current);
        let mut current = lock(&all.0);
        let done = registered.register_blocks(memory);
        if done.is_ok() {
            *current = Some(Arc::clone(&registered.uffd));
        }
        // Dropping what failed locks it again.
        drop(current);
        done.map(|()| registered)
    }

    fn register_blocks(&mut self, memory: &Memory) -> Result<(), Error> {
        for block in memory.all() {
            let mode = match self.purpose.mode() {
                // A page that the base has may not be filled.
                RegisterMode::Missing if block.private.is_some() => RegisterMode::MissingAndMinor,
                mode => mode,
            };
            let (id, length) = (block.geometry.id, block.geometry.length);
            if block.vmm_address == 0 {
                return Err(Error::NotMapped { id });
            }
            let range = AddressRange { start: block.vmm_address, length };
            self.userfaults.check_mapped(range)?;
            self.uffd.register(range, mode).map_err(|error| match (mode, error) {
                (
                    RegisterMode::WriteProtect,
                    UserfaultError::Register { source: Errno::BUSY, .. },
                ) => Error::RegisteredElsewhere { id },
                (RegisterMode::Missing | RegisterMode::MissingAndMinor, source) => {
                    Error::Unregistrable { id, source }
                }
                (_, error) => error.into(),
            })?;
            self.ranges.push(range);
            self.host_pages.push(block.host_page_size());
        }
        Ok(())
    }

    /// A duplicate of the userfaultfd, for the agent.
    pub(crate) fn duplicate(&self) -> Result<OwnedFd, Error> {
        self.uffd.as_fd().try_clone_to_owned().map_err(Error::io("duplicate a userfaultfd"))
    }

    /// Unregisters the mappings, which removes all protection, and wakes all accesses that wait. A
    /// process that has a duplicate of the userfaultfd can do nothing with these mappings any more.
    pub(crate) fn unregister(&self) {
        let mut current = lock(&self.current.0);
        current.take_if(|current| Arc::ptr_eq(current, &self.uffd));
        self.ranges.iter().for_each(|range| self.unregister_range(*range));
        drop(current);
        // A thread of the VMM that gives memory up by madvise waits until its event is read, also
        // if its mapping is not registered any more (userfaultfd_event_wait_completion() in
        // fs/userfaultfd.c).
        let mut events = Events::default();
        let deadline = Instant::now() + LAST_REMOVALS;
        while self.uffd.is_changing() && Instant::now() < deadline {
            if self.uffd.read_events(&mut events).is_err() || events.removed().is_empty() {
                // It is about to wait, or was woken and has not gone on yet.
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// The same for the mapping at this address, if it is one of these.
    pub(crate) fn forget(&mut self, start: u64) {
        if let Some(at) = self.ranges.iter().position(|range| range.start == start) {
            self.host_pages.remove(at);
            let range = self.ranges.remove(at);
            self.unregister_range(range);
        }
    }

    fn unregister_range(&self, range: AddressRange) {
        if let Err(errno) = self.uffd.unregister(range) {
            let AddressRange { start, length } = range;
            log::debug!("cannot unregister {start:#x} + {length:#x}, perhaps unmapped: {errno}");
        }
    }

    /// The host page at this address.
    pub(crate) fn page_of(&self, address: u64) -> Option<AddressRange> {
        let at = self
            .ranges
            .iter()
            .position(|range| (range.start..range.start + range.length).contains(&address))?;
        let unit = self.host_pages[at];
        Some(AddressRange { start: address / unit * unit, length: unit })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.unregister();
        self.userfaults.closed(self.purpose);
    }
}
