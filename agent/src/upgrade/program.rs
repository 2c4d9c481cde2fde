// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program that an agent executes when it is upgraded.
//!
//! An operator may name another program than the agent's own. Whoever may connect to the agent may
//! be less than an operator, such as a VMM in a sandbox, and must not have the agent execute what
//! it has written. So that program must be as hard to write as the agent's own: it belongs to root
//! or to the owner of that one, and nobody else may write to it.
//!
//! That protects less where the agent's own program belongs to the user of its peers: they could
//! replace that one, too.
//!
//! Before anything ends for an upgrade, the program says its version, and that it knows the
//! arguments of this agent. One that cannot be executed here, or is no agent, is refused while the
//! agent still serves.

use crate::sandbox;
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
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a program may take to say its version, and again to know its arguments. An operator
/// waits 10 s for the answer.
const CHECK_TIMEOUT: Duration = Duration::from_secs(4);
/// Longest version that is read, in bytes.
const LONGEST_VERSION: u64 = 256;
/// What `--version` of an agent says before the number, and its first argument. The requester does
/// not choose it, since some programs say it.
const NAME: &str = "pageferry";
/// The program that this process runs, also if its file is gone.
const RUNNING: &str = "/proc/self/exe";

/// Why a program is not executed.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The agent has no socket of its own.
    #[error(
        "this agent cannot be upgraded: it is a part of its VMM (--stdin), which starts the next \
         one"
    )]
    NotUpgradable,
    /// Another request was first.
    #[error("another upgrade is under way{}", in_words(.0.as_deref()))]
    UnderWay(Option<PathBuf>),
    /// The path is relative.
    #[error("program {0:?} must be an absolute path")]
    Relative(PathBuf),
    /// The file cannot be opened.
    #[error("cannot open program {0:?}")]
    Open(PathBuf, #[source] io::Error),
    /// An agent in a sandbox executes no program from there.
    #[error(
        "program {path:?} is in none of the folders from which this agent, which is in a sandbox, \
         executes programs: {folders:?}; --programs FOLDER of the agent names others"
    )]
    Folder {
        /// The program.
        path: PathBuf,
        /// Where it must be.
        folders: &'static [PathBuf],
    },
    /// It is a directory or something else.
    #[error("program {0:?} is no regular file with a name")]
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
    /// The same, or it would run with the rights of another user.
    #[error(
        "program {path:?} has mode {mode:03o}, but only its owner may write to it, and it may not \
         have a setuid or setgid bit"
    )]
    Mode {
        /// The program.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It cannot be executed.
    #[error("cannot execute {0:?}")]
    Execute(PathBuf, #[source] io::Error),
    /// It is another program, or one that does not work.
    #[error("program {path:?} is no pageferry, or a script: with --version it {found}")]
    Version {
        /// The program.
        path: PathBuf,
        /// What it did.
        found: String,
    },
    /// It is an agent, and would end at once.
    #[error("program {path:?} does not take the arguments of this agent ({found}): {arguments:?}")]
    Arguments {
        /// The program.
        path: PathBuf,
        /// How it ended.
        found: String,
        /// The arguments.
        arguments: Vec<OsString>,
    },
}

fn in_words(path: Option<&Path>) -> String {
    path.map_or_else(String::new, |path| format!(", to {}", path.display()))
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

    /// The program at `path`, if it is as hard to write as the one that runs. This one if the path
    /// is empty.
    ///
    /// # Errors
    /// If it is not, or cannot be opened.
    pub fn at_path(&self, path: &Path) -> Result<Self, ProgramError> {
        if path.as_os_str().is_empty() {
            return Ok(self.clone());
        }
        let named = || path.to_owned();
        if !path.is_absolute() {
            return Err(ProgramError::Relative(named()));
        }
        let failed = |errno: Errno| ProgramError::Open(named(), errno.into());
        if let Some(folders) = sandbox::programs() {
            let found = path.canonicalize().map_err(|error| ProgramError::Open(named(), error))?;
            if !folders.iter().any(|folder| found.starts_with(folder)) {
                return Err(ProgramError::Folder { path: named(), folders });
            }
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
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
        let mut command = match &self.file {
            None => Command::new(&self.path),
            // The kernel opens it before the descriptor closes.
            Some(file) => Command::new(format!("/proc/self/fd/{}", file.as_raw_fd())),
        };
        command.arg0(NAME);
        command
    }

    /// Executes it in this process, with these variables and without those of `removed` that are
    /// none of them. Returns only if that fails.
    pub(super) fn execute(&self, variables: &[(&str, String)], removed: &[&str]) -> io::Error {
        let mut command = self.command();
        for name in removed {
            command.env_remove(name);
        }
        command.args(&self.arguments).envs(variables.iter().cloned()).exec()
    }

    /// Checks that it can be executed here, and is an agent that takes the arguments of this one:
    /// executes it in a child, to say its version and its help. Waits for it, at most 8 seconds.
    ///
    /// # Errors
    /// If it cannot be executed, or says something else.
    pub fn check(&self) -> Result<(), ProgramError> {
        let wrong = |found| ProgramError::Version { path: self.path.clone(), found };
        let (status, said) = self.ask(&["--version".into()], Stdio::piped())?.map_err(wrong)?;
        if !status.success() {
            return Err(wrong(format!("ends with {status}")));
        }
        if !is_version(&said) {
            return Err(wrong(format!("says {said:?}")));
        }
        // An argument that is not known is an error before the help is reached.
        let mut arguments = self.arguments.clone();
        arguments.push("--help".into());
        let refused = |found| {
            let (path, arguments) = (self.path.clone(), self.arguments.clone());
            ProgramError::Arguments { path, found, arguments }
        };
        let (status, _) = self.ask(&arguments, Stdio::null())?.map_err(refused)?;
        if status.success() { Ok(()) } else { Err(refused(format!("ends with {status}"))) }
    }

    /// Executes it in a child with these arguments. Returns how it ended and what it said, or in
    /// words what it did instead.
    fn ask(
        &self, arguments: &[OsString], stdout: Stdio,
    ) -> Result<Result<(ExitStatus, String), String>, ProgramError> {
        let mut command = self.command();
        command.args(arguments).stdin(Stdio::null()).stdout(stdout).stderr(Stdio::null());
        let failed = |error| ProgramError::Execute(self.path.clone(), error);
        let mut child = command.spawn().map_err(failed)?;
        let said = wait_for_end(&mut child);
        // Fails if it has ended.
        let _ = child.kill();
        let status = child.wait();
        let in_words = |error: io::Error| error.to_string();
        Ok(said.and_then(|said| status.map(|status| (status, said))).map_err(in_words))
    }
}

/// True for what an agent says with `--version`.
fn is_version(said: &str) -> bool {
    let Some(number) = said.strip_prefix(NAME).and_then(|rest| rest.strip_prefix(' ')) else {
        return false;
    };
    let (numbers, _) = number.split_once('-').unwrap_or((number, ""));
    let parts: Vec<_> = numbers.split('.').map(str::parse::<u32>).collect();
    parts.len() == 3 && parts.iter().all(Result::is_ok)
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
    let mode = stat.st_mode & 0o7777;
    if mode & 0o6022 != 0 {
        return Err(ProgramError::Mode { path, mode });
    }
    // A file without a name, such as a memfd, was made by a process and not installed.
    if stat.st_nlink == 0 {
        return Err(ProgramError::NoFile(path));
    }
    Ok(())
}

/// Reads what it says until it ends.
fn wait_for_end(child: &mut Child) -> io::Result<String> {
    let deadline = Instant::now() + CHECK_TIMEOUT;
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
                let waited = CHECK_TIMEOUT.as_secs();
                return Err(io::Error::other(format!("does not end within {waited} s")));
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
        for mode in [0o100775, 0o100757, 0o100722, 0o104755, 0o102755] {
            let said = refusal(with(mode, 0));
            assert!(said.contains("only its owner may write"), "{said}");
        }
        assert!(refusal(with(0o040755, 0)).contains("no regular file"));
    }

    #[test]
    fn what_is_no_program_is_refused_by_name() {
        let own = Program::of_this_process().unwrap();
        let said = refusal(own.at_path(Path::new("bin/pageferry")));
        assert_eq!(said, "program \"bin/pageferry\" must be an absolute path");
        let said = refusal(own.at_path(Path::new("/nowhere/pageferry")));
        assert!(said.starts_with("cannot open program \"/nowhere/pageferry\": No such"), "{said}");
        let said = refusal(own.at_path(Path::new("/dev/null")));
        assert_eq!(said, "program \"/dev/null\" is no regular file with a name");
    }

    #[test]
    fn only_the_name_and_a_number_are_a_version() {
        assert!(is_version("pageferry 0.1.0") && is_version("pageferry 1.20.3-rc.1"));
        for wrong in ["pageferry", "pageferry 1", "pageferry from util-linux 2.38.1", "sh 1.2.3"] {
            assert!(!is_version(wrong), "{wrong}");
        }
    }

    #[test]
    fn another_program_and_one_that_does_not_end_are_found_out() {
        let run = |path: &str| Program::at(path.into()).check();
        assert!(refusal(run("/bin/true")).contains("is no pageferry"));
        assert!(refusal(run("/bin/false")).contains("is no pageferry"));
        assert!(refusal(run("/nowhere")).starts_with("cannot execute \"/nowhere\": No such"));
        // `yes --version` ends at once; without an argument it does not.
        let mut endless = Command::new("yes");
        let mut child = endless.stdout(Stdio::piped()).spawn().unwrap();
        let said = wait_for_end(&mut child).unwrap_err().to_string();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(said, "says more than 256 bytes");
    }
}
