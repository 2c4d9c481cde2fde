// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry upgrade`: has an agent execute its program again, which may be a newer one by now.

use super::OperatorArgs;
use super::agent_connection::AgentConnection;
use super::exit::Exit;
use clap::Args;
use pageferry_protocol::control::AgentInfo;
use pageferry_protocol::control::job::JobStatus;
use pageferry_protocol::control::request::Request;
use serde_json::json;
use std::error::Error;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the agent may take before it is said what it waits for.
const PATIENCE: Duration = Duration::from_millis(500);

/// The program that the agent is to execute.
#[derive(Debug, Args)]
pub struct UpgradeArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// Execute this program instead of the one that the agent was started with. It must belong to
    /// root or to the owner of that one, and nobody else may write to it. Later upgrades execute it
    /// again.
    #[arg(long, value_name = "BINARY")]
    to: Option<PathBuf>,
}

/// `pageferry upgrade`
///
/// # Errors
/// If the agent does not answer, before or afterwards, or cannot be upgraded.
pub fn upgrade(args: &UpgradeArgs) -> Result<Exit, Box<dyn Error>> {
    let UpgradeArgs { operator: args, to } = args;
    let program = to.as_deref().map(absolute).transpose()?.unwrap_or_default();
    let mut agent = AgentConnection::open(&args.socket)?;
    let before = agent.ask(&Request::QueryAgent, AgentInfo::decode)?;
    let status = agent.ask(&Request::QueryStatus, JobStatus::decode)?;
    agent.ask(&Request::Upgrade { program }, |_| Ok(()))?;
    if !agent.ends_within(PATIENCE)? {
        eprintln!(
            "pageferry: the agent is upgraded when job {} ({}) has ended",
            status.job,
            status.kind.name()
        );
        while !agent.ends_within(PATIENCE)? {}
    }
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

/// The path for the agent, which may have another working directory.
fn absolute(path: &Path) -> Result<String, Box<dyn Error>> {
    let whole = std::path::absolute(path)?;
    let text = whole.to_str().ok_or_else(|| format!("--to {path:?} is no UTF-8"))?;
    Ok(text.to_owned())
}
