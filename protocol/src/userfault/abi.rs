// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Numbers and layouts of the kernel's userfaultfd: `linux/userfaultfd.h`.

use rustix::ioctl::{Opcode, opcode};
use zerocopy::FromBytes;

/// Features to ask for (`UFFD_FEATURE_*`).
pub mod feature {
    #![allow(missing_docs)]
    pub const EVENT_REMOVE: u64 = 1 << 3;
    pub const MISSING_HUGETLBFS: u64 = 1 << 4;
    pub const MISSING_SHMEM: u64 = 1 << 5;
    pub const MINOR_SHMEM: u64 = 1 << 10;
    pub const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
    pub const WP_UNPOPULATED: u64 = 1 << 13;
    pub const POISON: u64 = 1 << 14;
    pub const WP_ASYNC: u64 = 1 << 15;
}

/// `UFFD_API`.
pub(super) const API: u64 = 0xaa;

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct UffdioApi {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

/// `struct uffdio_range`: addresses of the process that opened the descriptor.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct AddressRange {
    /// The first.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct UffdioRegister {
    pub(super) range: AddressRange,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct UffdioCopy {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) copy: i64,
}

/// `struct uffdio_zeropage` and `struct uffdio_poison`, which are alike.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct UffdioFill {
    pub(super) range: AddressRange,
    pub(super) mode: u64,
    pub(super) filled: i64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct UffdioWriteProtect {
    pub(super) range: AddressRange,
    pub(super) mode: u64,
}

/// `UFFDIO_WRITEPROTECT_MODE_WP`.
pub(super) const MODE_WP: u64 = 1;

/// `struct uffd_msg`, with the names of a page fault. A removal has its first address in `flags`
/// and the address after its last in `address`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, FromBytes, zerocopy::IntoBytes)]
pub(super) struct UffdMsg {
    pub(super) event: u8,
    pub(super) reserved: [u8; 7],
    pub(super) flags: u64,
    pub(super) address: u64,
    pub(super) thread: u64,
}

/// `UFFD_EVENT_PAGEFAULT`.
pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
/// `UFFD_EVENT_REMOVE`.
pub(super) const EVENT_REMOVE: u8 = 0x15;

pub(super) const GROUP: u8 = 0xaa;
pub(super) const UFFDIO_API: Opcode = opcode::read_write::<UffdioApi>(GROUP, 0x3f);
pub(super) const UFFDIO_REGISTER: Opcode = opcode::read_write::<UffdioRegister>(GROUP, 0x00);
pub(super) const UFFDIO_UNREGISTER: Opcode = opcode::read::<AddressRange>(GROUP, 0x01);
pub(super) const UFFDIO_WAKE: Opcode = opcode::read::<AddressRange>(GROUP, 0x02);
pub(super) const UFFDIO_COPY: Opcode = opcode::read_write::<UffdioCopy>(GROUP, 0x03);
pub(super) const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<UffdioFill>(GROUP, 0x04);
pub(super) const UFFDIO_WRITEPROTECT: Opcode =
    opcode::read_write::<UffdioWriteProtect>(GROUP, 0x06);
pub(super) const UFFDIO_CONTINUE: Opcode = opcode::read_write::<UffdioFill>(GROUP, 0x07);
pub(super) const UFFDIO_POISON: Opcode = opcode::read_write::<UffdioFill>(GROUP, 0x08);
pub(super) const USERFAULTFD_IOC_NEW: Opcode = opcode::none(GROUP, 0x00);

#[cfg(test)]
mod tests {
    use super::*;

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
}
