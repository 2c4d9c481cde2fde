// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Operations on an open userfaultfd: register, place, protect, and read faults.
#![allow(unsafe_code)]

use super::abi::{
    AddressRange, EVENT_PAGEFAULT, EVENT_REMOVE, MODE_WP, UFFDIO_CONTINUE, UFFDIO_COPY,
    UFFDIO_POISON, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_WRITEPROTECT,
    UFFDIO_ZEROPAGE, UffdMsg, UffdioCopy, UffdioFill, UffdioRegister, UffdioWriteProtect,
};
use super::open::{self, UserfaultError};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// What a mapping is registered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum RegisterMode {
    /// An access to a missing page waits until the page is placed (`UFFDIO_REGISTER_MODE_MISSING`).
    Missing = 1 << 0,
    /// A write to a protected page waits or is recorded (`UFFDIO_REGISTER_MODE_WP`).
    WriteProtect = 1 << 1,
    /// An access to a page that the file has and the mapping has not waits
    /// (`UFFDIO_REGISTER_MODE_MINOR`). For a mapping that nobody touches: pages are placed as with
    /// [`RegisterMode::Missing`], which would forbid pages of 2 MiB in the file.
    Minor = 1 << 2,
    /// Both [`RegisterMode::Missing`] and [`RegisterMode::Minor`].
    MissingAndMinor = 1 << 0 | 1 << 2,
}

/// Pages that could not be filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FillError {
    /// Bytes that were filled before.
    pub done: u64,
    /// Why the next page was not: EEXIST if it exists, ESRCH if the process has exited, ENOENT if
    /// nothing is registered there.
    pub errno: Errno,
}

/// True if a part of the range is not mapped in this process.
fn has_hole(range: AddressRange) -> bool {
    let start = std::ptr::without_provenance_mut(range.start as usize);
    // SAFETY: MS_ASYNC alone does nothing but look at the mappings of the range (mm/msync.c).
    let looked =
        unsafe { rustix::mm::msync(start, range.length as usize, rustix::mm::MsyncFlags::ASYNC) };
    looked == Err(Errno::NOMEM)
}

/// An open userfaultfd.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
    /// The mappings are those of this process.
    is_own: bool,
}

