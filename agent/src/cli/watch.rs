// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Watches a job until it ends, and says how it ended.
//!
//! The result of a job that completed goes to standard output. If it did not complete, the last
//! line on standard error says why, and what to do. With `--json` the last object on standard
//! output has the same.
//!
//! A job belongs to the agent, and goes on without the command. So Ctrl-C does not end it at once:
//! the command says how to watch and cancel the job, and ends after `GRACE`. A second Ctrl-C in
//! that time cancels the job.

use super::agent_connection::{AgentConnection, Event};
use super::exit::Exit;
use super::progress::{Output, Progress};
use super::show;
use crate::snapshot::upload_progress;
use pageferry_protocol::control::job::{JobKind, JobStatus, Phase};
use pageferry_protocol::control::request::Request;
use pageferry_protocol::error::printable;
use signal_hook::consts::SIGINT;
use std::error::Error;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Time between two status events while a job is watched.
const INTERVAL: Duration = Duration::from_millis(100);
/// How long the command waits for a second Ctrl-C.
const GRACE: Duration = Duration::from_secs(3);

/// What Ctrl-C does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnInterrupt {
    /// It ends the command.
    End,
    /// It ends the command after a moment; a second one cancels the job.
    Cancel,
}

/// What happens if a postcopy is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnPause {
    /// The command waits until it is recovered.
    Wait,
    /// The command ends.
    End,
    /// The command has asked for the recovery, and ends if the postcopy is paused again.
    EndAfterRecovery,
}

/// How a job is watched.
#[derive(Debug, Clone, Copy)]
pub struct Watching {
    /// The number of the job; `None` for the current one.
    pub job: Option<u64>,
    /// Where the progress goes.
    pub output: Output,
    /// What Ctrl-C does.
    pub on_interrupt: OnInterrupt,
    /// What happens if a postcopy is paused.
    pub on_pause: OnPause,
}

/// The SIGINTs of this process.
pub struct Interrupts(UnixStream);

impl Interrupts {
    /// Counts SIGINTs from now on. They do not end the process any more.
    ///
    /// # Errors
    /// If the kernel refuses a descriptor or the handler.
    pub fn catch() -> io::Result<Self> {
        let (ours, handler) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(SIGINT, handler)?;
        Ok(Self(ours))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Takes the SIGINTs that have come. Two that came at once may count as one.
    fn take(&mut self) {
        let mut bytes = [0; 16];
        // Fails only if there are none.
        while self.0.read(&mut bytes).is_ok_and(|count| count > 0) {}
    }
}

/// Watches a job until it ends.
///
/// # Errors
/// If the agent ends or hangs, or the output cannot be written.
pub fn watch(
    agent: &mut AgentConnection, interrupts: &mut Interrupts, watching: Watching,
) -> Result<Exit, Box<dyn Error>> {
    agent.ask(&Request::Subscribe { interval: INTERVAL }, |_| Ok(()))?;
    let mut progress = Progress::new(watching.output);
    let mut ends: Option<Instant> = None;
    let mut recovered = watching.on_pause != OnPause::EndAfterRecovery;
    let mut told = String::new();
    loop {
        let status = match agent.next_event(Some(interrupts.fd()), ends)? {
            Event::Status(status) => status,
            Event::TimedOut => {
                progress.clear();
                return Ok(Exit::Interrupted);
            }
            Event::Interrupted => {
                interrupts.take();
                match (watching.on_interrupt, ends) {
                    (OnInterrupt::End, _) => {
                        progress.clear();
                        return Ok(Exit::Interrupted);
                    }
                    (OnInterrupt::Cancel, None) => {
                        ends = Some(Instant::now() + GRACE);
                        let socket = show::shell_word(agent.path());
                        progress.tell(&format!(
                            "the job goes on without this command: pageferry watch --socket {socket}\n\
                             to cancel it, press Ctrl-C again, or: pageferry cancel --socket {socket}"
                        ))?;
                    }
                    (OnInterrupt::Cancel, Some(_)) => {
                        ends = None;
                        match agent.ask(&Request::Cancel, |_| Ok(())) {
                            Ok(()) => progress.tell("cancelling the job")?,
                            // It is too late, for example. The job goes on to its end.
                            Err(error) => progress.tell(&format!("pageferry: {error}"))?,
                        }
                    }
                }
                continue;
            }
        };
        match watching.job {
            Some(job) if status.job < job => {
                return Err(
                    format!("job {job} ended before its end was seen: its VMM is gone").into()
                );
            }
            // The job ended, and the next one started, between two events.
            Some(job) if status.job > job => {
                let next = status.job;
                return Err(format!(
                    "job {job} was followed by job {next} before its end was seen"
                )
                .into());
            }
            _ => {}
        }
        // A source leaves its pause before it answers the request to recover. So if it is paused
        // now, it is paused again. A destination stays paused until its source connects.
        recovered |= status.kind == JobKind::Outgoing || status.phase != Phase::PostcopyPaused;
        let paused = status.phase == Phase::PostcopyPaused;
        if status.phase.is_final() || (paused && recovered && watching.on_pause != OnPause::Wait) {
            progress.clear();
            return end(&status, watching.output, agent, &told);
        }
        progress.show(&status)?;
        tell_news(&progress, &status, &mut told, agent)?;
    }
}

/// Tells the operator once what is to be known or done while the job goes on.
fn tell_news(
    progress: &Progress, status: &JobStatus, told: &mut String, agent: &AgentConnection,
) -> io::Result<()> {
    let error = status.error_text();
    // The progress shows how far an upload is.
    if error == *told || upload_progress::of_status(status).is_some() {
        return Ok(());
    }
    error.clone_into(told);
    match (error.is_empty(), status.phase) {
        (true, _) => Ok(()),
        (false, Phase::PostcopyPaused) => progress.tell(&show::failure(status, agent.path())),
        (false, _) => progress.tell(&format!("job {}: {error}", status.job)),
    }
}

/// Says how the job ended. A warning goes to standard error, too, unless the operator was `told`.
fn end(
    status: &JobStatus, output: Output, agent: &AgentConnection, told: &str,
) -> Result<Exit, Box<dyn Error>> {
    use io::Write;
    let exit = Exit::of_job(status);
    let warning = status.error_text();
    if exit == Exit::Done && !warning.is_empty() && warning != told {
        writeln!(io::stderr().lock(), "pageferry: warning: {}", printable(warning))?;
    }
    if output == Output::Json || exit == Exit::Done {
        show::print(status, output == Output::Json)?;
    }
    if exit != Exit::Done {
        writeln!(io::stderr().lock(), "pageferry: {}", show::failure(status, agent.path()))?;
    }
    Ok(exit)
}
