// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A process that is not ours, and is never mistaken for another one.
//!
//! The kernel gives a process id to a new process once the old one is gone. [`TargetProcess`] holds
//! a pidfd and the folder `/proc/PID`, both opened at the start. Both stay with the process that
//! they were opened for: after its end they answer ESRCH, even if its id is in use again. Only
//! ptrace takes a process id; [`super::injection`] checks the pidfd after it has attached.

use super::denial::Denial;
use super::mappings::{MalformedLine, Mappings};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Why something about a process is not known or not possible.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// No process has this id, or it has ended.
    #[error("process {pid} does not exist, or has ended")]
    Gone {
        /// Its id.
        pid: u32,
    },
    /// The kernel does not allow it.
    #[error("not allowed to {action} process {pid}: {denial}")]
    Denied {
        /// Its id.
        pid: u32,
        /// What was tried.
        action: &'static str,
        /// Why it is not allowed, and what to do.
        denial: Denial,
    },
    /// The process has no such descriptor.
    #[error("process {pid} has no open descriptor {number}")]
    NoDescriptor {
        /// Its id.
        pid: u32,
        /// The number of the descriptor.
        number: i32,
    },
    /// No descriptor is open for a file that the process maps.
    #[error(
        "process {pid} maps inode {inode} of device {major}:{minor} but holds no descriptor of it \
         that is open for reading and writing: give the VMM the file as one that it keeps open \
         (share=on, readonly=off)"
    )]
    NoDescriptorOfFile {
        /// Its id.
        pid: u32,
        /// The device of the file.
        major: u32,
        /// The device of the file.
        minor: u32,
        /// The inode of the file.
        inode: u64,
    },
    /// A line of `/proc/PID/maps` is not as documented.
    #[error("cannot read the mappings of process {pid}")]
    Mappings {
        /// Its id.
        pid: u32,
        /// The line.
        #[source]
        source: MalformedLine,
    },
    /// A field of `/proc/PID/status` is missing or not a number.
    #[error("/proc/{pid}/status has no valid {field}")]
    Status {
        /// Its id.
        pid: u32,
        /// The name of the field.
        field: &'static str,
    },
    /// Anything else that the kernel reports.
    #[error("cannot {action} process {pid}")]
    System {
        /// Its id.
        pid: u32,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A process, by pidfd.
#[derive(Debug)]
pub struct TargetProcess {
    pid: Pid,
    pidfd: OwnedFd,
    /// `/proc/PID`.
    folder: OwnedFd,
}

impl TargetProcess {
    /// Opens the process `pid`.
    ///
    /// # Errors
    /// If there is none, or `/proc` is not mounted.
    pub fn open(pid: u32) -> Result<Self, ProcessError> {
        let gone = ProcessError::Gone { pid };
        let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Err(gone) };
        let pidfd = match rustix::process::pidfd_open(raw, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH) => return Err(gone),
            Err(source) => {
                let action = "open a pidfd (is it a thread, and not a process?) of";
                return Err(ProcessError::System { pid, action, source: source.into() });
            }
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = match rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty()) {
            Ok(folder) => folder,
            Err(Errno::NOENT | Errno::SRCH) => return Err(gone),
            Err(source) => {
                let action = "open the folder in /proc of";
                return Err(ProcessError::System { pid, action, source: source.into() });
            }
        };
        let process = Self { pid: raw, pidfd, folder };
        // The process of the pidfd is still there, so the folder is that of the same process.
        if process.has_exited()? { Err(gone) } else { Ok(process) }
    }

    /// Readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Sends a signal to the process, and never to another one with the same number.
    ///
    /// # Errors
    /// If the process has ended, or this one may not.
    pub fn signal(&self, signal: Signal) -> Result<(), Errno> {
        rustix::process::pidfd_send_signal(&self.pidfd, signal)
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_pid().unsigned_abs()
    }

    /// The id as ptrace takes it.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn raw_pid(&self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// Another handle of the same process.
    ///
    /// # Errors
    /// If this process has too many descriptors.
    pub fn try_clone(&self) -> Result<Self, ProcessError> {
        let failed = |source| self.system("duplicate the pidfd of", source);
        let pidfd = self.pidfd.try_clone().map_err(failed)?;
        let folder = self.folder.try_clone().map_err(failed)?;
        Ok(Self { pid: self.pid, pidfd, folder })
    }

    /// True if all its threads have ended.
    ///
    /// # Errors
    /// What poll said.
    pub fn has_exited(&self) -> Result<bool, ProcessError> {
        self.wait(Some(Duration::ZERO))
    }

    /// Waits until it ends, at most `timeout`. True if it has ended.
    ///
    /// # Errors
    /// What poll said.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool, ProcessError> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, left.as_ref()) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(source) => return Err(self.system("wait for", source)),
            }
        }
    }

    /// Reads `/proc/PID/status`.
    ///
    /// # Errors
    /// If the process has ended.
    pub fn status(&self) -> Result<Status, ProcessError> {
        let mut text = String::new();
        self.open_file("status", "read the status of")?
            .read_to_string(&mut text)
            .map_err(|source| self.refused("read the status of", source))?;
        Status::parse(&text).map_err(|field| ProcessError::Status { pid: self.pid(), field })
    }

    /// True if the kernel lets a process of the same user read its memory and copy its files.
    ///
    /// A process is not dumpable after it has changed its user, or if its program has file
    /// capabilities or cannot be read (`PR_SET_DUMPABLE` in prctl(2)).
    ///
    /// # Errors
    /// If the process has ended.
    pub fn is_dumpable(&self) -> Result<bool, ProcessError> {
        let action = "look at the owner of the files in /proc of";
        // The folder itself always belongs to the user; its files belong to root if the process is
        // not dumpable (task_dump_owner() in fs/proc/base.c).
        let owner = rustix::fs::statat(&self.folder, "maps", rustix::fs::AtFlags::empty())
            .map_err(|source| self.refused(action, source))?
            .st_uid;
        if owner != self.status()?.uids[1] {
            return Ok(false);
        }
        // A process of root has files of root in any case.
        match self.open_file("maps", action) {
            Ok(_) => Ok(true),
            Err(ProcessError::Denied { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Copies its descriptor `number`.
    ///
    /// # Errors
    /// If it has none, or this process may not.
    pub fn file(&self, number: i32) -> Result<OwnedFd, ProcessError> {
        match rustix::process::pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty()) {
            Ok(file) => Ok(file),
            Err(Errno::BADF) => Err(ProcessError::NoDescriptor { pid: self.pid(), number }),
            Err(source) => Err(self.refused("copy a descriptor of", source)),
        }
    }

    /// Opens its `/proc/PID/pagemap`.
    ///
    /// # Errors
    /// If the process has ended, or this process may not.
    pub fn pagemap(&self) -> Result<OwnedFd, ProcessError> {
        self.open_file("pagemap", "open the pagemap of").map(OwnedFd::from)
    }

    /// Reads what it maps.
    ///
    /// The process runs meanwhile. The kernel lists one mapping after the other, and one that grows
    /// or is merged between two of them can be listed over its neighbour (seen with Linux 6.18).
    /// Then all is read again.
    ///
    /// # Errors
    /// If the process has ended, or this process may not.
    pub fn mappings(&self) -> Result<Mappings, ProcessError> {
        /// How often a list is read that has no order.
        const ATTEMPTS: u32 = 50;
        let action = "read the mappings of";
        let mut attempts = 1;
        loop {
            let mut text = Vec::new();
            self.open_file("maps", action)?
                .read_to_end(&mut text)
                .map_err(|source| self.refused(action, source))?;
            match Mappings::parse(&text) {
                Ok(mappings) => return Ok(mappings),
                Err(error) if attempts < ATTEMPTS => {
                    log::debug!("the mappings of process {} change: {error}", self.pid());
                    attempts += 1;
                }
                Err(source) => {
                    return Err(ProcessError::Mappings { pid: self.pid(), source });
                }
            }
        }
    }

    /// Its memory, for reading.
    pub(super) fn memory(&self) -> Result<File, ProcessError> {
        self.open_file("mem", "read the memory of")
    }

    /// Its folder `/proc/PID`. Files in it fail with ESRCH or ENOENT after the end of the process.
    pub(super) fn folder(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    fn open_file(&self, name: &str, action: &'static str) -> Result<File, ProcessError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.folder, name, flags, Mode::empty()) {
            Ok(file) => Ok(file.into()),
            Err(source) => Err(self.refused(action, source)),
        }
    }

    /// The error for something that failed with `source`.
    pub(super) fn refused(
        &self, action: &'static str, source: impl Into<io::Error>,
    ) -> ProcessError {
        let (pid, source) = (self.pid(), source.into());
        match Errno::from_io_error(&source) {
            Some(Errno::SRCH | Errno::NOENT) => ProcessError::Gone { pid },
            Some(Errno::PERM | Errno::ACCESS) => {
                ProcessError::Denied { pid, action, denial: Denial::of(self) }
            }
            _ => ProcessError::System { pid, action, source },
        }
    }

    fn system(&self, action: &'static str, source: impl Into<io::Error>) -> ProcessError {
        ProcessError::System { pid: self.pid(), action, source: source.into() }
    }
}

/// A part of `/proc/PID/status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The state of the main thread: `R`, `S`, `D`, `T`, `t`, `Z` and others.
    pub state: char,
    /// The thread that traces the main thread; 0 if there is none.
    pub tracer: u32,
    /// Real, effective, saved and file system user.
    pub uids: [u32; 4],
    /// Signals that the process ignores; bit 0 is signal 1.
    pub ignored_signals: u64,
    /// Permitted capabilities of the main thread.
    pub permitted_capabilities: u64,
    /// Effective capabilities of the main thread.
    pub effective_capabilities: u64,
    /// Seccomp mode of the main thread: 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
}

impl Status {
    /// The error is the name of the field that is missing or malformed.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        let field = |name: &'static str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
                .ok_or(name)
        };
        let number = |name| field(name)?.parse().map_err(|_| name);
        let mask = |name| u64::from_str_radix(field(name)?, 16).map_err(|_| name);
        let mut uids = [0; 4];
        let mut words = field("Uid")?.split_ascii_whitespace();
        for uid in &mut uids {
            *uid = words.next().and_then(|word| word.parse().ok()).ok_or("Uid")?;
        }
        Ok(Self {
            state: field("State")?.chars().next().ok_or("State")?,
            tracer: number("TracerPid")?,
            uids,
            ignored_signals: mask("SigIgn")?,
            permitted_capabilities: mask("CapPrm")?,
            effective_capabilities: mask("CapEff")?,
            // Absent if the kernel has no seccomp.
            seccomp: field("Seccomp").map_or(Ok(0), |_| number("Seccomp"))?,
        })
    }
}
