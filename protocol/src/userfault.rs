//! The kernel's userfaultfd: all numbers and layouts of it in one place, for the client, which
//! opens and registers, and the agent, which answers.
//!
//! A descriptor belongs to the address space that opened it, whoever holds it: so the agent places
//! pages in the VMM's mapping by the descriptor that the VMM made. Placing fills what is missing
//! and never changes a page that is there.
//!
//! Numbers and layouts: `linux/userfaultfd.h`; semantics:
//! `Documentation/admin-guide/mm/userfaultfd.rst`, and `ioctl_userfaultfd(2)`.
#![allow(unsafe_code)]

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;
use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use zerocopy::FromBytes;

/// `UFFD_API`.
const API: u64 = 0xaa;

/// Names of the features that this project asks for, `UFFD_FEATURE_*`, and their bits.
const FEATURE_NAMES: [(&str, u64); 6] = [
    ("MISSING_HUGETLBFS", feature::MISSING_HUGETLBFS),
    ("MISSING_SHMEM", feature::MISSING_SHMEM),
    ("WP_HUGETLBFS_SHMEM", feature::WP_HUGETLBFS_SHMEM),
    ("WP_UNPOPULATED", feature::WP_UNPOPULATED),
    ("POISON", feature::POISON),
    ("WP_ASYNC", feature::WP_ASYNC),
];

/// Features to ask for (`UFFD_FEATURE_*`).
pub mod feature {
    #![allow(missing_docs)]
    pub const MISSING_HUGETLBFS: u64 = 1 << 4;
    pub const MISSING_SHMEM: u64 = 1 << 5;
    pub const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
    pub const WP_UNPOPULATED: u64 = 1 << 13;
    pub const POISON: u64 = 1 << 14;
    pub const WP_ASYNC: u64 = 1 << 15;
}

