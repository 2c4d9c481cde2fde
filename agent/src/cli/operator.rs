// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The subcommands of an operator, which talk to a running agent.
//!
//! Each connects to the agent's control socket, sends one request, and prints the answer. A command
//! that starts a job then subscribes to events, and shows the progress until the job ends.
//!
//! The agent has `TIMEOUT` to answer a request, and `PATIENCE` between two events. After that the
//! command fails and says that the agent hangs.

use super::OperatorArgs;
use super::show;
use super::snapshot::{RestoreCommand, SnapshotCommand, from_root};
use pageferry_protocol::control::codec::{DecodeError, Decoder};
use pageferry_protocol::control::frame::Frame;
use pageferry_protocol::control::job::{JobKind, JobStatus, OutgoingOptions, Phase};
use pageferry_protocol::control::reply::{HelloReply, JobStarted, decode_reply};
use pageferry_protocol::control::request::{CONTROL_VERSION, Request, code};
use pageferry_protocol::control::unix_path::connect_unix;
use pageferry_protocol::control::{FrameSocket, SocketError};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

type Outcome = Result<ExitCode, Box<dyn Error>>;

/// Longest time that the agent may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two status events while a job is watched.
const INTERVAL: Duration = Duration::from_millis(100);
/// Longest time between two events before the command says that the agent hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to an agent.
struct Operator {
    socket: FrameSocket,
    /// The path on which the agent listens.
    path: PathBuf,
}

impl Operator {
    /// Connects to the agent that listens on `path`, and says hello.
    fn connect(path: &Path) -> Result<Self, Box<dyn Error>> {
        let socket = connect_unix(path, Instant::now() + TIMEOUT);
        let socket =
            socket.map_err(|error| format!("no agent answers on {}: {error}", path.display()))?;
        let mut operator = Self { socket: socket.into(), path: path.to_owned() };
        let (version_min, version_max) = (CONTROL_VERSION, CONTROL_VERSION);
        let hello = Request::Hello { version_min, version_max, features: 0, agent: 0 };
        operator.ask(&hello, HelloReply::decode)?;
        Ok(operator)
    }

    /// Sends a request and waits for its answer.
    fn ask<T>(
        &mut self, request: &Request,
        fields: impl FnOnce(&mut Decoder<'_>) -> Result<T, DecodeError>,
    ) -> Result<T, Box<dyn Error>> {
        let deadline = Instant::now() + TIMEOUT;
        let sent = self.socket.send(&Frame::request(request.code(), request.encode()), deadline);
        sent.map_err(|error| self.failed(error))?;
        loop {
            let reply = self.socket.recv(deadline).map_err(|error| self.failed(error))?;
            // Events may arrive before the answer.
            if reply.is_reply() && reply.request == request.code() {
                return Ok(decode_reply(&reply.body, fields)??);
            }
        }
    }

    /// The error for the operator. It names the agent.
    fn failed(&self, error: SocketError) -> Box<dyn Error> {
        let path = self.path.display();
        match error {
            SocketError::Timeout { waited, .. } => {
                let waited = waited.as_secs();
                format!(
                    "the agent on {path} has not answered for {waited} s: it is stopped, or hangs"
                )
                .into()
            }
            error => format!("the agent on {path}: {}", crate::error::chain(&error)).into(),
        }
    }

    /// Waits for the next event.
    fn next_event(&mut self) -> Result<JobStatus, Box<dyn Error>> {
        loop {
            let frame = match self.socket.recv(Instant::now() + PATIENCE) {
                Err(SocketError::Closed) => return Err("the agent ended".into()),
                frame => frame.map_err(|error| self.failed(error))?,
            };
            if frame.request == code::EVENT {
                return Ok(JobStatus::decode(&mut Decoder::new(&frame.body))?);
            }
        }
    }

    /// Shows the progress of job `job` until it ends; without a number, of the current job.
    fn watch(&mut self, job: Option<u64>, json: bool) -> Outcome {
        self.watch_until(job, json, false)
    }

    /// As [`Operator::watch`], for a postcopy that was asked to recover. Ends also if the postcopy
    /// pauses again.
    fn watch_recovery(&mut self, job: u64, json: bool) -> Outcome {
        self.watch_until(Some(job), json, true)
    }

    fn watch_until(&mut self, job: Option<u64>, json: bool, recovery: bool) -> Outcome {
        self.ask(&Request::Subscribe { interval: INTERVAL }, |_| Ok(()))?;
        let mut progress = show::Progress::new(json);
        let mut recovered = false;
        loop {
            let status = self.next_event()?;
            match job {
                Some(job) if status.job < job => continue,
                // The job ended, and the next one started, between two events.
                Some(job) if status.job > job => {
                    return Err(format!(
                        "job {job} was followed by job {} before its end was seen",
                        status.job
                    )
                    .into());
                }
                _ => {}
            }
            progress.show(&status)?;
            // A job of the source has left its pause before the request was answered. So if it is
            // paused now, it paused again. A job of the destination stays paused until its source
            // connects.
            recovered |= status.kind == JobKind::Outgoing || status.phase != Phase::PostcopyPaused;
            let paused = status.phase == Phase::PostcopyPaused && recovered;
            if status.phase.is_final() || (recovery && paused) {
                progress.end(&status)?;
                return Ok(exit_code(&status));
            }
        }
    }
}

/// Makes the path in a `unix:` address absolute. The agent's current folder may differ from the
/// operator's.
fn address_from_root(address: &str) -> std::io::Result<String> {
    match address.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(format!("unix:{}", from_root(Path::new(path))?)),
        _ => Ok(address.to_owned()),
    }
}

