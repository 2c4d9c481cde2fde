// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The exit codes of all commands. `pageferry --help` and the man pages list them.

use pageferry_protocol::control::job::{JobStatus, Phase};
use std::io;
use std::process::ExitCode;

/// The text about exit codes for help and man pages.
pub const HELP: &str = "\
Exit codes:
  0    it is done; for a job: it completed
  1    it failed, or was cancelled, or the agent does not answer: the last line on standard error
       says why
  2    the command line is wrong
  3    the postcopy is paused: recover it
  130  Ctrl-C ended the command; a job that it watched goes on
  141  the reader of its output has gone; a job that it watched goes on
`pageferry qemu run` and `receive` end with the exit code of QEMU.";

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It did what it was asked to.
    Done,
    /// It failed, and has said why.
    Failed,
    /// The command line is wrong. The same code as clap's.
    BadInput,
    /// The postcopy that it watched is paused and must be recovered.
    Paused,
    /// Ctrl-C ended it.
    Interrupted,
    /// The reader of its output has gone. As if SIGPIPE had ended it.
    NoReader,
    /// As the program that it ran.
    OfProgram(u8),
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::BadInput => 2,
            Exit::Paused => 3,
            Exit::Interrupted => 130,
            Exit::NoReader => 141,
            Exit::OfProgram(code) => code,
        })
    }
}

impl Exit {
    /// How a command ends that has watched a job until this status.
    pub fn of_job(status: &JobStatus) -> Self {
        match status.phase {
            Phase::Completed => Self::Done,
            Phase::PostcopyPaused => Self::Paused,
            _ => Self::Failed,
        }
    }
}

/// True if `error` says that the reader of standard output has gone.
pub fn is_closed_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| {
        cause.downcast_ref::<io::Error>().map(io::Error::kind) == Some(io::ErrorKind::BrokenPipe)
    })
}
