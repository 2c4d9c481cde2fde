// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program that an agent executes when it is upgraded.
//!
//! An operator may name another program than the agent's own. Whoever may connect to the agent may
//! be less than an operator, such as a VMM in a sandbox, and must not have the agent execute what
//! it has written. So that program must be as hard to write as the agent's own: it belongs to root
//! or to the owner of that one, and nobody else may write to it.
//!
//! Before anything ends for an upgrade, the program says its version. One that cannot be executed
//! here, or is no agent, is refused while the agent still serves.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::{OsStr, OsString};
use std::fmt::Debug;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a program may take to say its version. An operator waits 10 s for the answer.
const VERSION_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest version that is read, in bytes.
const LONGEST_VERSION: u64 = 256;
/// What `--version` of an agent says before the number.
const NAME: &str = "pageferry ";
/// The program that this process runs, also if its file is gone.
const RUNNING: &str = "/proc/self/exe";

/// Why a program is not executed.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The agent has no socket of its own.
    #[error(
        "this agent cannot be upgraded: it is a part of its VMM (--stdin), which starts the next one"
    )]
    NotUpgradable,
    /// The path is relative.
    #[error("program {0:?} must be an absolute path")]
    Relative(PathBuf),
    /// The file cannot be opened.
    #[error("cannot open program {0:?}")]
    Open(PathBuf, #[source] io::Error),
    /// It is a directory or something else.
    #[error("program {0:?} is no regular file")]
    NoFile(PathBuf),
    /// Somebody may have put it there who may not decide what this agent executes.
    #[error(
        "program {path:?} belongs to user {owner}, but must belong to root or to the owner of the \
         agent's program, user {expected}"
    )]
    Owner {
        /// The program.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The owner of the program that runs.
        expected: u32,
    },
    /// The same.
    #[error("program {path:?} has mode {mode:03o}, but only its owner may write to it")]
    Writable {
        /// The program.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It cannot be executed.
    #[error("cannot execute {0:?}")]
    Execute(PathBuf, #[source] io::Error),
    /// It is another program, or one that does not work.
    #[error("{path:?} --version {found}, but must say the version of a pageferry")]
    Version {
        /// The program.
        path: PathBuf,
        /// What it did.
        found: String,
    },
}

/// A program, and the arguments of this process.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
    /// The file that was checked, if somebody named it: at its path may be another one by now.
    file: Option<Arc<OwnedFd>>,
}

impl Program {
    /// The program of this process. To be called before its file can be replaced: later, the kernel
    /// tells no path any more.
    ///
    /// # Errors
    /// If the kernel does not tell its path.
    pub fn of_this_process() -> io::Result<Self> {
        let mut path = std::env::current_exe()?;
        // The kernel's mark of a program whose file is gone. Another may be put there.
        let marked = path.as_os_str().as_bytes().strip_suffix(b" (deleted)");
        if let Some(file) = marked.filter(|_| !path.exists()) {
            path = OsStr::from_bytes(file).into();
        }
        Ok(Self::at(path))
    }

    /// The program that runs now, whatever is at its path.
    pub fn running() -> Self {
        Self::at(RUNNING.into())
    }

    fn at(path: PathBuf) -> Self {
        Self { path, arguments: std::env::args_os().skip(1).collect(), file: None }
    }

    /// The program at `path` in place of this one, if it is as hard to write as the one that runs.
    ///
    /// # Errors
    /// If it is not, or cannot be opened.
    pub fn replaced_by(&self, path: &Path) -> Result<Self, ProgramError> {
        let named = || path.to_owned();
        if !path.is_absolute() {
            return Err(ProgramError::Relative(named()));
        }
        let failed = |errno: Errno| ProgramError::Open(named(), errno.into());
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
        let running = rustix::fs::stat(RUNNING).map_err(failed)?;
        check_file(path, &rustix::fs::fstat(&file).map_err(failed)?, running.st_uid)?;
        let (path, arguments) = (named(), self.arguments.clone());
        Ok(Self { path, arguments, file: Some(Arc::new(file)) })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn command(&self) -> Command {
        let Some(file) = &self.file else { return Command::new(&self.path) };
        // The kernel opens it before the descriptor closes.
        let mut command = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
        command.arg0(&self.path);
        command
    }

    /// Executes it in this process, with this variable. Returns only if that fails.
    pub(super) fn execute(&self, variable: &str, value: &str) -> io::Error {
        self.command().args(&self.arguments).env(variable, value).exec()
    }

    /// Checks that it can be executed here, and is an agent: executes it in a child, to say its
    /// version. Waits for it, at most [`VERSION_TIMEOUT`].
    ///
    /// # Errors
    /// If it cannot be executed, or says something else.
    pub fn check_version(&self) -> Result<(), ProgramError> {
        let mut command = self.command();
        command.arg("--version");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let failed = |error| ProgramError::Execute(self.path.clone(), error);
        let mut child = command.spawn().map_err(failed)?;
        let said = wait_for_version(&mut child);
        // Fails if it has ended.
        let _ = child.kill();
        let status = child.wait();
        let found = match (said, status) {
            (Err(error), _) | (_, Err(error)) => error.to_string(),
            (Ok(said), Ok(status)) if status.success() && said.starts_with(NAME) => return Ok(()),
            (Ok(_), Ok(status)) if !status.success() => format!("ended with {status}"),
            (Ok(said), Ok(_)) => format!("says {said:?}"),
        };
        Err(ProgramError::Version { path: self.path.clone(), found })
    }
}

/// Refuses a file that somebody else than root and `expected` may have written.
fn check_file(path: &Path, stat: &Stat, expected: u32) -> Result<(), ProgramError> {
    let path = path.to_owned();
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(ProgramError::NoFile(path));
    }
    let owner = stat.st_uid;
    if owner != 0 && owner != expected {
        return Err(ProgramError::Owner { path, owner, expected });
    }
    let mode = stat.st_mode & 0o777;
    if mode & 0o022 != 0 {
        return Err(ProgramError::Writable { path, mode });
    }
    Ok(())
}

