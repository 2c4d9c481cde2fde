// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Opening a userfaultfd, by the system call or by the device, and the handshake.
#![allow(unsafe_code)]

use super::abi::{API, UFFDIO_API, USERFAULTFD_IOC_NEW, UffdioApi, feature};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, ioctl};
use rustix::mm::UserfaultfdFlags;
use std::ffi::c_void;
use std::os::fd::{FromRawFd, OwnedFd};

/// Names of the features that this project asks for, `UFFD_FEATURE_*`, and their bits.
const FEATURE_NAMES: [(&str, u64); 8] = [
    ("EVENT_REMOVE", feature::EVENT_REMOVE),
    ("MISSING_HUGETLBFS", feature::MISSING_HUGETLBFS),
    ("MISSING_SHMEM", feature::MISSING_SHMEM),
    ("MINOR_SHMEM", feature::MINOR_SHMEM),
    ("WP_HUGETLBFS_SHMEM", feature::WP_HUGETLBFS_SHMEM),
    ("WP_UNPOPULATED", feature::WP_UNPOPULATED),
    ("POISON", feature::POISON),
    ("WP_ASYNC", feature::WP_ASYNC),
];

/// Why a userfaultfd cannot be opened, or a mapping cannot be registered with it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum UserfaultError {
    /// Neither the system call nor the device gives a userfaultfd.
    #[error(
        "no userfaultfd for kernel-mode faults, which vCPUs take: the system call needs CAP_SYS_PTRACE or sysctl \
         vm.unprivileged_userfaultfd=1, and /dev/userfaultfd cannot be used instead ({device})"
    )]
    NotAllowed {
        /// The error of the device.
        device: Errno,
        /// The error of the system call.
        #[source]
        source: Errno,
    },
    /// The kernel has no userfaultfd, or cannot open another one.
    #[error("cannot open a userfaultfd")]
    Open {
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// A seccomp filter is in force that was not at the start, the device cannot be used, and all
    /// userfaultfds that were opened at the start are taken.
    #[error(
        "the {count} userfaultfds that were opened before the seccomp filter are used up, and more come from \
         /dev/userfaultfd only, which could not be opened at the start ({device})"
    )]
    UsedUp {
        /// How many were opened.
        count: usize,
        /// The error of the device.
        device: Errno,
    },
    /// The kernel is too old, or was built without the feature.
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
    /// A mapping could not be registered: there is none, it is not memory, it is not aligned to its
    /// page size, or another userfaultfd has it.
    #[error("cannot register {address:#x} + {length:#x} for {purpose}")]
    Register {
        /// Address of the mapping.
        address: u64,
        /// Its length in bytes.
        length: u64,
        /// What for.
        purpose: &'static str,
        /// What the kernel said; EBUSY if it is registered with another userfaultfd, EFAULT if a
        /// part of it is not mapped.
        #[source]
        source: Errno,
    },
}

/// Opens a userfaultfd for this address space that does not block and knows `features`.
///
/// # Errors
/// If it is not allowed, or the kernel is too old.
pub(super) fn open(features: u64) -> Result<OwnedFd, UserfaultError> {
    handshake_with(features, open_any)
}

/// Makes the handshake for `features` with the next descriptor that `next` gives.
pub(super) fn handshake_with(
    features: u64, next: impl Fn() -> Result<OwnedFd, UserfaultError>,
) -> Result<OwnedFd, UserfaultError> {
    let uffd = next()?;
    match handshake(&uffd, features) {
        Ok(_) => Ok(uffd),
        // One handshake per descriptor: a second descriptor asks what the kernel offers.
        Err(source) => Err(refused(features, source, &next()?)),
    }
}

/// Makes the handshake for `features` with a descriptor of any process.
///
/// # Errors
/// If the kernel refuses it.
pub(super) fn handshake_of_another(
    uffd: OwnedFd, features: u64,
) -> Result<OwnedFd, UserfaultError> {
    match handshake(&uffd, features) {
        Ok(_) => Ok(uffd),
        // All processes have the same kernel, so one of this process tells what it offers.
        Err(source) => Err(match user_mode_only() {
            Ok(own) => refused(features, source, &own),
            Err(_) => UserfaultError::Handshake { source },
        }),
    }
}

