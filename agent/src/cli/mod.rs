// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line: `pageferry agent`, and the operator's subcommands.
//!
//! - [`agent`], [`run_agent`]: the agent itself; [`agent_args`]: its options that `pageferry qemu`
//!   has, too;
//! - [`log_writer`], [`log_limit`], [`log_line`]: its log;
//! - [`operator`]: the operator's commands, one function each;
//! - [`agent_connection`]: requests to a running agent, and its events;
//! - [`watch`]: watches a job until it ends;
//! - [`migration`]: the arguments of migrations;
//! - [`snapshot`]: the arguments of snapshots and restores;
//! - [`parse`]: the values of options;
//! - [`qemu`]: agents for unmodified QEMUs;
//! - [`image`]: tools for image files, which need no agent;
//! - [`check`]: what this machine offers;
//! - [`manual`]: man pages, and completions for shells;
//! - [`show_agent`]: what an agent serves, as a table and as JSON;
//! - [`show`]: the status of a job as a table, as JSON and as a sentence;
//! - [`progress`]: the progress of a job, on a terminal, as lines and as JSON;
//! - [`exit`]: the exit codes;
//! - `open_files`: the limit of open files.
//!
//! This room may print to standard output and standard error.
#![allow(clippy::print_stderr)]

pub mod agent;
pub mod agent_args;
pub mod agent_connection;
pub mod check;
pub mod devices;
pub mod exit;
pub mod image;
pub mod log_limit;
pub mod log_line;
pub mod log_writer;
pub mod manual;
pub mod migration;
mod open_files;
pub mod operator;
pub mod parse;
pub mod progress;
pub mod qemu;
pub mod run_agent;
pub mod show;
pub mod show_agent;
pub mod signals;
pub mod snapshot;
pub mod upgrade;
pub mod watch;

use agent_args::AgentArgs;
use clap::{Args, CommandFactory, Parser, Subcommand};
use env_logger::Env;
use exit::Exit;
use migration::{ListenArgs, MigrateArgs, RecoverArgs, ResumeArgs, SetArgs, UsageError};
use parse::parse_duration;
use std::error::Error;
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// Moves and saves the memory of running virtual machines, outside of the VMM.
#[derive(Debug, Parser)]
#[command(name = "pageferry", version, about, max_term_width = 100, after_help = exit::HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve one VMM: take its memory, and migrate, save or restore its guest when asked.
    #[command(after_help = agent_args::ENVIRONMENT)]
    Agent(AgentArgs),
    /// Show the VM, its memory, and the current or last job.
    Status(StatusArgs),
    /// Show a job's progress until it ends. Ctrl-C ends the command, not the job.
    Watch(WatchArgs),
    /// Migrate the guest to another agent, which must be listening, and watch. Ctrl-C ends the
    /// command, not the job; a second Ctrl-C cancels the job.
    Migrate(MigrateArgs),
    /// Wait for a guest that migrates here, in a VMM that allows it, and watch. Ctrl-C ends the
    /// command, not the job; a second Ctrl-C cancels the job.
    Listen(ListenArgs),
    /// Save the guest to an image, and watch.
    Snapshot(snapshot::SnapshotCommand),
    /// Restore a guest from an image, in a VMM that allows it, and watch.
    Restore(snapshot::RestoreCommand),
    /// Change options of the running job.
    Set(SetArgs),
    /// Show the agent's balloon, and set how much memory it takes from the guest.
    Balloon(devices::BalloonArgs),
    /// Show the agent's virtio-mem device, and set how much of it the guest is to have.
    Mem(devices::MemArgs),
    /// Cancel the running job. A guest that is here goes on as before the job.
    Cancel(OperatorArgs),
    /// Switch the running migration, which must have mode hybrid, to postcopy when its current pass
    /// ends. The command does not wait for that: `pageferry watch` shows it. `pageferry set
    /// --bandwidth` can make a slow pass shorter.
    Postcopy(OperatorArgs),
    /// Reconnect a paused postcopy, and watch.
    Recover(RecoverArgs),
    /// Resume a guest that a job has left paused here (--resume never). With --force: one whose
    /// hand-over was never confirmed.
    Resume(ResumeArgs),
    /// Have the agent execute its program again, which may be a newer version by now. Its process
    /// and its socket stay. Its VMM loses the agent for a moment, and connects again if it has a
    /// supervisor. A job that runs ends first, except one that brings the memory of a guest which
    /// runs here already: the next program continues that for a VMM that has a supervisor.
    Upgrade(upgrade::UpgradeArgs),
    /// Start or attach an unmodified QEMU, so that its guest can be moved and saved.
    #[command(subcommand)]
    Qemu(qemu::QemuCommand),
    /// Show, check, merge, copy, list, prune, import and export images of guests. This needs no
    /// agent.
    #[command(subcommand, after_help = image::ENVIRONMENT)]
    Image(image::ImageCommand),
    /// Show what this machine offers, and which mode each lack rules out. This needs no agent.
    Check(check::CheckArgs),
    /// Write the man pages of all commands into a folder.
    Man(manual::ManArgs),
    /// Print the completions for a shell.
    Completions(manual::CompletionsArgs),
}

/// The agent to talk to.
#[derive(Debug, Args)]
pub struct OperatorArgs {
    /// The agent's socket.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Print JSON: one object, or one object for each line while a job is watched.
    #[arg(long)]
    pub json: bool,
}

