// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an agent gives up at its start, so that whoever takes it over reaches nothing by it.
//!
//! An agent reads what others have written: streams, images, the queues of a guest's devices. If a
//! mistake in that lets somebody run code of his own in the agent, that code is to have the memory
//! of this guest, which the agent has anyway, and nothing else.
//!
//! [`enter`] is called before the agent starts its first thread. From then on:
//!
//! - a process beside it opens files and connects sockets, where somebody has named them
//!   ([`crate::opener`]);
//! - `files`: it opens nothing itself but its program and libraries;
//! - `calls`: each kind of thread makes only the system calls that it needs;
//! - `refused`: what happens with others;
//! - `privileges`: it has no capability, and other processes of its user cannot look into it.
//!
//! The sandbox holds also for each program that the process executes, which is why an upgrade stays
//! in it.

mod calls;
mod files;
mod privileges;
mod refused;

pub use calls::{KINDS, ThreadKind};
pub use refused::Refusals;

use crate::inherited;
use crate::opener::channel::Channel;
use crate::opener::{self, process};
use crate::transport::socket_queue;
use clap::ValueEnum;
use pageferry_protocol::control::Grants;
use rustix::io::Errno;
use seccompiler::{BpfProgram, apply_filter};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use vmm_sys_util::signal::block_signal;

/// The variable by which the next program of this process finds the socket to the opener.
const VARIABLE: &str = "PAGEFERRY_OPENER";

/// The signals to which the first thread reacts. The kernel may interrupt any thread that does not
/// block them, and the handler wakes the first one by a system call that others may not make.
const SIGNALS: [i32; 4] = [SIGHUP, SIGINT, SIGTERM, SIGUSR2];

/// The filter of each kind of thread.
static FILTERS: OnceLock<BTreeMap<ThreadKind, BpfProgram>> = OnceLock::new();

/// The folders in which the programs of upgrades may be.
static PROGRAMS: OnceLock<Vec<PathBuf>> = OnceLock::new();

/// The folders in which the programs of upgrades may be; `None` if they may be anywhere.
pub fn programs() -> Option<&'static [PathBuf]> {
    PROGRAMS.get().map(Vec::as_slice)
}

/// Whether there is a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Mode {
    /// None: the agent may what its user may.
    Off,
    /// What a sandbox would refuse is allowed, and logged.
    Log,
    /// What the agent does not need is refused.
    #[default]
    On,
}

/// Why the sandbox cannot be entered.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// There is no opener.
    #[error("cannot start the process that opens files for the agent")]
    Opener(#[source] io::Error),
    /// The kernel refuses to take privileges away.
    #[error("cannot give up privileges")]
    Privileges(#[source] Errno),
    /// The kernel refuses a rule about files.
    #[error("cannot restrict the files that the agent may open (landlock)")]
    Files(#[from] landlock::RulesetError),
    /// The kernel refuses a rule about system calls.
    #[error("cannot restrict system calls (seccomp)")]
    Calls(#[from] calls::Error),
    /// The kernel refuses the handler of refused calls.
    #[error("cannot note system calls that are refused")]
    Handler(#[source] io::Error),
}

/// A sandbox that was entered.
#[derive(Debug, Default)]
pub struct Sandbox {
    /// What it refuses; `None` if it refuses nothing.
    pub refusals: Option<Refusals>,
    /// What the operator is to know.
    pub warning: Option<&'static str>,
}

/// Tries whether the kernel can restrict files, connections and signals as the sandbox asks for
/// (landlock).
///
/// # Errors
/// What it lacks.
pub fn try_landlock() -> Result<(), SandboxError> {
    Ok(files::try_all()?)
}

/// Enters the sandbox. `granted` are the folders that the arguments of the agent name, and `stores`
/// the object stores. `programs`
/// are those in which the programs of upgrades may be, besides that of `program`, which this
/// process executes.
///
/// To be called before the process has a second thread.
///
/// # Errors
/// If the opener cannot be started, or the kernel refuses.
pub fn enter(
    mode: Mode, (granted, stores): (impl FnOnce() -> Vec<Grants>, &[String]), program: &Path,
    programs: &[PathBuf],
) -> Result<Sandbox, SandboxError> {
    if mode == Mode::Off {
        return Ok(Sandbox::default());
    }
    refused::share_arena();
    let mut sandbox = Sandbox::default();
    if mode == Mode::On {
        // First of all: in a sandbox that is inherited, a refused call would end the process.
        sandbox.refusals = Some(refused::note().map_err(SandboxError::Handler)?);
    }
    let inherited = inherited::handed_over(VARIABLE).map_err(SandboxError::Opener)?;
    let is_inherited = inherited.is_some();
    let channel = match inherited {
        Some(socket) => Channel::new(socket),
        None => process::start(mode == Mode::On, stores).map_err(SandboxError::Opener)?,
    };
    opener::ask(channel);
    // The opener of the program before knows them.
    let granted = if is_inherited { Vec::new() } else { granted() };
    for grants in granted.into_iter().filter(|grants| !grants.is_empty()) {
        // A folder that is none is named by whoever uses it.
        let _ = opener::grant_for_good(&grants.fds());
    }
    socket_queue::limit();
    if mode == Mode::On {
        privileges::drop_all().map_err(SandboxError::Privileges)?;
        privileges::hide().map_err(SandboxError::Privileges)?;
        let own = program.parent().map(Path::to_owned);
        let programs = own.into_iter().chain(programs.iter().cloned());
        let programs = PROGRAMS
            .get_or_init(|| programs.map(|path| path.canonicalize().unwrap_or(path)).collect());
        if !is_inherited && !files::restrict(programs)? {
            sandbox.warning = Some(
                "this kernel has no landlock, or not all of it: the sandbox restricts files and \
                 connections by system calls only",
            );
        }
    }
    let of = |kind: ThreadKind| Ok((kind, calls::of(kind, mode)?));
    let filters = KINDS.into_iter().map(of).collect::<Result<_, calls::Error>>()?;
    let _ = FILTERS.set(filters);
    if !is_inherited {
        for filter in calls::first(mode)? {
            apply_filter(&filter)?;
        }
    }
    Ok(sandbox)
}

/// From now on this thread makes only the system calls of its kind. Without a sandbox this does
/// nothing.
///
/// A thread without its filter would still have that of the first thread, so this ends the process
/// rather than to go on: the kernel refuses a filter only if it has no memory.
pub fn enter_thread(kind: ThreadKind) {
    let Some(filter) = FILTERS.get().and_then(|filters| filters.get(&kind)) else { return };
    for signal in SIGNALS {
        // Fails if it is blocked already.
        let _ = block_signal(signal);
    }
    if let Err(error) = apply_filter(filter) {
        log::error!("a thread cannot enter the sandbox: {}", crate::error::chain(&error));
        std::process::abort();
    }
}

/// Makes the opener one of the next program of this process, if there is one. Returns the variable
/// for it.
///
/// # Errors
/// If the kernel refuses.
pub fn inherit() -> io::Result<Option<(&'static str, String)>> {
    let value = opener::channel().map(Channel::inherit).transpose()?;
    Ok(value.map(|value| (VARIABLE, value)))
}