/// What a mapping is registered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Register {
    /// A touch of a page that does not exist waits until somebody places it
    /// (`UFFDIO_REGISTER_MODE_MISSING`).
    Missing = 1 << 0,
    /// Writes into protected pages (`UFFDIO_REGISTER_MODE_WP`).
    WriteProtect = 1 << 1,
}

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`: addresses of the process that opened the descriptor.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// The first.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct UffdioRegister {
    range: Addresses,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `struct uffdio_zeropage` and `struct uffdio_poison`, which are alike.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct UffdioFill {
    range: Addresses,
    mode: u64,
    filled: i64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct UffdioWriteProtect {
    range: Addresses,
    mode: u64,
}

/// `UFFDIO_WRITEPROTECT_MODE_WP`.
const MODE_WP: u64 = 1;

/// `struct uffd_msg`, as far as it is a page fault.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, FromBytes, zerocopy::IntoBytes)]
struct UffdMsg {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;

const GROUP: u8 = 0xaa;
const UFFDIO_API: Opcode = opcode::read_write::<UffdioApi>(GROUP, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<UffdioRegister>(GROUP, 0x00);
const UFFDIO_UNREGISTER: Opcode = opcode::read::<Addresses>(GROUP, 0x01);
const UFFDIO_WAKE: Opcode = opcode::read::<Addresses>(GROUP, 0x02);
const UFFDIO_COPY: Opcode = opcode::read_write::<UffdioCopy>(GROUP, 0x03);
const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<UffdioFill>(GROUP, 0x04);
const UFFDIO_WRITEPROTECT: Opcode = opcode::read_write::<UffdioWriteProtect>(GROUP, 0x06);
const UFFDIO_CONTINUE: Opcode = opcode::read_write::<UffdioFill>(GROUP, 0x07);
const UFFDIO_POISON: Opcode = opcode::read_write::<UffdioFill>(GROUP, 0x08);
const USERFAULTFD_IOC_NEW: Opcode = opcode::none(GROUP, 0x00);

/// Why a userfaultfd is not to be had, or a mapping cannot be registered with it.
#[derive(Debug, thiserror::Error)]
pub enum UserfaultError {
    /// Neither the system call nor the device gives a userfaultfd.
    #[error(
        "no userfaultfd for kernel-mode faults, which vCPUs take: the system call needs CAP_SYS_PTRACE or sysctl \
         vm.unprivileged_userfaultfd=1, and /dev/userfaultfd cannot be used instead ({device})"
    )]
    NotAllowed {
        /// What opening or using the device came to.
        device: Errno,
        /// What the system call came to.
        #[source]
        source: Errno,
    },
    /// The kernel has no userfaultfd, or no more of them.
    #[error("cannot open a userfaultfd")]
    Open {
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The kernel is too old, or was built without.
    #[error("userfaultfd lacks {missing} (Linux 6.7 on x86-64 or arm64 has it)")]
    Feature {
        /// Names of the missing features, `UFFD_FEATURE_*`.
        missing: String,
    },
    /// The kernel refused the handshake for another reason.
    #[error("userfaultfd handshake failed")]
    Handshake {
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// A mapping could not be registered: no mapping there, not of memory, not aligned to its page
    /// size, or registered elsewhere.
    #[error("cannot register {address:#x} + {length:#x} for {purpose}")]
    Register {
        /// Address of the mapping.
        address: u64,
        /// Its length in bytes.
        length: u64,
        /// What for.
        purpose: &'static str,
        /// What the kernel said; EBUSY if it is registered with another userfaultfd.
        #[source]
        source: Errno,
    },
}

/// Pages that could not be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotPlaced {
    /// Bytes that were placed before.
    pub done: u64,
    /// Why the next was not: EEXIST if there is a page, ESRCH if the process is gone, ENOENT if
    /// nothing is registered there.
    pub errno: Errno,
}

/// An open userfaultfd.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl From<OwnedFd> for Userfaultfd {
    /// A descriptor that another process opened.
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Userfaultfd {
    /// Opens one for this address space that does not block and knows `features`.
    ///
    /// # Errors
    /// If it is not allowed, or the kernel is too old.
    pub fn open(features: u64) -> Result<Self, UserfaultError> {
        let uffd = open()?;
        let Err(source) = handshake(&uffd, features) else { return Ok(Self { fd: uffd }) };
        // One handshake per fd: a second one asks what there is.
        let offered =
            handshake(&open()?, 0).map_err(|source| UserfaultError::Handshake { source })?;
        let lacks = |bit: &u64| features & bit != 0 && offered & bit == 0;
        let missing: Vec<&str> =
            FEATURE_NAMES.iter().filter(|(_, bit)| lacks(bit)).map(|(name, _)| *name).collect();
        if missing.is_empty() {
            return Err(UserfaultError::Handshake { source });
        }
        Err(UserfaultError::Feature { missing: missing.join(", ") })
    }

    /// Opens one for a process that places pages in a mapping of its own and never waits for a
    /// fault. Takes no privilege: the kernel's own faults would not be told.
    ///
    /// # Errors
    /// If the kernel has none.
    pub fn open_for_placing() -> Result<Self, UserfaultError> {
        /// `UFFD_USER_MODE_ONLY`, from the kernel's `linux/userfaultfd.h`.
        const USER_MODE_ONLY: u32 = 1;
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        let flags = flags | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
        // SAFETY: an fd that is new gives power over no memory before something is registered with
        // it.
        let fd = unsafe { rustix::mm::userfaultfd(flags) }
            .map_err(|source| UserfaultError::Open { source })?;
        handshake(&fd, feature::MISSING_SHMEM)
            .map_err(|source| UserfaultError::Handshake { source })?;
        Ok(Self { fd })
    }

    /// Registers a mapping of the process that opened it.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn register(&self, range: Addresses, what: Register) -> Result<(), UserfaultError> {
        let mut register = UffdioRegister { range, mode: what as u64, ioctls: 0 };
        let purpose = if what == Register::Missing { "missing pages" } else { "write protection" };
        // SAFETY: the struct is the one of this number. A registered mapping holds the same memory
        // as before.
        unsafe { ioctl(&self.fd, Updater::<UFFDIO_REGISTER, _>::new(&mut register)) }.map_err(
            |source| UserfaultError::Register {
                address: range.start,
                length: range.length,
                purpose,
                source,
            },
        )
    }

    /// Takes a registration back, and wakes who waits there.
    ///
    /// The kernel alone does not wake all of them (userfaultfd_unregister() in fs/userfaultfd.c):
    /// those who wait to write never, and of those who wait for a missing page not the ones that
    /// come while it looks. It wakes first and takes the registration back then, and a fault that
    /// holds only the lock of its mapping (Linux 6.6) may begin to wait in between. So they are
    /// woken once more afterwards, when no fault can begin to wait any more.
    ///
    /// # Errors
    /// What the kernel said, such as that nothing is mapped there any more.
    pub fn unregister(&self, range: Addresses) -> Result<(), Errno> {
        // SAFETY: the struct is the one of this number.
        let unregistered = unsafe { ioctl(&self.fd, Setter::<UFFDIO_UNREGISTER, _>::new(range)) };
        unregistered.and(self.wake(range))
    }

    /// Wakes who waits for pages in `range`: they look again.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn wake(&self, range: Addresses) -> Result<(), Errno> {
        // SAFETY: the struct is the one of this number.
        unsafe { ioctl(&self.fd, Setter::<UFFDIO_WAKE, _>::new(range)) }
    }

    /// Places `bytes`, whole host pages, at the address `to` and those after it, each page at once,
    /// and wakes who waits for them.
    ///
    /// # Errors
    /// If a page is there already, or cannot be placed. Those before it were.
    pub fn copy(&self, to: u64, bytes: &[u8]) -> Result<(), NotPlaced> {
        let mut done = 0;
        let mut changing = Changing::default();
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
            let go_on = |errno| changing.go_on(errno, more > 0);
            outcome.or_else(go_on).map_err(|errno| NotPlaced { done: done as u64, errno })?;
        }
        Ok(())
    }

    /// Places zero pages. Not for hugetlbfs, which has no such thing.
    ///
    /// # Errors
    /// As [`Userfaultfd::copy`].
    pub fn zero(&self, range: Addresses) -> Result<(), NotPlaced> {
        self.fill::<UFFDIO_ZEROPAGE>(range)
    }

    /// Marks missing pages as lost: whoever touches them gets SIGBUS, or EFAULT from the kernel,
    /// instead of waiting.
    ///
    /// # Errors
    /// As [`Userfaultfd::copy`].
    pub fn poison(&self, range: Addresses) -> Result<Poisoned, NotPlaced> {
        self.fill::<UFFDIO_POISON>(range).map(|()| Poisoned(range))
    }

    /// Forgets that pages were [marked as lost](Userfaultfd::poison): they are missing again. Such
    /// a mark is in the page tables of this process alone, and stays there when the registration
    /// ends, and when the file under it is written or gets a hole. Only for mappings of this
    /// process, that are registered still.
    ///
    /// # Errors
    /// What the kernel said; ENOENT if no mapping is registered there.
    pub fn forget_poison(&self, Poisoned(range): Poisoned) -> Result<(), Errno> {
        // Of what is registered only: anything else that is mapped there by now is not to be
        // touched.
        match self.fill::<UFFDIO_POISON>(range) {
            Ok(()) | Err(NotPlaced { errno: Errno::EXIST, .. }) => {}
            Err(NotPlaced { errno, .. }) => return Err(errno),
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

    /// Protects pages that are registered for it: who writes there waits until the protection is
    /// lifted.
    ///
    /// # Errors
    /// What the kernel said; ENOENT if the registration is gone. Some of the pages may be protected
    /// then.
    pub fn protect(&self, range: Addresses) -> Result<(), Errno> {
        self.write_protect(range, MODE_WP)
    }

    /// Lifts the protection, and wakes who waits to write there.
    ///
    /// # Errors
    /// As [`Userfaultfd::protect`].
    pub fn lift(&self, range: Addresses) -> Result<(), Errno> {
        self.write_protect(range, 0)
    }

    fn write_protect(&self, range: Addresses, mode: u64) -> Result<(), Errno> {
        let mut changing = Changing::default();
        loop {
            let mut arg = UffdioWriteProtect { range, mode };
            // SAFETY: the struct is the one of this number. What is protected or not holds the same
            // content as before.
            match unsafe { ioctl(&self.fd, Updater::<UFFDIO_WRITEPROTECT, _>::new(&mut arg)) } {
                Ok(()) => return Ok(()),
                Err(errno) => changing.go_on(errno, false)?,
            }
        }
    }

    /// True if the file under a host page has it. For hugetlbfs, where a page that cannot be placed
    /// for want of memory may count as being there already (`EEXIST`): the kernel finds the page in
    /// the file and maps it, or has none to map.
    ///
    /// # Errors
    /// What the kernel said, if it is neither.
    pub fn is_there(&self, host_page: Addresses) -> Result<bool, Errno> {
        match self.fill::<UFFDIO_CONTINUE>(host_page) {
            Ok(()) | Err(NotPlaced { errno: Errno::EXIST, .. }) => Ok(true),
            Err(NotPlaced { errno: Errno::FAULT, .. }) => Ok(false),
            Err(NotPlaced { errno, .. }) => Err(errno),
        }
    }

    fn fill<const OPCODE: Opcode>(&self, range: Addresses) -> Result<(), NotPlaced> {
        let mut done = 0;
        let mut changing = Changing::default();
        while done < range.length {
            let rest = Addresses { start: range.start + done, length: range.length - done };
            let mut arg = UffdioFill { range: rest, ..UffdioFill::default() };
            // SAFETY: the struct is the one of both numbers. Only pages that did not exist are
            // filled or marked.
            let outcome = unsafe { ioctl(&self.fd, Updater::<OPCODE, _>::new(&mut arg)) };
            let more = u64::try_from(arg.filled).unwrap_or(0);
            done += more;
            outcome
                .or_else(|errno| changing.go_on(errno, more > 0))
                .map_err(|errno| NotPlaced { done, errno })?;
        }
        Ok(())
    }

    /// Reads the faults that nobody has read yet: their addresses, as many as `into` holds. Returns
    /// how many; 0 if there are none.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn read_faults(&self, into: &mut [u64; MAX_FAULTS]) -> Result<usize, Errno> {
        let mut messages = [UffdMsg::default(); MAX_FAULTS];
        let read = loop {
            match rustix::io::read(&self.fd, zerocopy::IntoBytes::as_mut_bytes(&mut messages)) {
                Ok(bytes) => break bytes / size_of::<UffdMsg>(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(0),
                Err(errno) => return Err(errno),
            }
        };
        let mut count = 0;
        // No other event was asked for.
        for message in messages.iter().take(read).filter(|message| message.event == EVENT_PAGEFAULT)
        {
            into[count] = message.address;
            count += 1;
        }
        Ok(count)
    }
}

/// Pages that [`Userfaultfd::poison`] marked: they were missing.
#[derive(Debug)]
pub struct Poisoned(Addresses);

impl Poisoned {
    /// Where they are.
    pub fn range(&self) -> Addresses {
        self.0
    }
}

/// Most faults of one [`Userfaultfd::read_faults`].
pub const MAX_FAULTS: usize = 64;

/// How often in a row a call is tried again that comes to nothing since the mappings are just
/// changing.
const CHANGING: u32 = 10_000;

/// Calls in a row that came to nothing.
#[derive(Debug, Default)]
struct Changing(u32);

impl Changing {
    /// Whether a call is tried again: the kernel stops it where the mappings are just changing,
    /// until whoever asked for events of that has read them. Where nobody reads them it is not this
    /// thread that waits for ever.
    fn go_on(&mut self, errno: Errno, progress: bool) -> Result<(), Errno> {
        match errno {
            Errno::INTR => {}
            Errno::AGAIN if progress => self.0 = 0,
            Errno::AGAIN if self.0 < CHANGING => {
                self.0 += 1;
                std::thread::yield_now();
            }
            other => return Err(other),
        }
        Ok(())
    }
}

/// Returns the features that the kernel offers.
fn handshake(uffd: &OwnedFd, features: u64) -> Result<u64, Errno> {
    let mut api = UffdioApi { api: API, features, ioctls: 0 };
    // SAFETY: the struct is the one of this number.
    unsafe { ioctl(uffd, Updater::<UFFDIO_API, _>::new(&mut api)) }?;
    Ok(api.features)
}

/// Not `UFFD_USER_MODE_ONLY`: a vCPU's access faults inside of KVM.
fn open() -> Result<OwnedFd, UserfaultError> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: an fd that is new gives power over no memory before something is registered with it.
    match unsafe { rustix::mm::userfaultfd(flags) } {
        Ok(uffd) => Ok(uffd),
        Err(source @ Errno::PERM) => {
            open_by_device(flags).map_err(|device| UserfaultError::NotAllowed { device, source })
        }
        Err(source) => Err(UserfaultError::Open { source }),
    }
}

/// The way for processes that are not privileged but may open the device (Linux 6.1).
fn open_by_device(flags: UserfaultfdFlags) -> Result<OwnedFd, Errno> {
    let device =
        rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: the argument is a number, and the return value a new fd.
    unsafe { ioctl(device, NewUserfaultfd(flags.bits())) }
}

/// `USERFAULTFD_IOC_NEW`: flags by value, a new fd as return value.
struct NewUserfaultfd(u32);

// SAFETY: the number takes its argument by value and touches no memory of the caller's.
unsafe impl Ioctl for NewUserfaultfd {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        USERFAULTFD_IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.0 as usize as *mut c_void
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the kernel just made this fd for us.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    #[test]
    fn numbers_are_those_of_the_kernel_header() {
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
        assert_eq!(UFFDIO_WRITEPROTECT, 0xc018_aa06);
        assert_eq!(UFFDIO_CONTINUE, 0xc020_aa07);
        assert_eq!(UFFDIO_UNREGISTER, 0x8010_aa01);
        assert_eq!(UFFDIO_WAKE, 0x8010_aa02);
        assert_eq!(UFFDIO_COPY, 0xc028_aa03);
        assert_eq!(UFFDIO_ZEROPAGE, 0xc020_aa04);
        assert_eq!(UFFDIO_POISON, 0xc020_aa08);
        assert_eq!(USERFAULTFD_IOC_NEW, 0xaa00);
        assert_eq!(size_of::<UffdMsg>(), 32);
    }

    /// Nobody reads that a range is being removed: whoever removes it waits for that, and nobody
    /// else does.
    #[test]
    fn mappings_that_stay_in_a_change_are_not_waited_for_for_ever() {
        const EVENT_REMOVE: u64 = 1 << 3;
        const LENGTH: u64 = 16 << 12;
        let features = EVENT_REMOVE | feature::WP_HUGETLBFS_SHMEM | feature::WP_UNPOPULATED;
        let uffd = match Userfaultfd::open(features) {
            Ok(uffd) => uffd,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, LENGTH).unwrap();
        let memory = crate::shm::mapping::MappedWords::shared(fd.as_fd(), 0, LENGTH).unwrap();
        let (start, pointer) = (memory.address_range().start as u64, memory.address_range().start);
        let all = Addresses { start, length: LENGTH };
        uffd.register(all, Register::WriteProtect).unwrap();
        std::thread::scope(|scope| {
            let remover = scope.spawn(move || {
                let pointer = std::ptr::with_exposed_provenance_mut(pointer);
                // SAFETY: the range is mapped as long as this thread runs, and what it holds is of
                // no interest.
                unsafe {
                    rustix::mm::madvise(pointer, LENGTH as usize, rustix::mm::Advice::LinuxRemove)
                }
            });
            // Until the remover is there.
            while uffd.protect(all).is_ok() {}
            assert_eq!((uffd.protect(all), uffd.lift(all)), (Err(Errno::AGAIN), Err(Errno::AGAIN)));
            // Hears of it, so that the remover goes on.
            let mut faults = [0; MAX_FAULTS];
            while !remover.is_finished() {
                let _ = uffd.read_faults(&mut faults);
            }
            remover.join().unwrap().unwrap();
        });
        assert_eq!(uffd.protect(all), Ok(()));
    }

    /// Somebody touches a missing page just as the registration is taken back. The window is
    /// narrow: without a second wake-up about one touch in a hundred waits for ever.
    #[test]
    fn a_touch_that_meets_the_end_of_a_registration_goes_on() {
        const ROUNDS: u64 = 10_000;
        const LENGTH: u64 = 64 << 12;
        const STUCK: Duration = Duration::from_secs(30);
        let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, LENGTH).unwrap();
        let memory = crate::shm::mapping::MappedWords::shared(fd.as_fd(), 0, LENGTH).unwrap();
        let all = Addresses { start: memory.address_range().start as u64, length: LENGTH };
        let (asked, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let pause = |turns: u64| (0..turns).for_each(|_| std::hint::spin_loop());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    while asked.load(Ordering::Acquire) < round {
                        std::thread::yield_now();
                    }
                    pause(round * 7919 % 997);
                    std::hint::black_box(memory[0].load(Ordering::Relaxed));
                    done.store(round, Ordering::Release);
                }
            });
            for round in 1..=ROUNDS {
                let hole =
                    rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&fd, hole, 0, LENGTH).unwrap();
                let uffd = match Userfaultfd::open(feature::MISSING_SHMEM) {
                    Ok(uffd) => uffd,
                    Err(error) => {
                        eprintln!("skipped: {error}");
                        return asked.store(ROUNDS, Ordering::Release);
                    }
                };
                uffd.register(all, Register::Missing).unwrap();
                asked.store(round, Ordering::Release);
                pause(round * 6271 % 1511);
                uffd.unregister(all).unwrap();
                let begun = Instant::now();
                while done.load(Ordering::Acquire) < round {
                    if begun.elapsed() > STUCK {
                        asked.store(ROUNDS, Ordering::Release);
                        // Closing it lets the other thread end, and so the test.
                        drop(uffd);
                        panic!("the touch of round {round} waits for ever");
                    }
                    std::thread::yield_now();
                }
            }
        });
    }

    #[test]
    fn the_device_gives_what_the_system_call_gives() {
        match open_by_device(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) {
            Ok(uffd) => assert!(handshake(&uffd, 0).is_ok()),
            Err(error) => eprintln!("skipped: /dev/userfaultfd: {error}"),
        }
    }

    #[test]
    fn what_is_not_mapped_is_refused_with_its_numbers() {
        let uffd = match Userfaultfd::open(feature::MISSING_SHMEM) {
            Ok(uffd) => uffd,
            Err(error) => {
                eprintln!("skipped: {error}");
                return;
            }
        };
        let error = uffd
            .register(Addresses { start: 0x1000, length: 0x3000 }, Register::Missing)
            .unwrap_err();
        assert_eq!(error.to_string(), "cannot register 0x1000 + 0x3000 for missing pages");
        let placed = uffd.copy(0x1000, &[0; 4096]).unwrap_err();
        assert_eq!((placed.done, placed.errno), (0, Errno::NOENT));
    }
}