impl From<OwnedFd> for Userfaultfd {
    /// A descriptor of another process, which made the handshake.
    fn from(fd: OwnedFd) -> Self {
        Self { fd, is_own: false }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Userfaultfd {
    /// Opens one for this address space, non-blocking, with `features`.
    ///
    /// # Errors
    /// If it is not allowed, or the kernel is too old.
    pub fn open(features: u64) -> Result<Self, UserfaultError> {
        open::open(features).map(Self::of_this_process)
    }

    /// A descriptor of this process, after the handshake.
    pub(super) fn of_this_process(fd: OwnedFd) -> Self {
        Self { fd, is_own: true }
    }

    /// A descriptor that was created in another process, for its mappings. Makes the handshake with
    /// `features`.
    ///
    /// # Errors
    /// If the kernel is too old, or the handshake was made already.
    pub fn of_another_process(fd: OwnedFd, features: u64) -> Result<Self, UserfaultError> {
        open::handshake_of_another(fd, features).map(Self::from)
    }

    /// Opens one for a process that places pages in a mapping of its own and never waits for a
    /// fault. This takes no privilege: faults of the kernel are not reported.
    ///
    /// # Errors
    /// If the kernel has none.
    pub fn open_for_placing() -> Result<Self, UserfaultError> {
        open::open_user_mode_only().map(Self::of_this_process)
    }

    /// The mappings are those of this process.
    pub(super) fn is_own(&self) -> bool {
        self.is_own
    }

    /// Registers a mapping of the process that the descriptor belongs to: all of it, or nothing.
    ///
    /// # Errors
    /// What the kernel said, or EFAULT if a part of the range is not mapped. The kernel alone
    /// reports success then, and registers the rest (userfaultfd_register() in fs/userfaultfd.c).
    /// Only mappings of this process are looked at: for those of another one the caller has to.
    pub fn register(&self, range: AddressRange, what: RegisterMode) -> Result<(), UserfaultError> {
        let mut register = UffdioRegister { range, mode: what as u64, ioctls: 0 };
        let purpose = match what {
            RegisterMode::Missing | RegisterMode::MissingAndMinor => "missing pages",
            RegisterMode::WriteProtect => "write protection",
            RegisterMode::Minor => "placing",
        };
        let refused = |source| UserfaultError::Register {
            address: range.start,
            length: range.length,
            purpose,
            source,
        };
        if self.is_own && has_hole(range) {
            return Err(refused(Errno::FAULT));
        }
        // SAFETY: the struct is the one of this number. A registered mapping holds the same memory
        // as before.
        unsafe { ioctl(&self.fd, Updater::<UFFDIO_REGISTER, _>::new(&mut register)) }.map_err(
            |source| {
                // All other checks of the kernel come before its first change. After ENOMEM a part
                // may be registered, and the rest belongs to no other userfaultfd.
                if source == Errno::NOMEM {
                    let _ = self.unregister(range);
                }
                refused(source)
            },
        )
    }

    /// Unregisters a mapping, and wakes all threads that wait there.
    ///
    /// The kernel alone does not wake all of them (userfaultfd_unregister() in fs/userfaultfd.c).
    /// It never wakes threads that wait to write. And it wakes the threads that wait for a missing
    /// page before it removes the registration: a fault that holds only the lock of its mapping
    /// (Linux 6.6) can begin to wait in between. So this wakes them once more afterwards, when no
    /// fault can begin to wait any more.
    ///
    /// # Errors
    /// What the kernel said, for example that nothing is mapped there any more.
    pub fn unregister(&self, range: AddressRange) -> Result<(), Errno> {
        // SAFETY: the struct is the one of this number.
        let unregistered = unsafe { ioctl(&self.fd, Setter::<UFFDIO_UNREGISTER, _>::new(range)) };
        unregistered.and(self.wake(range))
    }

    /// Wakes the threads that wait for pages in `range`. They try again.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn wake(&self, range: AddressRange) -> Result<(), Errno> {
        // SAFETY: the struct is the one of this number.
        unsafe { ioctl(&self.fd, Setter::<UFFDIO_WAKE, _>::new(range)) }
    }

    /// Places `bytes`, whole host pages, at the address `to` and those after it. Each page appears
    /// at once, and the threads that wait for it are woken.
    ///
    /// # Errors
    /// If a page exists already or cannot be placed. The pages before it were placed.
    pub fn copy(&self, to: u64, bytes: &[u8]) -> Result<(), FillError> {
        let mut retries = Retries::default();
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            let (dst, src, len) =
                (to + done as u64, rest.as_ptr().expose_provenance() as u64, rest.len() as u64);
            let mut arg = UffdioCopy { dst, src, len, ..UffdioCopy::default() };
            // SAFETY: the struct is the one of this number, and `src` is valid for `len` bytes. The
            // kernel writes only pages that did not exist, so it changes nothing that anyone has
            // seen.
            let outcome = unsafe { ioctl(&self.fd, Updater::<UFFDIO_COPY, _>::new(&mut arg)) };
            let more = usize::try_from(arg.copy).unwrap_or(0);
            done += more;
            let go_on = |errno| retries.retry(errno, more > 0);
            outcome.or_else(go_on).map_err(|errno| FillError { done: done as u64, errno })?;
        }
        Ok(())
    }

    /// Places zero pages. Not for hugetlbfs, which does not support it.
    ///
    /// # Errors
    /// As [`Userfaultfd::copy`].
    pub fn zero(&self, range: AddressRange) -> Result<(), FillError> {
        self.fill::<UFFDIO_ZEROPAGE>(range)
    }

    /// Maps pages that the file under the mapping has. Threads that wait for them are woken.
    ///
    /// # Errors
    /// As [`Userfaultfd::copy`]; EFAULT if the file does not have a page.
    pub fn map_file(&self, range: AddressRange) -> Result<(), FillError> {
        self.fill::<UFFDIO_CONTINUE>(range)
    }

