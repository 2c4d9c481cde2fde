//! Write protection of the VMM's own mapping: the tracker that needs no hook and no KVM.
//!
//! The mapping is registered with a userfaultfd in asynchronous write-protect mode: the first write to a protected page
//! lifts the protection inside of the kernel, nobody is woken, and the page counts as written until it is protected again.
//! The agent does both, reading and protecting, with `PAGEMAP_SCAN` on the `/proc/self/pagemap` that it is passed.
//!
//! Seen are the writes of vCPUs and of the VMM that go through this mapping. Not seen are `write()` to the file, and other
//! mappings of it: those writers mark the shared log.
//!
//! Numbers and layouts: `linux/userfaultfd.h`; semantics: `Documentation/admin-guide/mm/userfaultfd.rst`.
#![allow(unsafe_code)]

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;
use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// The features that write-protect tracking needs, by name and by bit (`UFFD_FEATURE_*`).
const FEATURES: [(&str, u64); 3] =
    [("WP_HUGETLBFS_SHMEM", 1 << 12), ("WP_UNPOPULATED", 1 << 13), ("WP_ASYNC", 1 << 15)];

/// `UFFD_API`.
const API: u64 = 0xaa;

/// `UFFDIO_REGISTER_MODE_WP`.
const REGISTER_MODE_WP: u64 = 1 << 1;

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct UffdioRange {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

const GROUP: u8 = 0xaa;
const UFFDIO_API: Opcode = opcode::read_write::<UffdioApi>(GROUP, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<UffdioRegister>(GROUP, 0x00);
const UFFDIO_UNREGISTER: Opcode = opcode::read::<UffdioRange>(GROUP, 0x01);
const USERFAULTFD_IOC_NEW: Opcode = opcode::none(GROUP, 0x00);

/// Why a mapping cannot be tracked by write protection.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
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
    /// A mapping could not be registered: no mapping there, not of memory, not aligned to its page size, or registered elsewhere.
    #[error("cannot register {address:#x} + {length:#x} for write protection")]
    Register {
        /// Address of the mapping.
        address: u64,
        /// Its length in bytes.
        length: u64,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// /proc is not mounted, or not readable.
    #[error("cannot open /proc/self/pagemap")]
    Pagemap {
        /// What the kernel said.
        #[source]
        source: Errno,
    },
}

/// Mappings of this process whose first writes are kept track of. Dropping it ends that, and lifts the protection.
#[derive(Debug)]
pub struct WriteProtect {
    uffd: OwnedFd,
    pagemap: OwnedFd,
    registered: Vec<UffdioRange>,
}

impl WriteProtect {
    /// Registers mappings, each given by its address and length in bytes. Nothing is protected by that: the first scan is.
    ///
    /// # Errors
    /// If userfaultfd is not allowed or too old, or a mapping cannot be registered; then none is left registered.
    pub fn register(ranges: &[(u64, u64)]) -> Result<Self, UffdError> {
        let uffd = open_with_features()?;
        let pagemap = rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|source| UffdError::Pagemap { source })?;
        let mut this = Self { uffd, pagemap, registered: Vec::with_capacity(ranges.len()) };
        for &(address, length) in ranges {
            let range = UffdioRange { start: address, len: length };
            let mut register = UffdioRegister { range, mode: REGISTER_MODE_WP, ioctls: 0 };
            // SAFETY: the struct is the one of this number. In asynchronous mode registering changes no access's outcome.
            unsafe { ioctl(&this.uffd, Updater::<UFFDIO_REGISTER, _>::new(&mut register)) }
                .map_err(|source| UffdError::Register { address, length, source })?;
            this.registered.push(range);
        }
        Ok(this)
    }

    /// The pagemap of this process, to be passed to the agent. Whoever holds it can see which pages of this process exist, and can
    /// protect those that are registered; it gives no access to their content.
    pub fn pagemap(&self) -> BorrowedFd<'_> {
        self.pagemap.as_fd()
    }
}

impl Drop for WriteProtect {
    fn drop(&mut self) {
        // Closing the fd would do, but not where a forked child still holds a copy.
        for range in &self.registered {
            // SAFETY: the struct is the one of this number; nobody waits for faults of this userfaultfd.
            let unregistered = unsafe { ioctl(&self.uffd, Setter::<UFFDIO_UNREGISTER, _>::new(*range)) };
            if let Err(error) = unregistered {
                log::debug!("cannot unregister {:#x} + {:#x}, unmapped by now? ({error})", range.start, range.len);
            }
        }
    }
}

/// A userfaultfd that agreed to [`FEATURES`].
fn open_with_features() -> Result<OwnedFd, UffdError> {
    let uffd = open()?;
    let wanted = FEATURES.iter().fold(0, |all, (_, bit)| all | bit);
    let Err(source) = handshake(&uffd, wanted) else { return Ok(uffd) };
    // One handshake per fd: a second one asks what there is.
    let offered = handshake(&open()?, 0).map_err(|source| UffdError::Handshake { source })?;
    let missing: Vec<&str> = FEATURES.iter().filter(|(_, bit)| offered & bit == 0).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Err(UffdError::Handshake { source });
    }
    Err(UffdError::Feature { missing: missing.join(", ") })
}

/// Returns the features that the kernel offers.
fn handshake(uffd: &OwnedFd, features: u64) -> Result<u64, Errno> {
    let mut api = UffdioApi { api: API, features, ioctls: 0 };
    // SAFETY: the struct is the one of this number.
    unsafe { ioctl(uffd, Updater::<UFFDIO_API, _>::new(&mut api)) }?;
    Ok(api.features)
}

/// Not `UFFD_USER_MODE_ONLY`: a vCPU's access faults inside of KVM.
fn open() -> Result<OwnedFd, UffdError> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: an fd that is new gives power over no memory before something is registered with it.
    match unsafe { rustix::mm::userfaultfd(flags) } {
        Ok(uffd) => Ok(uffd),
        Err(source @ Errno::PERM) => open_by_device(flags).map_err(|device| UffdError::NotAllowed { device, source }),
        Err(source) => Err(UffdError::Open { source }),
    }
}

/// The way for processes that are not privileged but may open the device (Linux 6.1).
fn open_by_device(flags: UserfaultfdFlags) -> Result<OwnedFd, Errno> {
    let device = rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
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

    #[test]
    fn numbers_are_those_of_the_kernel_header() {
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
        assert_eq!(UFFDIO_UNREGISTER, 0x8010_aa01);
        assert_eq!(USERFAULTFD_IOC_NEW, 0xaa00);
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
        if let Err(error) = open_with_features() {
            eprintln!("skipped: {error}");
            return;
        }
        let error = WriteProtect::register(&[(0x1000, 0x3000)]).unwrap_err();
        assert!(matches!(error, UffdError::Register { address: 0x1000, length: 0x3000, .. }), "{error}");
    }
}