/// What is shown.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// Wait until the agent answers and a VMM has handed over its memory: for scripts that have
    /// just started both. Without a TIME at most 60s.
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true,
          default_missing_value = "60s", value_parser = parse_duration)]
    wait: Option<Duration>,
}

/// What a command does that has started a job.
#[derive(Debug, Clone, Copy, Args)]
pub struct DetachArgs {
    /// Start the job and end the command, without watching.
    #[arg(long)]
    pub detach: bool,
}

/// A job that is watched.
#[derive(Debug, Args)]
pub struct WatchArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    #[command(flatten)]
    pause: PauseArgs,
}

/// What happens if a postcopy loses its connections.
#[derive(Debug, Args)]
pub struct PauseArgs {
    /// If the postcopy is paused, end with exit code 3. Otherwise the command waits until somebody
    /// recovers it.
    #[arg(long)]
    no_wait: bool,
}

/// Makes a write beyond the limit of a file's size (`ulimit -f`) an error of that write.
///
/// Otherwise the kernel sends SIGXFSZ, which ends the process: an agent would leave its guest
/// behind, and other commands half a file. The signal gets a handler that does nothing. It is not
/// ignored, because child processes would inherit that.
fn handle_file_size_limit() {
    let handled = signal_hook::flag::register(libc::SIGXFSZ, Arc::default());
    if let Err(error) = handled {
        log::warn!("a file that reaches its size limit will end this process: {error}");
    }
}

/// Runs the command line `arguments`, program name first.
pub fn main_from<I>(arguments: I) -> ExitCode
where
    I: IntoIterator,
    I::Item: Into<OsString> + Clone,
{
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Fails only if the output cannot be written.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    // The agent has a log of its own.
    if !matches!(cli.command, Command::Agent(_)) {
        // Fails if this process has a logger already, as in a test that calls this twice.
        let _ = env_logger::Builder::from_env(Env::default().default_filter_or("warn")).try_init();
        handle_file_size_limit();
    }
    let outcome = match cli.command {
        Command::Agent(args) => agent::run(&args),
        Command::Status(args) => operator::status(&args.operator, args.wait),
        Command::Watch(args) => operator::watch_job(&args.operator, args.pause.no_wait),
        Command::Migrate(args) => args.options.try_into().map_err(Box::from).and_then(|options| {
            let watched = operator::Watched::new(args.detach, &args.pause);
            operator::migrate(&args.operator, &args.to, watched, options)
        }),
        Command::Snapshot(args) => operator::snapshot(args),
        Command::Restore(args) => operator::restore(args),
        Command::Listen(args) => {
            let watched = operator::Watched::new(args.detach, &args.pause);
            operator::listen(
                &args.operator,
                &args.address,
                watched,
                args.options.options(args.huge_pages),
            )
        }
        Command::Set(args) => operator::set(&args.operator, (&args.changes).into()),
        Command::Balloon(args) => devices::balloon(&args),
        Command::Mem(args) => devices::mem(&args),
        Command::Cancel(args) => operator::cancel(&args),
        Command::Postcopy(args) => operator::postcopy(&args),
        Command::Recover(args) => operator::recover(&args.operator, args.address.as_deref()),
        Command::Resume(args) => operator::resume(&args.operator, args.force),
        Command::Upgrade(args) => upgrade::upgrade(&args),
        Command::Qemu(command) => qemu::run(&command),
        Command::Image(command) => image::run(&command),
        Command::Check(args) => check::run(&args),
        Command::Man(args) => manual::write_man_pages(Cli::command(), &args),
        Command::Completions(args) => manual::print_completions(Cli::command(), &args),
    };
    exit_code(outcome)
}

/// The exit code of a command that ended so. Says what has failed.
fn exit_code(outcome: Result<Exit, Box<dyn Error>>) -> ExitCode {
    let exit = outcome.unwrap_or_else(|error| {
        if exit::is_closed_pipe(&*error) {
            return Exit::NoReader;
        }
        // Nobody can be told if standard error cannot be written.
        let advice = open_files::advice(&*error).unwrap_or_default();
        let why = crate::error::chain(&*error);
        let _ = writeln!(std::io::stderr(), "pageferry: {why}{advice}");
        if error.is::<UsageError>() { Exit::BadInput } else { Exit::Failed }
    });
    exit.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::control::job::OutgoingOptions;

    #[test]
    fn options_that_do_not_go_together_are_refused_by_their_flags() {
        for (arguments, sentence) in [
            ("--switch-after 3", "--switch-after needs --mode hybrid"),
            ("--policy postcopy", "--policy postcopy needs --mode hybrid"),
            ("--release", "--release needs --mode postcopy or --mode hybrid"),
            (
                "--mode postcopy --streams 60 --urgent-streams 5",
                "--streams 60 and --urgent-streams 5 are 65 connections: at most 64 are allowed",
            ),
        ] {
            let all = ["pageferry", "migrate", "--socket", "/a", "--to", "unix:/b"];
            let all = all.into_iter().chain(arguments.split(' '));
            let Command::Migrate(args) = Cli::try_parse_from(all).unwrap().command else {
                panic!("{arguments}")
            };
            let refused = OutgoingOptions::try_from(args.options).unwrap_err();
            assert_eq!(refused.to_string(), sentence);
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