    /// Marks missing pages as lost. An access to them gets SIGBUS, or EFAULT from the kernel,
    /// instead of waiting.
    ///
    /// # Errors
    /// As [`Userfaultfd::copy`].
    pub fn poison(&self, range: AddressRange) -> Result<Poisoned, FillError> {
        self.fill::<UFFDIO_POISON>(range).map(|()| Poisoned(range))
    }

    /// Clears the marks of [`Userfaultfd::poison`]: the pages are missing again. The marks are in
    /// the page tables of this process alone. They stay there when the registration ends, and when
    /// the file is written or punched. Only for mappings of this process that are still registered.
    ///
    /// # Errors
    /// What the kernel said; ENOENT if no mapping is registered there, EOPNOTSUPP for mappings of
    /// another process.
    pub fn clear_poison(&self, Poisoned(range): Poisoned) -> Result<(), Errno> {
        if !self.is_own {
            return Err(Errno::OPNOTSUPP);
        }
        // Only if it is still registered: another mapping there must not be touched.
        match self.fill::<UFFDIO_POISON>(range) {
            Ok(()) | Err(FillError { errno: Errno::EXIST, .. }) => {}
            Err(FillError { errno, .. }) => return Err(errno),
        }
        let (Ok(start), Ok(length)) = (usize::try_from(range.start), usize::try_from(range.length))
        else {
            return Err(Errno::INVAL);
        };
        let start = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: the kernel reads and writes none of it. All of the range was missing when it was
        // marked, so nobody has a value there, and nobody could make one since: a touch is an
        // error. The range is registered still, so it is the mapping that was marked: what is
        // dropped is how its pages are mapped. Not the plain advice, which locked mappings refuse.
        unsafe { rustix::mm::madvise(start, length, rustix::mm::Advice::LinuxDontneedLocked) }
    }

    /// Write-protects registered pages: a write there waits until the protection is removed.
    ///
    /// # Errors
    /// What the kernel said; ENOENT if the registration is gone. Some of the pages may be protected
    /// then.
    pub fn protect(&self, range: AddressRange) -> Result<(), Errno> {
        self.write_protect(range, MODE_WP)
    }

    /// Removes the protection, and wakes the threads that wait to write there.
    ///
    /// # Errors
    /// As [`Userfaultfd::protect`].
    pub fn unprotect(&self, range: AddressRange) -> Result<(), Errno> {
        self.write_protect(range, 0)
    }

    fn write_protect(&self, range: AddressRange, mode: u64) -> Result<(), Errno> {
        let mut retries = Retries::default();
        loop {
            let mut arg = UffdioWriteProtect { range, mode };
            // SAFETY: the struct is the one of this number. What is protected or not holds the same
            // content as before.
            match unsafe { ioctl(&self.fd, Updater::<UFFDIO_WRITEPROTECT, _>::new(&mut arg)) } {
                Ok(()) => return Ok(()),
                Err(errno) => retries.retry(errno, false)?,
            }
        }
    }

    /// True while a thread of the process gives memory up: its removal is not read yet, or it is
    /// about to wait for that, or it was woken and has not gone on.
    pub fn is_changing(&self) -> bool {
        // The kernel looks for that first. It refuses an empty range.
        let mut arg = UffdioWriteProtect { range: AddressRange::default(), mode: 0 };
        // SAFETY: the struct is the one of this number, and an empty range changes nothing.
        let refused = unsafe { ioctl(&self.fd, Updater::<UFFDIO_WRITEPROTECT, _>::new(&mut arg)) };
        refused == Err(Errno::AGAIN)
    }

    /// True if the file under a host page has it. For hugetlbfs, where the kernel may answer EEXIST
    /// for a page that it cannot place for lack of memory: this has the kernel map the page of the
    /// file, or find that there is none.
    ///
    /// # Errors
    /// What the kernel said, if it is neither.
    pub fn is_populated(&self, host_page: AddressRange) -> Result<bool, Errno> {
        match self.fill::<UFFDIO_CONTINUE>(host_page) {
            Ok(()) | Err(FillError { errno: Errno::EXIST, .. }) => Ok(true),
            Err(FillError { errno: Errno::FAULT, .. }) => Ok(false),
            Err(FillError { errno, .. }) => Err(errno),
        }
    }

