// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file under guest memory: what it must be. The client checks it before any agent has it, and
//! the agent checks it again, since it trusts no one.

use super::PAGE_SIZE;
use rustix::fs::{OFlags, SealFlags};
use rustix::io::Errno;
use std::os::fd::BorrowedFd;

/// `f_type` of hugetlbfs, from the kernel's `linux/magic.h`.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// `f_type` of tmpfs, and thereby of a memfd, from the kernel's `linux/magic.h`.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// The kind of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackingKind {
    /// A memfd or a file on tmpfs: has holes and reports them.
    Shmem,
    /// hugetlbfs: no `write`, and does not report its holes.
    Hugetlb,
    /// A file on a disk: reports holes if the file system does.
    File,
    /// A private mapping of the base of an image: what is written is memory of the VMM alone.
    Clone,
}

/// A file that can be guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryFile {
    /// The kind of the file.
    pub kind: BackingKind,
    /// The allocation unit in bytes.
    pub host_page_size: u64,
    /// True if the file cannot shrink (`F_SEAL_SHRINK`).
    pub sealed: bool,
    /// False if the file is sealed against writing (`F_SEAL_WRITE`, `F_SEAL_FUTURE_WRITE`). Then no
    /// guest can arrive in it, since nothing can be written to it or freed in it.
    pub writable: bool,
}

/// Why a file cannot be the memory of a block.
#[derive(Debug, thiserror::Error)]
pub enum MemoryFileError {
    /// Not a file of memory.
    #[error("memory fd is not a regular file or memfd (mode {mode:#o})")]
    NotARegularFile {
        /// `st_mode`.
        mode: u32,
    },
    /// The descriptor cannot both read and write.
    #[error("memory fd is open {mode}, allowed: O_RDWR")]
    NotReadWrite {
        /// How it is open.
        mode: &'static str,
    },
    /// The descriptor has a flag that changes what reads or writes do.
    #[error("memory fd is open with {flag}: {why}; allowed: O_RDWR without it")]
    OpenFlag {
        /// The flag.
        flag: &'static str,
        /// What it would do.
        why: &'static str,
    },
    /// The file can only be mapped, such as one of memfd_secret.
    #[error(
        "memory fd has no {what}: it is of a kind that can only be mapped; allowed: memfds, tmpfs, hugetlbfs, files on a disk"
    )]
    MapOnly {
        /// The system call that it lacks.
        what: &'static str,
    },
    /// The file ends before the block does.
    #[error("file of {size:#x} bytes is shorter than fd_offset {offset:#x} + length {length:#x}")]
    TooShort {
        /// Size of the file in bytes.
        size: u64,
        /// Offset of the block in bytes.
        offset: u64,
        /// Length of the block in bytes.
        length: u64,
    },
    /// `fd_offset` or the length does not fit the host pages.
    #[error("{field} {value:#x} is not a multiple of the host page size {host_page_size:#x}")]
    Unaligned {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The backing's allocation unit in bytes.
        host_page_size: u64,
    },
    /// A clone's memory is no base.
    #[error(
        "the base of a clone must be on tmpfs, and this file is not; Client::open_base opens it"
    )]
    NoBase,
    /// The kernel refused.
    #[error("cannot {what}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
}

impl MemoryFile {
    /// Checks that `length` bytes of `fd` from `offset` can be a block.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn check(fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Self, MemoryFileError> {
        let (kind, host_page_size) = check_place(fd, offset, length)?;
        check_flags(rustix::fs::fcntl_getfl(fd).map_err(kernel("get the flags"))?)?;
        check_usable(fd, kind)?;
        // Only a memfd has seals; other files answer EINVAL and can always shrink.
        let seals = rustix::fs::fcntl_get_seals(fd).unwrap_or(SealFlags::empty());
        let sealed = seals.contains(SealFlags::SHRINK);
        let writable = !seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE);
        Ok(Self { kind, host_page_size, sealed, writable })
    }

    /// Checks that `length` bytes of `fd` from `offset` can be the base of a clone's block.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn check_base(
        fd: BorrowedFd<'_>, offset: u64, length: u64,
    ) -> Result<Self, MemoryFileError> {
        match check_place(fd, offset, length)? {
            (BackingKind::Shmem, host_page_size) => {
                let kind = BackingKind::Clone;
                Ok(Self { kind, host_page_size, sealed: false, writable: false })
            }
            _ => Err(MemoryFileError::NoBase),
        }
    }
}

