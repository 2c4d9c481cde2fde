// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry upgrade`: has an agent execute its program again, which may be a newer one by now.

use super::OperatorArgs;
use super::agent_connection::AgentConnection;
use super::exit::Exit;
use pageferry_protocol::control::AgentInfo;
use pageferry_protocol::control::job::JobStatus;
use pageferry_protocol::control::request::Request;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;
use signal_hook::consts::SIGUSR2;
use std::error::Error;
use std::io::{Write, stdout};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long the command waits for the agent to answer again.
const TIMEOUT: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(20);

/// True if the process has a handler for SIGUSR2. The signal would end any other.
fn takes_signal(process: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    caught >> (SIGUSR2 - 1) & 1 == 1
}

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
    if !takes_signal(process) {
        return Err(format!(
            "{path} belongs to process {process}, which takes no SIGUSR2: it is systemd (use \
             systemctl kill --signal=SIGUSR2), or an agent that cannot be upgraded"
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
    let deadline = Instant::now() + TIMEOUT;
    let after = loop {
        let asked = AgentConnection::open(&args.socket)
            .and_then(|mut agent| agent.ask(&Request::QueryAgent, AgentInfo::decode));
        match asked {
            Ok(after) => break after,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => sleep(RETRY),
        }
    };
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
