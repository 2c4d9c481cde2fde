// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry upgrade`: has an agent execute its program again, which may be a newer one by now.

use super::OperatorArgs;
use super::agent_connection::AgentConnection;
use super::exit::Exit;
use super::signals::{self, Disposition};
use pageferry_protocol::control::AgentInfo;
use pageferry_protocol::control::job::JobStatus;
use pageferry_protocol::control::request::Request;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;
use signal_hook::consts::SIGUSR2;
use std::error::Error;
use std::io::{Write, stdout};

/// `pageferry upgrade`
///
/// # Errors
/// If the agent does not answer, before or afterwards, or cannot be upgraded.
pub fn upgrade(args: &OperatorArgs) -> Result<Exit, Box<dyn Error>> {
    let mut agent = AgentConnection::open(&args.socket)?;
    let before = agent.ask(&Request::QueryAgent, AgentInfo::decode)?;
    let status = agent.ask(&Request::QueryStatus, JobStatus::decode)?;
    let path = args.socket.display();
    let process = agent.listener().ok_or("the kernel does not tell the agent's process")?;
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw).ok_or("no such process")?;
    // It stays the same process also if that ends now and its number is used again.
    let agent_process = pidfd_open(pid, PidfdFlags::empty())?;
    // The signal would end a process without a handler.
    if !signals::is(Disposition::Caught, SIGUSR2, process) {
        return Err(format!(
            "the agent on {path} cannot be upgraded so: process {process}, which listens there, \
             has no handler for SIGUSR2; if it is systemd, use systemctl reload; if it is an agent \
             with --stdin, its VMM starts the next one"
        )
        .into());
    }
    if !status.phase.is_final() {
        eprintln!(
            "pageferry: the agent is upgraded when job {} ({}) has ended",
            status.job,
            status.kind.name()
        );
    }
    pidfd_send_signal(&agent_process, Signal::USR2)?;
    agent.wait_for_end()?;
    // The socket listens all the time: this waits in its queue until the next program accepts.
    let mut agent = AgentConnection::open(&args.socket)?;
    let after = agent.ask(&Request::QueryAgent, AgentInfo::decode)?;
    if args.json {
        let (version, before) = (&after.version, &before.version);
        let object = json!({ "version": version, "version_before": before, "pid": after.pid });
        writeln!(stdout().lock(), "{object}")?;
    } else {
        let (process, version, before) = (after.pid, after.version, before.version);
        let text = format!("process {process} is version {version} now, and was {before}");
        writeln!(stdout().lock(), "{text}")?;
    }
    Ok(Exit::Done)
}
