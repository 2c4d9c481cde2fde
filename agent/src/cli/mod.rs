// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line: `pageferry agent`, and the operator's subcommands.
//!
//! - [`run_agent`]: the agent itself;
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

use crate::image::seal::KeySource;
use crate::sandbox::{self, Sandbox};
use crate::transport::Address;
use crate::trust::Folder;
use crate::upgrade::program::Program;
use crate::vm_name::VmName;
use clap::{Args, CommandFactory, Parser, Subcommand};
use exit::Exit;
use migration::{ListenArgs, MigrateArgs, RecoverArgs, ResumeArgs, SetArgs, UsageError};
use pageferry_protocol::control::Grants;
use parse::{parse_duration, parse_name};
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
    /// Show, check and merge images of guests. This needs no agent.
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Show what this machine offers, and which mode each lack rules out. This needs no agent.
    Check(check::CheckArgs),
    /// Write the man pages of all commands into a folder.
    Man(manual::ManArgs),
    /// Print the completions for a shell.
    Completions(manual::CompletionsArgs),
}

/// How the agent is reached.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Listen on this UNIX socket, created with mode 0600. Only the agent's own user and root may
    /// connect. A socket at this path on which nobody listens is replaced. If anything else is
    /// there, the agent refuses to start. At most 107 bytes. Leave the option out if a socket unit
    /// of systemd starts the agent.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Name of the VM in the log, the status and the metrics. Otherwise the VMM may give one, for
    /// the log and the status.
    #[arg(long, value_parser = parse_name)]
    pub name: Option<String>,
    /// Use standard input as the socket to the VMM. The agent ends when this connection ends.
    #[arg(long)]
    pub stdin: bool,
    /// Folder of the certificates for tls:HOST:PORT addresses: ca-cert.pem, and server-cert.pem and
    /// server-key.pem for a destination, client-cert.pem and client-key.pem for a source. What is
    /// in ca-crl.pem is revoked. Files that change are read again. docs/tls.md explains it.
    #[arg(long, value_name = "FOLDER")]
    pub tls: Option<PathBuf>,
    /// File with a token for tls:HOST:PORT addresses, instead of certificates: at least 32 bytes
    /// that nobody can guess, the same at both ends. It is never sent. The file is read again when
    /// it changes. docs/tls.md explains it.
    #[arg(long, value_name = "FILE", conflicts_with = "tls")]
    pub token_file: Option<PathBuf>,
    /// Serve only peers whose certificate has this name. May be given more than once.
    #[arg(long, value_name = "NAME", requires = "tls")]
    pub tls_peer: Vec<String>,
    /// Whether the agent gives up what it does not need: on; log, it only says what it would
    /// refuse; off. In a sandbox the agent opens files only in folders that a command or its VMM
    /// has named, or --folder. docs/sandbox.md explains it.
    #[arg(
        long,
        value_name = "MODE",
        default_value = "on",
        value_enum,
        hide_possible_values = true
    )]
    pub sandbox: sandbox::Mode,
    /// Let the agent open files in this folder and below it, also if nobody names them: images on
    /// which others build. May be given more than once.
    #[arg(long, value_name = "FOLDER")]
    pub folder: Vec<PathBuf>,
    /// Let `upgrade --to` execute programs in this folder and below it, besides the folder of the
    /// agent's own. May be given more than once.
    #[arg(long, value_name = "FOLDER")]
    pub programs: Vec<PathBuf>,
    /// Be the opener of an agent.
    #[arg(long, value_name = "MODE", hide = true, value_enum)]
    pub opener: Option<sandbox::Mode>,
    /// Seal images with the key in this file: encrypt and authenticate them. Then only images are
    /// restored that are sealed with it. The file has 32 bytes or 64 hexadecimal digits, and only
    /// its owner may read it. fd:N reads the key from descriptor N, which the agent inherits.
    /// docs/snapshots.md explains it.
    #[arg(long, value_name = "FILE|fd:N", value_parser = KeySource::parse)]
    pub image_key: Option<KeySource>,
    /// Let guest memory cross networks in the clear: allow tcp:HOST:PORT also where HOST is not a
    /// loopback address. Whoever is on the way can read and change the guest. Without this option
    /// use tls:HOST:PORT, or unix:PATH.
    #[arg(long)]
    pub insecure: bool,
    /// Serve metrics over HTTP at this address, under /metrics, for Prometheus. A UNIX socket gets
    /// mode 0660. Whoever can connect can read them. docs/metrics.md lists them.
    #[arg(long, value_name = "unix:PATH|HOST:PORT", value_parser = crate::metrics::address::parse)]
    pub metrics: Option<Address>,
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
        let metrics = match &self.metrics {
            Some(Address::Unix(path)) => Some(path),
            _ => None,
        };
        let sockets = [self.socket.as_ref(), metrics, self.balloon.as_ref(), self.mem.as_ref()];
        let sockets = sockets.into_iter().flatten().map(|path| Grants::default().write(path));
        let folders = self.folder.iter().map(|path| Grants::default().write(&path.join("any")));
        let trusted = self.tls.iter().flat_map(|folder| Folder::files(folder));
        let image_key = match &self.image_key {
            Some(KeySource::File(path)) => Some(path.clone()),
            _ => None,
        };
        let secrets = image_key.into_iter().chain(self.token_file.clone());
        let read = trusted.chain(secrets).map(|file| Grants::default().read(&file));
        sockets.chain(folders).chain(read).collect()
    }
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
fn handle_file_size_limit() -> std::io::Result<()> {
    signal_hook::flag::register(libc::SIGXFSZ, Arc::default()).map(drop)
}

