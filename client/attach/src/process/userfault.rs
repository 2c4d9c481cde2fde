// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Userfaultfds for the address space of another process.
//!
//! The process creates the descriptor itself ([`super::injection`]), and we copy it. All requests
//! on the copy concern the process that created it.
//!
//! The process can keep its own descriptor open. A registration ends when the last descriptor is
//! closed: threads that wait for a missing page then read zeros. With one descriptor in the
//! process they go on waiting if *we* die, and another program can take over.

use super::injection::{self, InjectionError, Seccomp};
use super::target::{ProcessError, TargetProcess};
use rustix::fs::AtFlags;
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// How long the main thread of the process may take to stop.
pub const STOP_LIMIT: Duration = Duration::from_secs(1);

/// `UFFD_USER_MODE_ONLY`, from the kernel's `linux/userfaultfd.h`.
const USER_MODE_ONLY: u64 = 1;

/// Number of the system call close, on x86-64. Others are refused before.
const CLOSE: i64 = 3;

/// Number of the system call userfaultfd, on x86-64.
const USERFAULTFD: i64 = 323;

/// What is at `/proc/PID/fd/N` for a userfaultfd.
const LINK: &[u8] = b"anon_inode:[userfaultfd]";

/// Which userfaultfd is created, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CreateOptions {
    /// Faults of the kernel, and so of vCPUs, are not reported (`UFFD_USER_MODE_ONLY`). This takes
    /// no privilege. Enough to record writes with WP_ASYNC, which reports no fault.
    pub user_mode_only: bool,
    /// The process keeps its own descriptor open.
    pub keep: bool,
    /// What is known about the seccomp filters of the process.
    pub seccomp: Seccomp,
}

/// A userfaultfd that was created in another process.
#[derive(Debug)]
pub struct Created {
    /// Our copy; non-blocking. The handshake (UFFDIO_API) is still to be made.
    pub fd: OwnedFd,
    /// The descriptor in the process, if it keeps one.
    pub kept: Option<RemoteFd>,
    /// How long the main thread of the process was stopped.
    pub stopped: Duration,
}

/// A userfaultfd that another process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFd {
    /// Its number there.
    pub number: i32,
    /// Each userfaultfd has an inode of its own, since Linux 5.12.
    pub device: u64,
    /// The inode.
    pub inode: u64,
}

