// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A child process, and the memory that it shares with the test.

use crate::process::target::TargetProcess;
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Environment variable: what the child does.
pub(super) const ROLE: &str = "PAGEFERRY_ATTACH_ROLE";
/// Environment variable: path of the shared file.
pub(super) const SHARED: &str = "PAGEFERRY_ATTACH_SHARED";
/// Environment variable: the process that the role concerns.
const OTHER: &str = "PAGEFERRY_ATTACH_OTHER";

pub(super) const PAGE: u64 = 4096;
/// Where the memory of the guest begins in the file.
pub(super) const GUEST_OFFSET: u64 = 1 << 20;
/// Its size.
pub(super) const GUEST_SIZE: u64 = 64 * PAGE;

/// A test fails after this.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Counters that test and child share.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Board {
    /// Set by the test: end.
    pub(super) end: AtomicU64,
    /// Set by the child: how often it did what it does.
    pub(super) rounds: AtomicU64,
    /// Signals that its handler saw.
    pub(super) signals: AtomicU64,
    /// Address of the memory of the guest in the child.
    pub(super) guest: AtomicU64,
    /// What the child is to do next in the role of a guest: see [`super::roles`].
    pub(super) command: AtomicU64,
    /// What it read last.
    pub(super) seen: AtomicU64,
}

/// Maps the first page of the file.
pub(super) fn map_board(file: &OwnedFd) -> &'static Board {
    let address = map(file, 0, PAGE);
    // SAFETY: the mapping is never unmapped, is large enough, and zeros are a valid board.
    unsafe { &*std::ptr::with_exposed_provenance(address as usize) }
}

/// Maps a part of the file, for ever.
pub(super) fn map(file: &OwnedFd, offset: u64, length: u64) -> u64 {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping.
    let start = unsafe {
        let null = std::ptr::null_mut();
        rustix::mm::mmap(null, length as usize, access, MapFlags::SHARED, file, offset)
    };
    start.unwrap().expose_provenance() as u64
}

/// Opens the file that the test shares with this child.
pub(super) fn shared_file() -> OwnedFd {
    let path = std::env::var_os(SHARED).unwrap();
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// A child with a role. Killed when it is dropped.
pub(super) struct Role {
    child: Child,
    pub(super) board: &'static Board,
    pub(super) file: OwnedFd,
    pub(super) target: TargetProcess,
}

impl Role {
    /// Starts a child, and waits until it has done its first round.
    pub(super) fn start(role: &str) -> Self {
        let file = rustix::fs::memfd_create("guest ram", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, GUEST_OFFSET + GUEST_SIZE).unwrap();
        let board = map_board(&file);
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let mut child = command(role).env(SHARED, path).spawn().unwrap();
        let target = TargetProcess::open(child.id()).unwrap();
        wait_for(&format!("the child {role}"), || {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the child {role} ended: {status}");
            }
            board.rounds.load(Ordering::SeqCst) > 0
        });
        Self { child, board, file, target }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn rounds(&self) -> u64 {
        self.board.rounds.load(Ordering::SeqCst)
    }

    /// Waits until its main thread is in the system call `number`, or in one that the kernel has
    /// restarted.
    pub(super) fn wait_until_in(&self, number: i64) {
        let path = format!("/proc/{}/syscall", self.pid());
        wait_for(&format!("system call {number}"), || {
            let text = std::fs::read_to_string(&path).unwrap();
            let current = text.split(' ').next().and_then(|word| word.parse::<i64>().ok());
            current.is_some_and(|current| [number, libc::SYS_restart_syscall].contains(&current))
        });
    }

    /// Waits until the state of its main thread is `state`.
    pub(super) fn wait_for_state(&self, state: char) {
        wait_for(&format!("state {state}"), || self.target.status().unwrap().state == state);
    }

    pub(super) fn send(&self, signal: i32) {
        // SAFETY: the call takes numbers; the child is ours, and not waited for yet.
        assert_eq!(unsafe { libc::kill(self.pid().cast_signed(), signal) }, 0);
    }

    /// Has it do a command, without waiting for the end.
    pub(super) fn order(&self, command: u64) {
        self.board.command.store(command, Ordering::SeqCst);
    }

    /// Waits until its command is done.
    pub(super) fn wait_until_done(&self) {
        wait_for("the command", || self.board.command.load(Ordering::SeqCst) == 0);
    }

    /// Asks it to end, and waits for that.
    pub(super) fn end(mut self) -> ExitStatus {
        self.board.end.store(1, Ordering::SeqCst);
        wait_for("the end of the child", || self.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap()
    }

    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// This program, with that role. It plays it on its main thread.
fn command(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(ROLE, role).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Runs a role that concerns the child `other`, to its end.
pub(super) fn run_on(role: &str, other: &Role) -> ExitStatus {
    command(role).env(OTHER, other.pid().to_string()).status().unwrap()
}

/// The child that a role concerns.
pub(super) fn other_child() -> TargetProcess {
    TargetProcess::open(std::env::var(OTHER).unwrap().parse().unwrap()).unwrap()
}

/// Runs a role as the user nobody, to its end.
pub(super) fn as_nobody(role: &str) {
    let mut command = command(role);
    command.uid(65534).gid(65534).stdout(Stdio::inherit());
    match command.status() {
        Ok(status) => assert!(status.success(), "{role} as nobody: {status}"),
        Err(error) => {
            let required = std::env::var("PAGEFERRY_REQUIRE").unwrap_or_default();
            assert!(!required.contains("nobody"), "PAGEFERRY_REQUIRE names nobody: {error}");
            eprintln!("skipped: cannot start a process of the user nobody: {error}");
        }
    }
}

/// Waits until `done` says so.
pub(super) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::yield_now();
    }
}
