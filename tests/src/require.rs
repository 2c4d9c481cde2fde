//! What a test needs of the machine, and what becomes of the test where the machine lacks it.
//!
//! ```no_run
//! # use pageferry_tests::require;
//! if !require::kvm() {
//!     return;
//! }
//! ```
//!
//! A need that is not met prints `skipped: why`. Where the environment variable `PAGEFERRY_REQUIRE` names it (comma
//! separated: `kvm,uffd,hugetlb`), the test fails instead: a machine that is meant to run everything must not skip in silence.

use kvm_ioctls::{Cap, Kvm};
use pageferry_agent::tracking::pagemap::Pagemap;
use pageferry_client::tracking::uffd::WriteProtect;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use std::error::Error;
use std::fmt::Write;
use std::os::fd::OwnedFd;

/// Size of the huge pages that [`hugetlb`] looks for, in bytes.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Name of the variable that turns skipping into failing.
pub const VARIABLE: &str = "PAGEFERRY_REQUIRE";

/// True if a VM can be made, and its dirty log be cleared by hand.
///
/// # Panics
/// If not, and `PAGEFERRY_REQUIRE` names `kvm`.
pub fn kvm() -> bool {
    met("kvm", try_kvm())
}

/// True if this process may track its memory by userfaultfd and PAGEMAP_SCAN.
///
/// # Panics
/// If not, and `PAGEFERRY_REQUIRE` names `uffd`.
pub fn uffd() -> bool {
    met("uffd", try_uffd())
}

/// True if there are `pages` free huge pages of 2 MiB at the moment.
///
/// # Panics
/// If not, and `PAGEFERRY_REQUIRE` names `hugetlb`.
pub fn hugetlb(pages: u64) -> bool {
    met("hugetlb", try_hugetlb(pages))
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

fn try_hugetlb(pages: u64) -> Result<(), Box<dyn Error>> {
    let fd = hugetlb_memfd(pages * HUGE_PAGE)?;
    fallocate(&fd, FallocateFlags::empty(), 0, pages * HUGE_PAGE).map_err(|error| {
        format!("{pages} huge pages of {HUGE_PAGE:#x} bytes: {error}; see /proc/sys/vm/nr_hugepages")
    })?;
    Ok(())
}

/// A memfd of huge pages of 2 MiB.
///
/// # Errors
/// If the kernel has none, or `length` is no multiple of their size.
pub fn hugetlb_memfd(length: u64) -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let fd = memfd_create("pageferry-test-huge", flags)?;
    ftruncate(&fd, length)?;
    Ok(fd)
}

/// Says why a need is not met: by a line, or by failing the test.
#[allow(clippy::panic)] // the one way to fail a test from a helper that every test calls
fn met(need: &str, found: Result<(), Box<dyn Error>>) -> bool {
    let Err(error) = found else { return true };
    let why = chain(error.as_ref());
    let required = std::env::var(VARIABLE).unwrap_or_default();
    if required.split(',').any(|name| name.trim() == need) {
        panic!("{VARIABLE} names {need}, and this machine lacks it: {why}");
    }
    eprintln!("skipped: {need}: {why}");
    false
}

/// An error with its causes in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