/// Why no userfaultfd could be created in another process, or closed there.
#[derive(Debug, thiserror::Error)]
pub enum RemoteUserfaultError {
    /// The process may not create one.
    #[error(
        "process {pid} may not create a userfaultfd that reports faults of the kernel: set sysctl \
         vm.unprivileged_userfaultfd=1, or give the process CAP_SYS_PTRACE (precopy and paused \
         snapshots work without); a seccomp filter or SELinux may forbid it, too"
    )]
    NotAllowed {
        /// Its id.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The process may not even create one for faults of user mode.
    #[error(
        "process {pid} may not create a userfaultfd: its seccomp filter or a security module \
         (SELinux) forbids it"
    )]
    Forbidden {
        /// Its id.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The kernel has none.
    #[error("the kernel has no userfaultfd, or not with these flags (Linux 5.11 has it)")]
    NotSupported(#[source] Errno),
    /// The process has too many descriptors.
    #[error("process {pid} has too many open files: raise its limit (RLIMIT_NOFILE)")]
    TooManyFiles {
        /// Its id.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The number belongs to something else now.
    #[error("descriptor {number} of process {pid} is not the userfaultfd any more; nothing closed")]
    NotThatUserfault {
        /// Its id.
        pid: u32,
        /// The descriptor.
        number: i32,
    },
    /// The process could not make the system call.
    #[error(transparent)]
    Injection(#[from] InjectionError),
}

impl From<ProcessError> for RemoteUserfaultError {
    fn from(error: ProcessError) -> Self {
        Self::Injection(error.into())
    }
}

/// Creates a userfaultfd for the address space of `target`.
///
/// # Errors
/// If the process cannot be traced, or may not create one. It holds no new descriptor then.
pub fn create_userfaultfd(
    target: &TargetProcess, options: CreateOptions,
) -> Result<Created, RemoteUserfaultError> {
    let CreateOptions { user_mode_only, keep, seccomp } = options;
    let flags = u64::from(libc::O_CLOEXEC.unsigned_abs() | libc::O_NONBLOCK.unsigned_abs());
    let flags = if user_mode_only { flags | USER_MODE_ONLY } else { flags };
    let work = move |stopped: &mut injection::Stopped| {
        let result = stopped.system_call(USERFAULTFD, [flags, 0, 0, 0, 0, 0])?;
        let number = i32::try_from(result).unwrap_or(-1);
        let copied = copy(stopped.target(), number);
        let late = stopped.is_late();
        if !keep || copied.is_err() || late {
            stopped.system_call(CLOSE, [result, 0, 0, 0, 0, 0])?;
        }
        if late {
            return Err(InjectionError::Late { pid: stopped.target().pid(), limit: STOP_LIMIT });
        }
        Ok(copied?)
    };
    let outcome = injection::run(target, seccomp, STOP_LIMIT, work)
        .map_err(|error| explain(error, user_mode_only))?;
    let (fd, remote) = outcome.value;
    Ok(Created { fd, kept: keep.then_some(remote), stopped: outcome.stopped })
}

/// Closes a descriptor that the process has kept. Returns how long its main thread was stopped.
///
/// # Errors
/// If the number belongs to something else now, or the process cannot be traced.
pub fn close_kept(
    target: &TargetProcess, kept: &RemoteFd, seccomp: Seccomp,
) -> Result<Duration, RemoteUserfaultError> {
    let pid = target.pid();
    let not_that = RemoteUserfaultError::NotThatUserfault { pid, number: kept.number };
    // Once without stopping anything.
    if !is_that(target, kept) {
        return Err(if target.has_exited()? {
            ProcessError::Gone { pid }.into()
        } else {
            not_that
        });
    }
    let kept = kept.clone();
    let work = move |stopped: &mut injection::Stopped| {
        // Once more: only the other threads of the process can still close and reuse the number.
        let same = is_that(stopped.target(), &kept);
        if same {
            let number = u64::from(kept.number.unsigned_abs());
            stopped.system_call(CLOSE, [number, 0, 0, 0, 0, 0])?;
        }
        Ok(same)
    };
    let outcome = injection::run(target, seccomp, STOP_LIMIT, work)?;
    if outcome.value { Ok(outcome.stopped) } else { Err(not_that) }
}

/// Copies the new userfaultfd `number`.
fn copy(target: &TargetProcess, number: i32) -> Result<(OwnedFd, RemoteFd), ProcessError> {
    let fd = target.file(number)?;
    let stat =
        rustix::fs::fstat(&fd).map_err(|source| target.refused("look at a file of", source))?;
    Ok((fd, RemoteFd { number, device: stat.st_dev, inode: stat.st_ino }))
}

/// True if the process holds that userfaultfd under that number.
fn is_that(target: &TargetProcess, kept: &RemoteFd) -> bool {
    let path = format!("fd/{}", kept.number);
    let link = rustix::fs::readlinkat(target.folder(), &path, Vec::new());
    let stat = rustix::fs::statat(target.folder(), &path, AtFlags::empty());
    link.is_ok_and(|link| link.to_bytes() == LINK)
        && stat.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (kept.device, kept.inode))
}

/// Says what to do about a userfaultfd that was refused.
fn explain(error: InjectionError, user_mode_only: bool) -> RemoteUserfaultError {
    match error {
        InjectionError::Call { pid, source, number: USERFAULTFD } => match source {
            Errno::PERM if !user_mode_only => RemoteUserfaultError::NotAllowed { pid, source },
            Errno::PERM | Errno::ACCESS => RemoteUserfaultError::Forbidden { pid, source },
            Errno::NOSYS | Errno::INVAL => RemoteUserfaultError::NotSupported(source),
            Errno::MFILE => RemoteUserfaultError::TooManyFiles { pid, source },
            source => InjectionError::Call { pid, source, number: USERFAULTFD }.into(),
        },
        error => error.into(),
    }
}