/// Success only if the job completed.
fn exit_code(status: &JobStatus) -> ExitCode {
    if status.phase == Phase::Completed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `pageferry status`
///
/// # Errors
/// If the agent does not answer.
pub fn status(args: &OperatorArgs) -> Outcome {
    let status = Operator::connect(&args.socket)?.ask(&Request::QueryStatus, JobStatus::decode)?;
    show::print(&status, args.json)?;
    Ok(ExitCode::SUCCESS)
}

/// `pageferry watch`
///
/// # Errors
/// If the agent does not answer.
pub fn watch(args: &OperatorArgs) -> Outcome {
    Operator::connect(&args.socket)?.watch(None, args.json)
}

/// `pageferry migrate`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn migrate(args: &OperatorArgs, target: &str, options: &OutgoingOptions) -> Outcome {
    start(
        args,
        &Request::StartOutgoing { target: address_from_root(target)?, options: options.clone() },
    )
}

/// `pageferry snapshot`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn snapshot(args: SnapshotCommand) -> Outcome {
    let SnapshotCommand { operator, image, options } = args;
    let request = Request::StartSnapshot { path: from_root(&image)?, options: options.try_into()? };
    start(&operator, &request)
}

/// `pageferry restore`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn restore(args: RestoreCommand) -> Outcome {
    let RestoreCommand { operator, image, options } = args;
    let request = Request::StartRestore { path: from_root(&image)?, options: options.try_into()? };
    start(&operator, &request)
}

/// Starts a job, and shows its progress until it ends.
fn start(args: &OperatorArgs, request: &Request) -> Outcome {
    let mut operator = Operator::connect(&args.socket)?;
    let started = operator.ask(request, JobStarted::decode)?;
    operator.watch(Some(started.job), args.json)
}

/// `pageferry cancel`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn cancel(args: &OperatorArgs) -> Outcome {
    Operator::connect(&args.socket)?.ask(&Request::Cancel, |_| Ok(()))?;
    show::done("cancelled", args.json)?;
    Ok(ExitCode::SUCCESS)
}

/// `pageferry postcopy`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn postcopy(args: &OperatorArgs) -> Outcome {
    Operator::connect(&args.socket)?.ask(&Request::StartPostcopy, |_| Ok(()))?;
    show::done("switching to postcopy", args.json)?;
    Ok(ExitCode::SUCCESS)
}

/// `pageferry recover`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn recover(args: &OperatorArgs, address: Option<&str>) -> Outcome {
    let mut operator = Operator::connect(&args.socket)?;
    let address = address.map(address_from_root).transpose()?.unwrap_or_default();
    let request =
        Request::Recover { session: [0; 16], address, options: OutgoingOptions::default() };
    let started = operator.ask(&request, JobStarted::decode)?;
    operator.watch_recovery(started.job, args.json)
}

/// `pageferry resume`
///
/// # Errors
/// If the agent does not answer, or refuses.
pub fn resume(args: &OperatorArgs, force: bool) -> Outcome {
    Operator::connect(&args.socket)?.ask(&Request::Resume { force }, |_| Ok(()))?;
    show::done("resumed", args.json)?;
    Ok(ExitCode::SUCCESS)
}