/// Reads what it says until it ends.
fn wait_for_version(child: &mut Child) -> io::Result<String> {
    let deadline = Instant::now() + VERSION_TIMEOUT;
    let mut said = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        read_until(&mut stdout, &mut said, deadline)?;
    }
    // It may have closed its output, and go on.
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    wait_readable(process.as_fd(), deadline)?;
    Ok(String::from_utf8_lossy(&said).trim_end().to_owned())
}

fn read_until(stdout: &mut ChildStdout, said: &mut Vec<u8>, deadline: Instant) -> io::Result<()> {
    loop {
        wait_readable(stdout.as_fd(), deadline)?;
        let mut piece = [0; LONGEST_VERSION as usize];
        match stdout.read(&mut piece)? {
            0 => return Ok(()),
            count if said.len() + count > piece.len() => {
                return Err(io::Error::other(format!("says more than {LONGEST_VERSION} bytes")));
            }
            count => said.extend_from_slice(&piece[..count]),
        }
    }
}

fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> io::Result<()> {
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut polled, Some(&left)) {
            Ok(0) => {
                let waited = VERSION_TIMEOUT.as_secs();
                return Err(io::Error::other(format!("has not ended within {waited} s")));
            }
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(outcome: Result<impl Debug, ProgramError>) -> String {
        crate::error::chain(&outcome.unwrap_err())
    }

    #[test]
    fn a_program_must_be_as_hard_to_write_as_the_own_one() {
        let own = Program::of_this_process().unwrap();
        let stat = rustix::fs::stat(own.path()).unwrap();
        let path = own.path();
        let with = |mode: u32, owner: u32| {
            let mut changed = stat;
            (changed.st_mode, changed.st_uid) = (mode, owner);
            check_file(path, &changed, 1000)
        };
        for (mode, owner) in [(0o100755, 0), (0o100755, 1000), (0o100500, 1000), (0o100644, 0)] {
            with(mode, owner).unwrap();
        }
        let said = refusal(with(0o100755, 1001));
        assert!(said.contains("belongs to user 1001, but must belong to root"), "{said}");
        for mode in [0o100775, 0o100757, 0o100722] {
            let said = refusal(with(mode, 0));
            assert!(said.contains("only its owner may write"), "{said}");
        }
        assert!(refusal(with(0o040755, 0)).contains("no regular file"));
    }

    #[test]
    fn what_is_no_program_is_refused_by_name() {
        let own = Program::of_this_process().unwrap();
        let said = refusal(own.replaced_by(Path::new("bin/pageferry")));
        assert_eq!(said, "program \"bin/pageferry\" must be an absolute path");
        let said = refusal(own.replaced_by(Path::new("/nowhere/pageferry")));
        assert!(said.starts_with("cannot open program \"/nowhere/pageferry\": No such"), "{said}");
        let said = refusal(own.replaced_by(Path::new("/dev/null")));
        assert_eq!(said, "program \"/dev/null\" is no regular file");
    }

    #[test]
    fn another_program_and_one_that_does_not_end_are_found_out() {
        let run = |path: &str| Program::at(path.into()).check_version();
        assert!(refusal(run("/bin/true")).contains("--version "));
        assert!(refusal(run("/bin/false")).contains("--version "));
        assert!(refusal(run("/nowhere")).starts_with("cannot execute \"/nowhere\": No such"));
        // `yes --version` ends at once; without an argument it does not.
        let mut endless = Command::new("yes");
        let mut child = endless.stdout(Stdio::piped()).spawn().unwrap();
        let said = wait_for_version(&mut child).unwrap_err().to_string();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(said, "says more than 256 bytes");
    }
}