/// Why the kernel has refused the handshake for `features` with `source`, as the unused descriptor
/// `unused` tells.
fn refused(features: u64, source: Errno, unused: &OwnedFd) -> UserfaultError {
    let offered = match handshake(unused, 0) {
        Ok(offered) => offered,
        Err(source) => return UserfaultError::Handshake { source },
    };
    let lacks = |bit: &u64| features & bit != 0 && offered & bit == 0;
    let missing: Vec<&str> =
        FEATURE_NAMES.iter().filter(|(_, bit)| lacks(bit)).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return UserfaultError::Handshake { source };
    }
    UserfaultError::Feature { missing: missing.join(", ") }
}

/// Opens a userfaultfd that reports faults from user mode only. This takes no privilege.
///
/// # Errors
/// If the kernel has none.
pub(super) fn open_user_mode_only() -> Result<OwnedFd, UserfaultError> {
    let uffd = user_mode_only().map_err(|source| UserfaultError::Open { source })?;
    handshake(&uffd, feature::MISSING_SHMEM | feature::MINOR_SHMEM)
        .map_err(|source| UserfaultError::Handshake { source })?;
    Ok(uffd)
}

fn user_mode_only() -> Result<OwnedFd, Errno> {
    /// `UFFD_USER_MODE_ONLY`, from the kernel's `linux/userfaultfd.h`.
    const USER_MODE_ONLY: u32 = 1;
    let flags = flags() | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
    // SAFETY: a new descriptor gives power over no memory before something is registered with it.
    unsafe { rustix::mm::userfaultfd(flags) }
}

/// Returns the features that the kernel offers.
fn handshake(uffd: &OwnedFd, features: u64) -> Result<u64, Errno> {
    let mut api = UffdioApi { api: API, features, ioctls: 0 };
    // SAFETY: the struct is the one of this number.
    unsafe { ioctl(uffd, Updater::<UFFDIO_API, _>::new(&mut api)) }?;
    Ok(api.features)
}

/// Opens one by the system call or the device.
fn open_any() -> Result<OwnedFd, UserfaultError> {
    match system_call() {
        Ok(uffd) => Ok(uffd),
        // For processes without privileges that may open the device (Linux 6.1).
        Err(source @ Errno::PERM) => Device::open()
            .map_err(|device| UserfaultError::NotAllowed { device, source })?
            .userfaultfd(),
        Err(source) => Err(UserfaultError::Open { source }),
    }
}

/// Opens one by the system call. `device` is why the device cannot be used instead.
pub(super) fn by_system_call(device: Errno) -> Result<OwnedFd, UserfaultError> {
    system_call().map_err(|source| match source {
        Errno::PERM => UserfaultError::NotAllowed { device, source },
        source => UserfaultError::Open { source },
    })
}

fn system_call() -> Result<OwnedFd, Errno> {
    // SAFETY: an fd that is new gives power over no memory before something is registered with it.
    unsafe { rustix::mm::userfaultfd(flags()) }
}

/// Not `UFFD_USER_MODE_ONLY`: accesses of a vCPU fault inside KVM.
fn flags() -> UserfaultfdFlags {
    UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK
}

/// `/dev/userfaultfd`, which gives userfaultfds without any other right.
#[derive(Debug)]
pub(super) struct Device(OwnedFd);

impl Device {
    pub(super) fn open() -> Result<Self, Errno> {
        rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map(Self)
    }

    pub(super) fn userfaultfd(&self) -> Result<OwnedFd, UserfaultError> {
        // SAFETY: the argument is a number, and the return value a new fd.
        unsafe { ioctl(&self.0, NewUserfaultfd(flags().bits())) }
            .map_err(|source| UserfaultError::Open { source })
    }
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
    fn the_device_gives_what_the_system_call_gives() {
        match Device::open() {
            Ok(device) => assert!(handshake(&device.userfaultfd().unwrap(), 0).is_ok()),
            Err(error) => eprintln!("skipped: /dev/userfaultfd: {error}"),
        }
    }
}