    fn fill<const OPCODE: Opcode>(&self, range: AddressRange) -> Result<(), FillError> {
        let mut done = 0;
        let mut retries = Retries::default();
        while done < range.length {
            let rest = AddressRange { start: range.start + done, length: range.length - done };
            let mut arg = UffdioFill { range: rest, ..UffdioFill::default() };
            // SAFETY: the struct is the one of both numbers. Only pages that did not exist are
            // filled or marked.
            let outcome = unsafe { ioctl(&self.fd, Updater::<OPCODE, _>::new(&mut arg)) };
            let more = u64::try_from(arg.filled).unwrap_or(0);
            done += more;
            outcome
                .or_else(|errno| retries.retry(errno, more > 0))
                .map_err(|errno| FillError { done, errno })?;
        }
        Ok(())
    }

    /// Reads pending faults and removals, as many as `into` holds, in place of what it has. There
    /// may be none.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn read_events(&self, into: &mut Events) -> Result<(), Errno> {
        into.clear();
        let mut messages = [UffdMsg::default(); MAX_FAULTS];
        let read = loop {
            match rustix::io::read(&self.fd, zerocopy::IntoBytes::as_mut_bytes(&mut messages)) {
                Ok(bytes) => break bytes / size_of::<UffdMsg>(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        };
        for message in &messages[..read] {
            match message.event {
                EVENT_PAGEFAULT => into.faults.push(message.address),
                EVENT_REMOVE => {
                    let (start, end) = (message.flags, message.address);
                    let length = end.saturating_sub(start);
                    into.removed.push(AddressRange { start, length });
                }
                // No other event was asked for.
                _ => {}
            }
        }
        Ok(())
    }
}

/// What [`Userfaultfd::read_events`] has read. Reading again allocates nothing.
#[derive(Debug)]
pub struct Events {
    faults: Vec<u64>,
    removed: Vec<AddressRange>,
}

impl Default for Events {
    fn default() -> Self {
        Self { faults: Vec::with_capacity(MAX_FAULTS), removed: Vec::with_capacity(MAX_FAULTS) }
    }
}

impl Events {
    /// The addresses of the faults.
    pub fn faults(&self) -> &[u64] {
        &self.faults
    }

    /// Mappings whose content the process gives up by madvise. The thread that does it goes on when
    /// its event was read. Only a descriptor with the feature `EVENT_REMOVE` reports them.
    ///
    /// A fault of such a page may have been read before its removal. So handle removals first.
    pub fn removed(&self) -> &[AddressRange] {
        &self.removed
    }

    fn clear(&mut self) {
        self.faults.clear();
        self.removed.clear();
    }
}

/// Pages that [`Userfaultfd::poison`] has marked. They were missing.
#[derive(Debug)]
pub struct Poisoned(AddressRange);

impl Poisoned {
    /// Their addresses.
    pub fn range(&self) -> AddressRange {
        self.0
    }
}

/// Largest number of faults and removals in one [`Userfaultfd::read_events`].
pub const MAX_FAULTS: usize = 64;

/// How often in a row a call is repeated that made no progress because the mappings were changing.
const MAX_RETRIES: u32 = 1000;

/// Calls in a row that made no progress.
#[derive(Debug, Default)]
struct Retries(u32);

impl Retries {
    /// Decides whether to repeat a call. The kernel stops a call while the mappings change, until
    /// the change is complete. If the process asked for events, that takes until a thread reads
    /// them. This may be that thread, or hold something that it waits for: so it must not wait.
    fn retry(&mut self, errno: Errno, progress: bool) -> Result<(), Errno> {
        match errno {
            Errno::INTR => {}
            Errno::AGAIN if progress => self.0 = 0,
            Errno::AGAIN if self.0 < MAX_RETRIES => {
                self.0 += 1;
                std::thread::yield_now();
            }
            other => return Err(other),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
