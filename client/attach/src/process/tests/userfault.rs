// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Userfaultfds that a child creates for us.

use super::child::{GUEST_SIZE, PAGE, Role, as_nobody, wait_for};
use super::roles::{READ, WRITE};
use crate::process::denial::Denial;
use crate::process::injection::{InjectionError, Seccomp};
use crate::process::target::ProcessError;
use crate::process::userfault::{
    CreateOptions, Created, RemoteUserfaultError, close_kept, create_userfaultfd,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;

const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const MISSING: u64 = 1;
const WRITE_PROTECT: u64 = 2;
const FEATURE_WP_ASYNC: u64 = 1 << 15 | 1 << 13 | 1 << 12;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const PAGEMAP_SCAN: u64 = 0xc060_6610;
const PAGE_IS_WRITTEN: u64 = 2;

/// An ioctl whose argument is an array of words.
fn ioctl<const N: usize>(fd: &OwnedFd, request: u64, words: &mut [u64; N]) -> i32 {
    // SAFETY: the callers give as many words as the request takes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, words.as_mut_ptr()) };
    assert!(result >= 0, "ioctl {request:#x}: {}", std::io::Error::last_os_error());
    result
}

fn register(fd: &OwnedFd, guest: u64, features: u64, mode: u64) {
    ioctl(fd, UFFDIO_API, &mut [0xaa, features, 0]);
    ioctl(fd, UFFDIO_REGISTER, &mut [guest, GUEST_SIZE, mode, 0]);
}

/// Pages that were written since the last call.
fn written(pagemap: &OwnedFd, guest: u64) -> Vec<u64> {
    let mut regions = [[0_u64; 3]; 64];
    let (start, end) = (guest, guest + GUEST_SIZE);
    let place = regions.as_mut_ptr().expose_provenance() as u64;
    let (mask, flags) = (PAGE_IS_WRITTEN, 1 | 2);
    let mut scan = [96, flags, start, end, 0, place, 64, 0, 0, mask, 0, mask];
    let count = ioctl(pagemap, PAGEMAP_SCAN, &mut scan);
    let pages = |[start, end, _]: &[u64; 3]| (start - guest) / PAGE..(end - guest) / PAGE;
    regions[..count as usize].iter().flat_map(pages).collect()
}

/// Names of the userfaultfds that the child has open.
fn userfaultfds(role: &Role) -> usize {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", role.pid())).unwrap();
    let links = entries.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    links.filter(|link| link.to_string_lossy().contains("userfaultfd")).count()
}

/// Tracks the writes of a child, as root and as nobody.
pub(super) fn tracks_writes(keep: bool) {
    let role = Role::start("guest");
    let guest = role.board.guest.load(Ordering::SeqCst);
    let options = CreateOptions { user_mode_only: true, keep, ..CreateOptions::default() };
    let Created { fd, kept, stopped } = create_userfaultfd(&role.target, options).unwrap();
    eprintln!("stopped {stopped:?}");
    assert_eq!((kept.is_some(), userfaultfds(&role)), (keep, usize::from(keep)));
    register(&fd, guest, FEATURE_WP_ASYNC, WRITE_PROTECT);
    let pagemap = role.target.pagemap().unwrap();
    written(&pagemap, guest);
    assert!(written(&pagemap, guest).is_empty());
    for page in [3, 7] {
        role.order(WRITE | page);
        role.wait_until_done();
    }
    role.order(READ | 9);
    role.wait_until_done();
    assert_eq!(written(&pagemap, guest), [3, 7]);
    assert!(written(&pagemap, guest).is_empty());
    assert!(role.end().success());
}

#[test]
fn writes_are_tracked_from_outside() {
    tracks_writes(false);
    tracks_writes(true);
}

#[test]
fn writes_are_tracked_by_an_unprivileged_user() {
    as_nobody("tracks writes");
}

#[test]
fn an_unprivileged_user_is_told_why_not() {
    as_nobody("is refused");
}

/// Runs as nobody.
pub(super) fn is_refused_without_privileges() {
    let create = |role: &Role, user_mode_only, seccomp| {
        let options = CreateOptions { user_mode_only, seccomp, keep: false };
        create_userfaultfd(&role.target, options).unwrap_err()
    };
    let role = Role::start("guest");
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    if allowed.trim() == "0" {
        let error = create(&role, false, Seccomp::Unknown);
        assert!(matches!(error, RemoteUserfaultError::NotAllowed { .. }), "{error}");
    }
    assert_eq!(userfaultfds(&role), 0);
    assert!(role.end().success());

    let role = Role::start("guest of kill");
    let error = create(&role, true, Seccomp::Unknown);
    let by_filter = InjectionError::Seccomp { pid: role.pid(), mode: 2 };
    assert_eq!(error.to_string(), by_filter.to_string());
    assert!(role.end().success());

    let role = Role::start("guest of trap");
    let error = create(&role, true, Seccomp::Harmless);
    assert!(matches!(error, RemoteUserfaultError::Forbidden { .. }), "{error}");
    // No handler of the child has seen it.
    assert_eq!(role.board.signals.load(Ordering::SeqCst), 0);
    let caught = std::fs::read_to_string(format!("/proc/{}/status", role.pid())).unwrap();
    let caught = caught.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim();
    let caught = u64::from_str_radix(caught, 16).unwrap();
    assert_ne!(caught & 1 << (libc::SIGSYS - 1), 0, "the handler is gone");
    assert!(role.end().success());

    let role = Role::start("guest, hidden");
    assert!(!role.target.is_dumpable().unwrap());
    let error = create(&role, true, Seccomp::Unknown);
    let RemoteUserfaultError::Injection(InjectionError::Process(ProcessError::Denied {
        denial,
        ..
    })) = &error
    else {
        panic!("{error}")
    };
    assert_eq!(denial, &Denial::NotDumpable);
    assert!(role.end().success());
}

#[test]
fn a_filter_that_kills_is_switched_off_for_the_call() {
    for name in ["guest of kill", "guest of trap"] {
        let role = Role::start(name);
        create_userfaultfd(&role.target, CreateOptions::default()).unwrap();
        assert!(role.end().success(), "{name}");
    }
}

/// Waits for a fault. Returns false if none came.
fn wait_for_fault(fd: &OwnedFd) {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&patience)), Ok(1), "no fault came");
}