/// Checks the place of the block in the file. Returns the kind of the file, and the size of a host
/// page in bytes.
fn check_place(
    fd: BorrowedFd<'_>, offset: u64, length: u64,
) -> Result<(BackingKind, u64), MemoryFileError> {
    let stat = rustix::fs::fstat(fd).map_err(kernel("fstat"))?;
    if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
        return Err(MemoryFileError::NotARegularFile { mode: stat.st_mode });
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if offset.checked_add(length).is_none_or(|end| end > size) {
        return Err(MemoryFileError::TooShort { size, offset, length });
    }
    let statfs = rustix::fs::fstatfs(fd).map_err(kernel("fstatfs"))?;
    // The field's type differs between architectures; the magic is 32 bits on all.
    let (kind, host_page_size) = match statfs.f_type as u64 & 0xffff_ffff {
        HUGETLBFS_MAGIC => (BackingKind::Hugetlb, statfs.f_bsize as u64),
        TMPFS_MAGIC => (BackingKind::Shmem, PAGE_SIZE),
        _ => (BackingKind::File, PAGE_SIZE),
    };
    for (field, value) in [("fd_offset", offset), ("length", length)] {
        if value % host_page_size != 0 {
            return Err(MemoryFileError::Unaligned { field, value, host_page_size });
        }
    }
    Ok((kind, host_page_size))
}

/// True if the file is on tmpfs, as every memfd of ordinary pages is.
///
/// # Errors
/// If the kernel refuses.
pub fn is_tmpfs(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    rustix::fs::fstatfs(fd).map(|statfs| statfs.f_type as u64 & 0xffff_ffff == TMPFS_MAGIC)
}

fn kernel(what: &'static str) -> impl Fn(Errno) -> MemoryFileError {
    move |source| MemoryFileError::Kernel { what, source }
}

/// Refuses flags of the descriptor with which reads, writes and punches at an offset would do
/// something else.
fn check_flags(flags: OFlags) -> Result<(), MemoryFileError> {
    if flags.contains(OFlags::PATH) {
        return Err(MemoryFileError::NotReadWrite { mode: "O_PATH" });
    }
    match flags & OFlags::ACCMODE {
        OFlags::RDWR => {}
        OFlags::RDONLY => return Err(MemoryFileError::NotReadWrite { mode: "O_RDONLY" }),
        OFlags::WRONLY => return Err(MemoryFileError::NotReadWrite { mode: "O_WRONLY" }),
        _ => return Err(MemoryFileError::NotReadWrite { mode: "with access mode 3" }),
    }
    let refused = [
        (
            OFlags::APPEND,
            "O_APPEND",
            "Linux then writes at the end of the file, wherever pwrite is to",
        ),
        (
            OFlags::DIRECT,
            "O_DIRECT",
            "it passes by the pages that the guest has mapped, and takes aligned buffers only",
        ),
    ];
    match refused.into_iter().find(|(flag, ..)| flags.contains(*flag)) {
        Some((_, flag, why)) => Err(MemoryFileError::OpenFlag { flag, why }),
        None => Ok(()),
    }
}

