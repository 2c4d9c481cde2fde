// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The subcommands of an operator, which talk to a running agent.
//!
//! Each connects to the agent's control socket, sends one request, and prints the answer. A command
//! that starts a job then watches it until it ends.

use super::agent_connection::AgentConnection;
use super::exit::Exit;
use super::progress::Output;
use super::show;
use super::show_agent;
use super::snapshot::{RestoreCommand, SnapshotCommand, from_root};
use super::watch::{Interrupts, OnInterrupt, OnPause, Watching, watch};
use super::{DetachArgs, OperatorArgs, PauseArgs};
use pageferry_protocol::control::job::{IncomingOptions, JobStatus, OutgoingOptions, Parameters};
use pageferry_protocol::control::reply::JobStarted;
use pageferry_protocol::control::request::Request;
use pageferry_protocol::control::{AgentInfo, Grants};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

type Outcome = Result<Exit, Box<dyn Error>>;

/// Makes the path in a `unix:` address absolute. The agent's current folder may differ from the
/// operator's.
fn address_from_root(address: &str) -> std::io::Result<String> {
    match address.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(format!("unix:{}", from_root(Path::new(path))?)),
        _ => Ok(address.to_owned()),
    }
}

/// What becomes of a job that a command has started.
#[derive(Debug, Clone, Copy)]
pub enum Watched {
    /// The command ends.
    Not,
    /// The command watches it.
    Until(OnPause),
}

impl Watched {
    /// As the command line says.
    pub(super) fn new(detach: DetachArgs, pause: &PauseArgs) -> Self {
        match (detach.detach, pause.no_wait) {
            (true, _) => Self::Not,
            (false, true) => Self::Until(OnPause::End),
            (false, false) => Self::Until(OnPause::Wait),
        }
    }

    /// The same for a job that no postcopy can pause.
    fn unless(detach: DetachArgs) -> Self {
        if detach.detach { Self::Not } else { Self::Until(OnPause::Wait) }
    }
}

/// `pageferry status`
///
/// # Errors
/// If the agent does not answer, or no VMM comes within `wait`.
pub fn status(args: &OperatorArgs, wait: Option<Duration>) -> Outcome {
    let (mut agent, info) = match wait {
        Some(wait) => wait_for_vmm(args, wait)?,
        None => ask_agent(args)?,
    };
    let status = agent.ask(&Request::QueryStatus, JobStatus::decode)?;
    show_agent::print(&info, &status, args.json)?;
    Ok(Exit::Done)
}

/// Connects to the agent and asks what it serves.
fn ask_agent(args: &OperatorArgs) -> Result<(AgentConnection, AgentInfo), Box<dyn Error>> {
    let mut agent = AgentConnection::open(&args.socket)?;
    let info = agent.ask(&Request::QueryAgent, AgentInfo::decode)?;
    Ok((agent, info))
}

/// The same, once a VMM has handed over its memory.
fn wait_for_vmm(
    args: &OperatorArgs, wait: Duration,
) -> Result<(AgentConnection, AgentInfo), Box<dyn Error>> {
    /// Time between two attempts.
    const LOOK: Duration = Duration::from_millis(50);
    let until = Instant::now() + wait;
    loop {
        let asked = ask_agent(args);
        match asked {
            Ok((agent, info)) if !info.blocks.is_empty() => return Ok((agent, info)),
            _ if Instant::now() < until => std::thread::sleep(LOOK),
            Ok(_) => {
                let socket = args.socket.display();
                return Err(format!("no VMM handed its memory to the agent on {socket}").into());
            }
            Err(error) => return Err(error),
        }
    }
}

/// `pageferry watch`
///
/// # Errors
/// If the agent does not answer.
pub fn watch_job(args: &OperatorArgs, no_wait: bool) -> Outcome {
    let mut interrupts = Interrupts::catch()?;
    let watching = Watching {
        job: None,
        output: if args.json { Output::Json } else { Output::StandardOutput },
        on_interrupt: OnInterrupt::End,
        on_pause: if no_wait { OnPause::End } else { OnPause::Wait },
    };
    watch(&mut AgentConnection::open(&args.socket)?, &mut interrupts, watching)
}