fn enter_sandbox(args: &AgentArgs) -> Result<Sandbox, String> {
    let program = Program::of_this_process();
    let program = program.map_err(|error| format!("the program has no path: {error}"))?;
    sandbox::enter(args.sandbox, || args.grants(), program.path(), &args.programs)
        .map_err(|error| crate::error::chain(&error))
}

/// Serves as the opener of an agent.
fn opener(mode: sandbox::Mode) -> ExitCode {
    let _ = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .try_init();
    match crate::opener::process::run(mode != sandbox::Mode::Log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("the opener ends: {}", crate::error::chain(&error));
            ExitCode::FAILURE
        }
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
    if let Command::Agent(AgentArgs { opener: Some(mode), .. }) = &cli.command {
        return opener(*mode);
    }
    let mut sandbox = Sandbox::default();
    if let Command::Agent(args) = &cli.command {
        // Before the first thread starts.
        match enter_sandbox(args) {
            Ok(entered) => sandbox = entered,
            Err(why) => {
                eprintln!("pageferry: {why}; --sandbox off does without");
                return ExitCode::FAILURE;
            }
        }
    }
    let default = if matches!(cli.command, Command::Agent(_)) { "info" } else { "warn" };
    let mut logger =
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(default));
    let mut log_end = None;
    let limit = log_limit::Limit::default();
    let vm_name = match &cli.command {
        Command::Agent(AgentArgs { name: Some(name), .. }) => VmName::of_operator(name.clone()),
        _ => VmName::default(),
    };
    if matches!(cli.command, Command::Agent(_)) {
        log_line::name_the_vm(&mut logger, vm_name.clone());
    }
    if matches!(cli.command, Command::Agent(_))
        && let Ok((writer, end)) = log_writer::LogWriter::start(std::io::stderr(), limit.clone())
    {
        logger.target(env_logger::Target::Pipe(Box::new(writer)));
        let logger = logger.build();
        let level = logger.filter();
        // Fails if this process has a logger already, as in a test that calls this twice.
        if log::set_boxed_logger(Box::new(log_limit::RateLimitedLog::new(logger, limit))).is_ok() {
            log::set_max_level(level);
        }
        log_end = Some(end);
    } else {
        // Fails in the same case.
        let _ = logger.try_init();
    }
    if let Err(error) = handle_file_size_limit() {
        log::warn!("a file that reaches its size limit will end this process: {error}");
    }
    let outcome = match cli.command {
        Command::Agent(args) => run_agent::run(&args, sandbox, vm_name, log_end.as_ref()),
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
    if let Some(end) = log_end {
        end.finish();
    }
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
