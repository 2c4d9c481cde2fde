// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry agent`: its sandbox and its log, before the server starts ([`super::run_agent`]).

use super::agent_args::AgentArgs;
use super::exit::Exit;
use super::log_limit::{Limit, RateLimitedLog};
use super::log_writer::{LogEnd, LogWriter};
use super::{log_line, run_agent};
use crate::sandbox::{self, Sandbox};
use crate::upgrade::program::Program;
use crate::vm_name::VmName;
use crate::{base, opener};
use env_logger::{Builder, Env, Target};
use std::error::Error;

/// Runs the agent, or the opener of one.
///
/// # Errors
/// If it cannot start, or the kernel refuses.
pub fn run(args: &AgentArgs) -> Result<Exit, Box<dyn Error>> {
    if let Some(mode) = args.opener {
        return run_opener(mode, args.options.store.clone());
    }
    if args.store_service {
        return run_store_service(args.options.store.clone());
    }
    // Before the first thread starts.
    let sandbox =
        enter_sandbox(args).map_err(|why| format!("{why}; --sandbox off does without"))?;
    let name = args.options.name.clone().map_or_else(VmName::default, VmName::of_operator);
    let log = start_log(&name);
    super::handle_file_size_limit();
    let outcome = run_agent::run(args, sandbox, name, log.as_ref());
    if let Some(log) = log {
        log.finish();
    }
    if !opener::is_asked() {
        // Otherwise the opener does it, when this process has ended.
        base::files::remove_unused();
    }
    outcome
}

/// Enters the sandbox of an agent with these arguments.
fn enter_sandbox(args: &AgentArgs) -> Result<Sandbox, String> {
    let program = Program::of_this_process();
    let program = program.map_err(|error| format!("the program has no path: {error}"))?;
    sandbox::enter(
        args.options.sandbox,
        (|| args.grants(), &args.options.store),
        program.path(),
        &args.programs,
    )
    .map_err(|error| crate::error::chain(&error))
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
fn run_opener(mode: sandbox::Mode, stores: Vec<String>) -> Result<Exit, Box<dyn Error>> {
    let _ = Builder::from_env(Env::default().default_filter_or("warn")).try_init();
    let served = opener::process::run(mode != sandbox::Mode::Log, stores);
    served.map_err(|error| format!("the opener ends: {}", crate::error::chain(&error)))?;
    Ok(Exit::Done)
}

/// Serves as the service of stores of an agent.
fn run_store_service(stores: Vec<String>) -> Result<Exit, Box<dyn Error>> {
    let _ = Builder::from_env(Env::default().default_filter_or("warn")).try_init();
    let served = crate::store::process::run(stores);
    served
        .map_err(|error| format!("the service of stores ends: {}", crate::error::chain(&error)))?;
    Ok(Exit::Done)
}
