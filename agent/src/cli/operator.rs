// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The subcommands of an operator, which talk to a running agent.
//!
//! Each connects to the agent's control socket, sends one request, and prints the answer. A command
//! that starts a job then watches it until it ends.

use super::OperatorArgs;
use super::agent_connection::AgentConnection;
use super::exit::Exit;
use super::progress::Output;
use super::show;
use super::show_agent;
use super::snapshot::{RestoreCommand, SnapshotCommand, from_root};
use super::watch::{Interrupts, OnInterrupt, OnPause, Watching, watch};
use pageferry_protocol::control::AgentInfo;
use pageferry_protocol::control::job::{IncomingOptions, JobStatus, OutgoingOptions, Parameters};
use pageferry_protocol::control::reply::JobStarted;
use pageferry_protocol::control::request::Request;
use std::error::Error;
use std::path::Path;

type Outcome = Result<Exit, Box<dyn Error>>;

/// Makes the path in a `unix:` address absolute. The agent's current folder may differ from the
/// operator's.
fn address_from_root(address: &str) -> std::io::Result<String> {
    match address.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(format!("unix:{}", from_root(Path::new(path))?)),
        _ => Ok(address.to_owned()),
    }
}

/// `pageferry status`
///
/// # Errors
/// If the agent does not answer.
pub fn status(args: &OperatorArgs) -> Outcome {
    let mut agent = AgentConnection::open(&args.socket)?;
    let info = agent.ask(&Request::QueryAgent, AgentInfo::decode)?;
    let status = agent.ask(&Request::QueryStatus, JobStatus::decode)?;
    show_agent::print(&info, &status, args.json)?;
    Ok(Exit::Done)
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
    args: &OperatorArgs, target: &str, no_wait: bool, options: OutgoingOptions,
) -> Outcome {
    let on_pause = if no_wait { OnPause::End } else { OnPause::Wait };
    let request = Request::StartOutgoing { target: address_from_root(target)?, options };
    start(args, &request, on_pause)
}

/// `pageferry listen`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn listen(
    args: &OperatorArgs, address: &str, no_wait: bool, options: IncomingOptions,
) -> Outcome {
    let on_pause = if no_wait { OnPause::End } else { OnPause::Wait };
    let request = Request::StartIncoming { listen: address_from_root(address)?, options };
    start(args, &request, on_pause)
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
    let SnapshotCommand { operator, image, options } = args;
    let request = Request::StartSnapshot { path: from_root(&image)?, options: options.try_into()? };
    start(&operator, &request, OnPause::Wait)
}

/// `pageferry restore`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn restore(args: RestoreCommand) -> Outcome {
    let RestoreCommand { operator, image, options } = args;
    let request = Request::StartRestore { path: from_root(&image)?, options: options.try_into()? };
    start(&operator, &request, OnPause::Wait)
}

/// Starts or recovers a job, and watches it until it ends.
fn start(args: &OperatorArgs, request: &Request, on_pause: OnPause) -> Outcome {
    // Before the job starts: a Ctrl-C from now on is about the job.
    let mut interrupts = Interrupts::catch()?;
    let mut agent = AgentConnection::open(&args.socket)?;
    let started = agent.ask(request, JobStarted::decode)?;
    if let Request::StartIncoming { .. } = request {
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
    show::done("switching to postcopy", args.json)?;
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
    start(args, &request, OnPause::EndAfterRecovery)
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