fn place(fd: &OwnedFd, address: u64, value: u64) {
    let mut page = [0_u64; 512];
    page[0] = value;
    let source = page.as_ptr().expose_provenance() as u64;
    ioctl(fd, UFFDIO_COPY, &mut [address, source, PAGE, 0, 0]);
}

#[test]
fn missing_pages_are_served_from_outside_and_wait_for_the_next_server() {
    let role = Role::start("guest");
    let guest = role.board.guest.load(Ordering::SeqCst);
    let options = CreateOptions { keep: true, ..CreateOptions::default() };
    let Created { fd, kept, .. } = create_userfaultfd(&role.target, options).unwrap();
    let kept = kept.unwrap();
    register(&fd, guest, FEATURE_MISSING_SHMEM, MISSING);
    let seen = || role.board.seen.load(Ordering::SeqCst);

    role.order(READ | 5);
    wait_for_fault(&fd);
    let mut message = [0; 32];
    assert_eq!(rustix::io::read(&fd, &mut message), Ok(32));
    let address = u64::from_le_bytes(message[16..24].try_into().unwrap());
    assert_eq!(address & !(PAGE - 1), guest + 5 * PAGE);
    place(&fd, guest + 5 * PAGE, 55);
    role.wait_until_done();
    assert_eq!(seen(), 55);

    // Our descriptors are closed while it waits: it goes on waiting.
    role.order(READ | 6);
    wait_for_fault(&fd);
    drop(fd);
    let next = role.target.file(kept.number).unwrap();
    place(&next, guest + 6 * PAGE, 66);
    role.wait_until_done();
    assert_eq!(seen(), 66);
    drop(next);

    // The last one ends the registration: what is missing is zero.
    close_kept(&role.target, &kept, Seccomp::Unknown).unwrap();
    assert_eq!(userfaultfds(&role), 0);
    role.order(READ | 8);
    role.wait_until_done();
    assert_eq!(seen(), 0);
    let error = close_kept(&role.target, &kept, Seccomp::Unknown).unwrap_err();
    assert!(matches!(error, RemoteUserfaultError::NotThatUserfault { .. }), "{error}");
    assert!(role.end().success());
}

#[test]
fn another_userfaultfd_under_the_same_number_is_not_closed() {
    let role = Role::start("guest");
    let options = CreateOptions { keep: true, ..CreateOptions::default() };
    let first = create_userfaultfd(&role.target, options).unwrap().kept.unwrap();
    close_kept(&role.target, &first, Seccomp::Unknown).unwrap();
    let second = create_userfaultfd(&role.target, options).unwrap().kept.unwrap();
    assert_eq!(first.number, second.number);
    let error = close_kept(&role.target, &first, Seccomp::Unknown).unwrap_err();
    assert!(matches!(error, RemoteUserfaultError::NotThatUserfault { .. }), "{error}");
    assert_eq!(userfaultfds(&role), 1);
    let mut role = role;
    role.kill();
    let error = close_kept(&role.target, &second, Seccomp::Unknown).unwrap_err();
    wait_for("the end", || role.target.has_exited().unwrap());
    assert!(error.to_string().contains("has ended"), "{error}");
}