/// Refuses a file that has no `read` or `write`. Reads and writes no byte of it. A memfd that is
/// sealed against writing has both; see [`MemoryFile::writable`].
fn check_usable(fd: BorrowedFd<'_>, kind: BackingKind) -> Result<(), MemoryFileError> {
    // Zero bytes: shows only whether the file system has the call.
    if rustix::io::pread(fd, &mut [0u8; 0][..], 0).is_err() {
        return Err(MemoryFileError::MapOnly { what: "read" });
    }
    if kind != BackingKind::Hugetlb && rustix::io::pwrite(fd, &[], 0).is_err() {
        return Err(MemoryFileError::MapOnly { what: "write" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::os::fd::{AsFd, OwnedFd};

    fn memfd(pages: u64) -> OwnedFd {
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, pages * PAGE_SIZE).unwrap();
        fd
    }

    fn check(fd: &OwnedFd, offset: u64, length: u64) -> Result<MemoryFile, MemoryFileError> {
        MemoryFile::check(fd.as_fd(), offset, length)
    }

    #[test]
    fn host_page_size_is_that_of_the_file() {
        assert_eq!(check(&memfd(1), 0, PAGE_SIZE).unwrap().host_page_size, PAGE_SIZE);
        match memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)
        {
            Ok(huge) => assert_eq!(check(&huge, 0, 0).unwrap().host_page_size, 2 << 20),
            Err(errno) => {
                assert!(
                    !std::env::var("PAGEFERRY_REQUIRE").unwrap_or_default().contains("hugetlb"),
                    "PAGEFERRY_REQUIRE names hugetlb: {errno}"
                );
                eprintln!("skipped: no huge pages of 2 MiB here: {errno}");
            }
        }
    }

    #[test]
    fn a_file_that_cannot_hold_the_block_is_refused_with_its_size() {
        let error = check(&memfd(4), 0x1000, 4 * PAGE_SIZE).unwrap_err();
        assert_eq!(
            error.to_string(),
            "file of 0x4000 bytes is shorter than fd_offset 0x1000 + length 0x4000"
        );
        assert!(matches!(check(&memfd(4), u64::MAX, 2), Err(MemoryFileError::TooShort { .. })));
        assert!(matches!(check(&memfd(4), 1, PAGE_SIZE), Err(MemoryFileError::Unaligned { .. })));
        let (pipe, _write) = rustix::pipe::pipe().unwrap();
        assert!(matches!(check(&pipe, 0, 0), Err(MemoryFileError::NotARegularFile { .. })));
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(PAGE_SIZE).unwrap();
    }

    #[test]
    fn a_descriptor_that_would_not_do_what_it_is_asked_is_refused_by_name() {
        use rustix::fs::{Mode, open};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        std::fs::write(&path, [0; PAGE_SIZE as usize]).unwrap();
        // A memfd is opened once more by its name here.
        let kept = memfd(1);
        let shmem = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&kept));
        let refused = |path: &str, flags| {
            let fd = open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
            check(&fd, 0, PAGE_SIZE).map(|_| ()).map_err(|error| error.to_string())
        };
        for path in [path.to_str().unwrap(), &shmem] {
            for (flags, named) in [
                (OFlags::RDWR | OFlags::APPEND, "memory fd is open with O_APPEND: "),
                (OFlags::PATH, "memory fd is open O_PATH, allowed: O_RDWR"),
                (OFlags::RDONLY, "memory fd is open O_RDONLY, allowed: O_RDWR"),
                (OFlags::WRONLY, "memory fd is open O_WRONLY, allowed: O_RDWR"),
                (OFlags::ACCMODE, "memory fd is open with access mode 3, allowed: O_RDWR"),
            ] {
                let error = refused(path, flags).unwrap_err();
                assert!(error.starts_with(named), "{path} {flags:?}: {error}");
            }
            assert_eq!(
                refused(path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOATIME),
                Ok(()),
                "these change nothing"
            );
        }
        // Not every file system takes it, but who sets it by fcntl may have it on any.
        let direct = memfd(1);
        if rustix::fs::fcntl_setfl(&direct, OFlags::DIRECT).is_ok() {
            let error = check(&direct, 0, PAGE_SIZE).unwrap_err().to_string();
            assert!(error.starts_with("memory fd is open with O_DIRECT: "), "{error}");
        }
        // What was set after it was made counts as well.
        let append = memfd(1);
        rustix::fs::fcntl_setfl(&append, OFlags::APPEND).unwrap();
        assert!(matches!(
            check(&append, 0, PAGE_SIZE),
            Err(MemoryFileError::OpenFlag { flag: "O_APPEND", .. })
        ));
    }
}
