// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry agent`: its arguments, its sandbox and its log, before the server starts
//! ([`super::run_agent`]).

use super::agent_options::AgentOptions;
use super::exit::Exit;
use super::log_limit::{Limit, RateLimitedLog};
use super::log_writer::{LogEnd, LogWriter};
use super::{log_line, parse, run_agent};
use crate::sandbox::{self, Sandbox};
use crate::upgrade::program::Program;
use crate::vm_name::VmName;
use clap::Args;
use env_logger::{Builder, Env, Target};
use pageferry_protocol::control::Grants;
use std::error::Error;
use std::path::PathBuf;

/// How the agent is reached, and what it serves.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Listen on this UNIX socket, created with mode 0600. Only the agent's own user and root may
    /// connect. A socket at this path on which nobody listens is replaced. If anything else is
    /// there, the agent refuses to start. At most 107 bytes. Leave the option out if a socket unit
    /// of systemd starts the agent.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Use standard input as the socket to the VMM. The agent ends when this connection ends.
    #[arg(long)]
    pub stdin: bool,
    /// Options that `pageferry qemu` has, too.
    #[command(flatten)]
    pub options: AgentOptions,
    /// Let `upgrade --to` execute programs in this folder and below it, besides the folder of the
    /// agent's own. May be given more than once.
    #[arg(long, value_name = "FOLDER")]
    pub programs: Vec<PathBuf>,
    /// Be the opener of an agent.
    #[arg(long, value_name = "MODE", hide = true, value_enum)]
    pub opener: Option<sandbox::Mode>,
    /// Serve a virtio balloon to a vhost-user front-end that connects to this UNIX socket. What the
    /// guest gives back by it is freed, and left out of migrations and snapshots.
    #[arg(long, value_name = "PATH")]
    pub balloon: Option<PathBuf>,
    /// Serve a virtio-mem device to a vhost-user front-end that connects to this UNIX socket. Its
    /// region is the block --mem-block, which the VMM hands over as discarded.
    #[arg(long, value_name = "PATH", requires = "mem_block")]
    pub mem: Option<PathBuf>,
    /// Name of the block that is the region of --mem.
    #[arg(long, value_name = "NAME", requires = "mem")]
    pub mem_block: Option<String>,
    /// The unit in which the guest plugs and unplugs memory of --mem: a power of two.
    #[arg(long, value_name = "SIZE", requires = "mem", default_value = "2M",
          value_parser = parse::parse_block_size)]
    pub mem_block_size: u64,
}

impl AgentArgs {
    /// What the arguments name.
    fn grants(&self) -> Vec<Grants> {
        let sockets = [&self.socket, &self.balloon, &self.mem].into_iter().flatten();
        let sockets = sockets.map(|path| Grants::default().write(path));
        sockets.chain(self.options.grants()).collect()
    }

    fn enter_sandbox(&self) -> Result<Sandbox, String> {
        let program = Program::of_this_process();
        let program = program.map_err(|error| format!("the program has no path: {error}"))?;
        sandbox::enter(self.options.sandbox, || self.grants(), program.path(), &self.programs)
            .map_err(|error| crate::error::chain(&error))
    }
}

/// Runs the agent, or the opener of one.
///
/// # Errors
/// If it cannot start, or the kernel refuses.
pub fn run(args: &AgentArgs) -> Result<Exit, Box<dyn Error>> {
    if let Some(mode) = args.opener {
        return run_opener(mode);
    }
    // Before the first thread starts.
    let sandbox =
        args.enter_sandbox().map_err(|why| format!("{why}; --sandbox off does without"))?;
    let name = args.options.name.clone().map_or_else(VmName::default, VmName::of_operator);
    let log = start_log(&name);
    super::handle_file_size_limit();
    let outcome = run_agent::run(args, sandbox, name, log.as_ref());
    if let Some(log) = log {
        log.finish();
    }
    outcome
}

/// Starts the log, whose lines a thread writes. Without that thread they are written where they are
/// made.
fn start_log(name: &VmName) -> Option<LogEnd> {
    let mut builder = Builder::from_env(Env::default().default_filter_or("info"));
    log_line::name_the_vm(&mut builder, name.clone());
    let limit = Limit::default();
    let Ok((writer, end)) = LogWriter::start(std::io::stderr(), limit.clone()) else {
        // Fails if this process has a logger already, as in a test that calls this twice.
        let _ = builder.try_init();
        return None;
    };
    builder.target(Target::Pipe(Box::new(writer)));
    let logger = builder.build();
    let level = logger.filter();
    // Fails in the same case.
    if log::set_boxed_logger(Box::new(RateLimitedLog::new(logger, limit))).is_ok() {
        log::set_max_level(level);
    }
    Some(end)
}

/// Serves as the opener of an agent.
fn run_opener(mode: sandbox::Mode) -> Result<Exit, Box<dyn Error>> {
    let _ = Builder::from_env(Env::default().default_filter_or("warn")).try_init();
    let served = crate::opener::process::run(mode != sandbox::Mode::Log);
    served.map_err(|error| format!("the opener ends: {}", crate::error::chain(&error)))?;
    Ok(Exit::Done)
}