/// `pageferry migrate`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn migrate(
    args: &OperatorArgs, target: &str, watched: Watched, options: OutgoingOptions,
) -> Outcome {
    let request = Request::StartOutgoing { target: address_from_root(target)?, options };
    start(args, &request, watched)
}

/// `pageferry listen`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn listen(
    args: &OperatorArgs, address: &str, watched: Watched, options: IncomingOptions,
) -> Outcome {
    let request = Request::StartIncoming { listen: address_from_root(address)?, options };
    start(args, &request, watched)
}

/// `pageferry set`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn set(args: &OperatorArgs, parameters: Parameters) -> Outcome {
    let request = Request::SetParameters { parameters };
    AgentConnection::open(&args.socket)?.ask(&request, |_| Ok(()))?;
    show::done("changed", args.json)?;
    Ok(Exit::Done)
}

/// `pageferry snapshot`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn snapshot(args: SnapshotCommand) -> Outcome {
    let SnapshotCommand { operator, detach, image, folder, options } = args;
    let request = Request::StartSnapshot { path: from_root(&image)?, options: options.try_into()? };
    let grants = with_folders(&request, &folder);
    start_with(&operator, &request, &grants, Watched::unless(detach))
}

/// `pageferry restore`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn restore(args: RestoreCommand) -> Outcome {
    let RestoreCommand { operator, detach, image, folder, options } = args;
    let request = Request::StartRestore { path: from_root(&image)?, options: options.try_into()? };
    let grants = with_folders(&request, &folder);
    start_with(&operator, &request, &grants, Watched::unless(detach))
}

/// What the request names, and these folders.
fn with_folders(request: &Request, folders: &[PathBuf]) -> Grants {
    folders.iter().fold(Grants::of(request), |grants, folder| grants.folder(folder))
}

/// Starts or recovers a job, and watches it until it ends.
fn start(args: &OperatorArgs, request: &Request, watched: Watched) -> Outcome {
    start_with(args, request, &Grants::of(request), watched)
}

/// The same, with these grants.
fn start_with(
    args: &OperatorArgs, request: &Request, grants: &Grants, watched: Watched,
) -> Outcome {
    // Before the job starts: a Ctrl-C from now on is about the job.
    let mut interrupts = Interrupts::catch()?;
    let mut agent = AgentConnection::open(&args.socket)?;
    agent.grant(grants)?;
    let started = agent.ask(request, JobStarted::decode)?;
    let listens = matches!(request, Request::StartIncoming { .. });
    let on_pause = match watched {
        Watched::Not => {
            show::started(&started, listens, args.json)?;
            return Ok(Exit::Done);
        }
        Watched::Until(on_pause) => on_pause,
    };
    if listens {
        show::listening(&started, args.json)?;
    }
    let watching = Watching {
        job: Some(started.job),
        output: if args.json { Output::Json } else { Output::StandardError },
        on_interrupt: OnInterrupt::Cancel,
        on_pause,
    };
    watch(&mut agent, &mut interrupts, watching)
}

/// `pageferry cancel`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn cancel(args: &OperatorArgs) -> Outcome {
    AgentConnection::open(&args.socket)?.ask(&Request::Cancel, |_| Ok(()))?;
    show::done("cancelled", args.json)?;
    Ok(Exit::Done)
}

/// `pageferry postcopy`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn postcopy(args: &OperatorArgs) -> Outcome {
    AgentConnection::open(&args.socket)?.ask(&Request::StartPostcopy, |_| Ok(()))?;
    show::done("switching to postcopy when the current pass ends", args.json)?;
    Ok(Exit::Done)
}

/// `pageferry recover`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn recover(args: &OperatorArgs, address: Option<&str>) -> Outcome {
    let address = address.map(address_from_root).transpose()?.unwrap_or_default();
    let request =
        Request::Recover { session: [0; 16], address, options: OutgoingOptions::default() };
    start(args, &request, Watched::Until(OnPause::EndAfterRecovery))
}

/// `pageferry resume`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn resume(args: &OperatorArgs, force: bool) -> Outcome {
    AgentConnection::open(&args.socket)?.ask(&Request::Resume { force }, |_| Ok(()))?;
    show::done("resumed", args.json)?;
    Ok(Exit::Done)
}
