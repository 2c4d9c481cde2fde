// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a test needs of the machine, and what happens if the machine lacks it.
//!
//! ```no_run
//! # use pageferry_tests::require;
//! if !require::kvm() {
//!     return;
//! }
//! let Some(_pool) = require::hugetlb(4) else { return };
//! ```
//!
//! If a need is not met, the test prints `skipped: why`. If the environment variable
//! `PAGEFERRY_REQUIRE` names the need (comma separated:
//! `kvm,uffd,hugetlb,thp,tmpfs,huge-tmpfs,cgroup,net,disk,qemu,stores`), the test fails instead. So
//! a machine that should run everything skips nothing unnoticed.

use crate::huge_pages::HugePages;
use crate::linux_guest::QemuTools;
use crate::memory_group::MemoryGroup;
use crate::stores::StoreTools;
use crate::tmpfs::{Tmpfs, hands_out_huge_pages};
use kvm_ioctls::{Cap, Kvm};
use pageferry_agent::pagemap::Pagemap;
use pageferry_client::tracking::uffd::WriteProtect;
use pageferry_protocol::error::chain;
use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::process::Command;

/// Name of the variable with the needs that must be met.
pub const VARIABLE: &str = "PAGEFERRY_REQUIRE";

/// True if a VM can be created, and its dirty log can be cleared by hand.
///
/// # Panics
/// If not, and `PAGEFERRY_REQUIRE` names `kvm`.
pub fn kvm() -> bool {
    met("kvm", try_kvm()).is_some()
}

/// True if this process may track its memory by userfaultfd and PAGEMAP_SCAN.
///
/// # Panics
/// If not, and `PAGEFERRY_REQUIRE` names `uffd`.
pub fn uffd() -> bool {
    met("uffd", try_uffd()).is_some()
}

/// `pages` free huge pages of 2 MiB. Missing ones are added to the kernel's pool. `None` if there
/// is no room for them. Until the caller drops the value, no other test of this or another process
/// has huge pages.
///
/// # Panics
/// If there is no room, and `PAGEFERRY_REQUIRE` names `hugetlb`.
pub fn hugetlb(pages: u64) -> Option<HugePages> {
    met("hugetlb", HugePages::reserve(pages).map_err(Into::into))
}

/// True if the kernel uses transparent huge pages for shared memory without a request for each
/// mapping.
///
/// # Panics
/// If not, and `PAGEFERRY_REQUIRE` names `thp`.
pub fn thp() -> bool {
    met("thp", try_thp()).is_some()
}

/// A way to give a process a small file system of its own.
///
/// # Panics
/// If there is none, and `PAGEFERRY_REQUIRE` names `tmpfs`.
pub fn tmpfs() -> Option<Tmpfs> {
    met("tmpfs", Tmpfs::find().map_err(Into::into))
}

/// Like [`tmpfs`], if a tmpfs with `huge=always` hands out huge pages for small writes.
///
/// # Panics
/// If there is none, and `PAGEFERRY_REQUIRE` names `huge-tmpfs`.
pub fn huge_tmpfs() -> Option<Tmpfs> {
    let tmpfs = tmpfs()?;
    let tried =
        tmpfs.file("size=16M,huge=always", 4 << 20).and_then(|file| hands_out_huge_pages(&file));
    met("huge-tmpfs", tried.map(|()| tmpfs).map_err(Into::into))
}

/// A control group whose processes may use `limit` bytes of memory.
///
/// # Panics
/// If there is none, and `PAGEFERRY_REQUIRE` names `cgroup`.
pub fn memory_group(limit: u64) -> Option<MemoryGroup> {
    met("cgroup", MemoryGroup::new(limit).map_err(Into::into))
}

/// A file of `length` bytes in `folder`, which must be on a disk.
///
/// # Panics
/// If it is not, and `PAGEFERRY_REQUIRE` names `disk`.
pub fn file_on_disk(folder: &Path, length: u64) -> Option<File> {
    met("disk", try_file_on_disk(folder, length))
}

fn try_file_on_disk(folder: &Path, length: u64) -> Result<File, Box<dyn Error>> {
    /// `TMPFS_MAGIC` of `linux/magic.h`.
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    let file = tempfile::tempfile_in(folder)?;
    if rustix::fs::fstatfs(&file)?.f_type as u64 == TMPFS_MAGIC {
        return Err(format!("{} is a tmpfs", folder.display()).into());
    }
    file.set_len(length)?;
    Ok(file)
}

/// The options of `unshare` that give a process its own network and mounts. Root needs no user
/// namespace, except in a container that allows nothing else. With these options `sh`, `ip` and
/// `mount` work.
///
/// # Panics
/// If nothing works, and `PAGEFERRY_REQUIRE` names `net`.
pub fn net_namespace() -> Option<&'static str> {
    met("net", try_net_namespace())
}

/// The QEMUs and the Linux guest that `tests/guests/install` gets.
///
/// # Panics
/// If they are not there, and `PAGEFERRY_REQUIRE` names `qemu`.
pub fn qemu() -> Option<QemuTools> {
    met("qemu", QemuTools::find().map_err(Into::into))
}

/// The servers of objects that `tests/stores/install` gets.
///
/// # Panics
/// If they are not there, and `PAGEFERRY_REQUIRE` names `stores`.
pub fn stores() -> Option<StoreTools> {
    met("stores", StoreTools::find().map_err(Into::into))
}

fn try_net_namespace() -> Result<&'static str, Box<dyn Error>> {
    let script = "ip link set lo up && ip route add default dev lo && mount --bind /dev/null /etc/resolv.conf";
    let mut said = String::new();
    for namespaces in ["-mn", "-Urmn"] {
        let output = Command::new("unshare").args([namespaces, "sh", "-c", script]).output();
        let output = output.map_err(|error| format!("run unshare: {error}"))?;
        if output.status.success() {
            return Ok(namespaces);
        }
        said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    }
    Err(said.into())
}

fn try_thp() -> Result<(), Box<dyn Error>> {
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let modes = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    if ["[always]", "[within_size]", "[force]"].iter().any(|mode| modes.contains(mode)) {
        return Ok(());
    }
    Err(format!("{path} is {}", modes.trim()).into())
}

fn try_kvm() -> Result<(), Box<dyn Error>> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm: {error}"))?;
    let vm = kvm.create_vm().map_err(|error| format!("KVM_CREATE_VM: {error}"))?;
    match vm.check_extension_raw(u64::from(kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)) {
        options if options & 1 == 1 && vm.check_extension(Cap::UserMemory) => Ok(()),
        options => Err(format!("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is {options:#x}").into()),
    }
}

fn try_uffd() -> Result<(), Box<dyn Error>> {
    let write_protect = WriteProtect::register(&[])?;
    Pagemap::new(write_protect.pagemap().try_clone_to_owned()?)?;
    Ok(())
}

/// The result of a check that only the test itself can make. If the check failed, prints the reason
/// and returns `None`.
///
/// # Panics
/// If the check failed, and `PAGEFERRY_REQUIRE` names `need`.
#[allow(clippy::panic)] // the one way to fail a test from a helper that every test calls
pub fn met<T>(need: &str, found: Result<T, Box<dyn Error>>) -> Option<T> {
    let error = match found {
        Ok(found) => return Some(found),
        Err(error) => error,
    };
    let why = chain(error.as_ref());
    let required = std::env::var(VARIABLE).unwrap_or_default();
    if required.split(',').any(|name| name.trim() == need) {
        panic!("{VARIABLE} names {need}, and this machine lacks it: {why}");
    }
    eprintln!("skipped: {need}: {why}");
    None
}
