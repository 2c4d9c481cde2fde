// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line: `pageferry agent`, and the operator's subcommands.
//!
//! - [`run_agent`]: the agent itself;
//! - [`log_writer`], [`log_limit`], [`log_line`]: its log;
//! - [`operator`]: the operator's commands, one function each;
//! - [`agent_connection`]: requests to a running agent, and its events;
//! - [`watch`]: watches a job until it ends;
//! - [`snapshot`]: the arguments of snapshots and restores;
//! - [`image`]: tools for image files, which need no agent;
//! - [`check`]: what this machine offers;
//! - [`manual`]: man pages, and completions for shells;
//! - [`show_agent`]: what an agent serves, as a table and as JSON;
//! - [`show`]: the status of a job as a table, as JSON and as a sentence;
//! - [`progress`]: the progress of a job, on a terminal, as lines and as JSON;
//! - [`exit`]: the exit codes.
//!
//! This room may print to standard output and standard error.
#![allow(clippy::print_stderr)]

pub mod agent_connection;
pub mod check;
pub mod exit;
pub mod image;
pub mod log_limit;
pub mod log_line;
pub mod log_writer;
pub mod manual;
pub mod operator;
pub mod progress;
pub mod run_agent;
pub mod show;
pub mod show_agent;
pub mod snapshot;
pub mod watch;

use crate::transport::Address;
use crate::vm_name::VmName;
use clap::{Args, CommandFactory, Parser, Subcommand};
use exit::Exit;
use pageferry_protocol::control::job::{
    Compression, IncomingOptions, MAX_STREAMS, MIN_BANDWIDTH, Mode, NonConvergence,
    OutgoingOptions, Parameters, ResumePolicy,
};
use pageferry_protocol::control::request::MAX_VM_NAME;
use std::ffi::OsString;
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
    /// Cancel the running job. A guest that is here goes on as before the job.
    Cancel(OperatorArgs),
    /// Switch the running migration, which must have mode hybrid, to postcopy.
    Postcopy(OperatorArgs),
    /// Reconnect a paused postcopy, and watch.
    Recover(RecoverArgs),
    /// Resume a guest here whose hand-over was never confirmed.
    Resume(ResumeArgs),
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
    /// there, the agent refuses to start. At most 107 bytes.
    #[arg(long, value_name = "PATH", required_unless_present = "stdin")]
    pub socket: Option<PathBuf>,
    /// Name of the VM in the log, the status and the metrics. Otherwise the VMM may give one.
    #[arg(long, value_parser = parse_name)]
    pub name: Option<String>,
    /// Use standard input as the socket to the VMM. The agent ends when this connection ends.
    #[arg(long)]
    pub stdin: bool,
    /// Serve metrics over HTTP at this address, under /metrics, for Prometheus. A UNIX socket gets
    /// mode 0660. Whoever can connect can read them. docs/metrics.md lists them.
    #[arg(long, value_name = "unix:PATH|HOST:PORT", value_parser = crate::metrics::address::parse)]
    pub metrics: Option<Address>,
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

/// A migration.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    #[command(flatten)]
    detach: DetachArgs,
    #[command(flatten)]
    pause: PauseArgs,
    /// Where the destination's agent listens: tcp:HOST:PORT or unix:PATH.
    #[arg(long, value_name = "ADDRESS")]
    to: String,
    #[command(flatten)]
    options: OutgoingArgs,
}

/// Options of an outgoing migration, for any command line that starts one.
#[derive(Debug, Clone, Args)]
pub struct OutgoingArgs {
    /// Number of connections that carry pages.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub streams: u16,
    /// Longest pause of the guest for the last pass. If nothing is dirty, the guest is paused
    /// whatever the limit is.
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = parse_duration)]
    pub downtime_limit: Duration,
    /// Limit in bytes per second, at least 64K, with K, M, G or T. 0 is no limit.
    #[arg(long, value_name = "BYTES_PER_S", default_value = "0", value_parser = parse_bandwidth)]
    pub bandwidth: u64,
    /// Passes after which the policy decides. 0 is no limit. With keep-going more passes follow.
    #[arg(long, value_name = "PASSES", default_value_t = 30)]
    pub max_passes: u32,
    /// What to do if the passes do not converge.
    #[arg(long, value_name = "POLICY", value_parser = parse_policy,
          help = "What to do if the passes do not converge: keep-going, throttle, stop, fail, or postcopy with --mode hybrid \
                  [default: postcopy with --mode hybrid, keep-going without]")]
    pub policy: Option<NonConvergence>,
    /// Whether the guest may move before its memory.
    #[arg(long, value_name = "MODE", default_value = "precopy", value_parser = parse_mode,
          help = "What moves first: precopy, the memory; postcopy, the guest; hybrid, the memory until it switches to postcopy")]
    pub mode: Mode,
    /// With --mode hybrid: switch to postcopy after this many passes. 0 is never.
    #[arg(long, value_name = "PASSES", default_value_t = 0)]
    pub switch_after: u32,
    /// With postcopy: number of connections for pages that the guest waits for.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=63))]
    pub urgent_streams: u16,
    /// With postcopy: free each page at the source when the destination has it.
    #[arg(long)]
    pub release: bool,
    /// Whether the guest runs at the destination.
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = parse_resume,
          help = "Whether the guest runs at the destination: auto, if it ran here; never, it arrives paused")]
    pub resume: ResumePolicy,
    /// How pages are compressed.
    #[arg(long, value_name = "METHOD", default_value = "none", value_parser = parse_compression,
          help = "How pages are compressed: none, lz4, zstd or zstd:LEVEL, with a level of 1 to 19")]
    pub compress: Compression,
    /// Longest silence of the peer, and longest time for one record. The hand-over of the paused
    /// guest may take this time, two hook timeouts, and ten times the transfer that must come
    /// before it at the measured bandwidth (or once that transfer at 1 MiB/s if none was measured).
    /// If it takes longer, the guest goes on here.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_timeout)]
    pub peer_timeout: Duration,
    /// Longest time that the VMM may take to answer a hook.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_timeout)]
    pub hook_timeout: Duration,
}

/// Options on the command line that do not go together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(String);

impl TryFrom<OutgoingArgs> for OutgoingOptions {
    type Error = UsageError;

    fn try_from(args: OutgoingArgs) -> Result<Self, UsageError> {
        let hybrid = args.mode == Mode::Hybrid;
        let policy = args.policy.unwrap_or(match hybrid {
            true => NonConvergence::Postcopy,
            false => NonConvergence::KeepGoing,
        });
        let refused = |sentence: &str| Err(UsageError(sentence.to_owned()));
        if args.switch_after != 0 && !hybrid {
            return refused("--switch-after needs --mode hybrid");
        }
        if policy == NonConvergence::Postcopy && !hybrid {
            return refused("--policy postcopy needs --mode hybrid");
        }
        if args.release && !args.mode.may_postcopy() {
            return refused("--release needs --mode postcopy or --mode hybrid");
        }
        let (streams, urgent) = (args.streams, args.urgent_streams);
        if args.mode.may_postcopy() && streams + urgent > MAX_STREAMS {
            return Err(UsageError(format!(
                "--streams {streams} and --urgent-streams {urgent} are {} connections: \
                 at most {MAX_STREAMS} are allowed",
                streams + urgent
            )));
        }
        Ok(Self {
            streams: args.streams,
            downtime_limit: args.downtime_limit,
            bandwidth: args.bandwidth,
            max_passes: args.max_passes,
            policy,
            compression: args.compress,
            mode: args.mode,
            switch_after: args.switch_after,
            urgent_streams: args.urgent_streams,
            release: args.release,
            resume: args.resume,
            peer_timeout: args.peer_timeout,
            hook_timeout: args.hook_timeout,
        })
    }
}

/// A guest that migrates here.
#[derive(Debug, Args)]
pub struct ListenArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    #[command(flatten)]
    detach: DetachArgs,
    #[command(flatten)]
    pause: PauseArgs,
    /// Where to listen: tcp:HOST:PORT or unix:PATH. Port 0 lets the kernel choose; the command says
    /// which port it is.
    #[arg(value_name = "ADDRESS")]
    address: String,
    /// Whether the guest runs here.
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = parse_resume,
          help = "Whether the guest runs here: auto, if it ran at its source; never, it stays paused")]
    resume: ResumePolicy,
    /// Longest silence of the source once it is connected.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_timeout)]
    peer_timeout: Duration,
    /// Longest time that the VMM may take to answer a hook.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_timeout)]
    hook_timeout: Duration,
}

impl From<&ListenArgs> for IncomingOptions {
    fn from(args: &ListenArgs) -> Self {
        let &ListenArgs { resume, peer_timeout, hook_timeout, .. } = args;
        Self { resume, peer_timeout, hook_timeout }
    }
}

/// Changes of the running job. What is not given stays as it is.
#[derive(Debug, Args)]
pub struct SetArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    #[command(flatten)]
    changes: ChangeArgs,
}

/// At least one change.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct ChangeArgs {
    /// Limit in bytes per second, at least 64K, with K, M, G or T. 0 is no limit. A snapshot and a
    /// restore have it, too.
    #[arg(long, value_name = "BYTES_PER_S", value_parser = parse_bandwidth)]
    bandwidth: Option<u64>,
    /// Longest pause of the guest for the last pass.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    downtime_limit: Option<Duration>,
    /// Passes after which the policy decides. 0 is no limit.
    #[arg(long, value_name = "PASSES")]
    max_passes: Option<u32>,
    /// What to do if the passes do not converge.
    #[arg(long, value_name = "POLICY", value_parser = parse_policy,
          help = "What to do if the passes do not converge: keep-going, throttle, stop, fail, or postcopy in mode hybrid")]
    policy: Option<NonConvergence>,
    /// In mode hybrid: switch to postcopy after this many passes. 0 is never.
    #[arg(long, value_name = "PASSES")]
    switch_after: Option<u32>,
    /// Least throttle of the guest in percent of its time, from the next pass on. The policy may
    /// throttle more.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(0..=99))]
    throttle: Option<u32>,
}

impl From<&ChangeArgs> for Parameters {
    fn from(args: &ChangeArgs) -> Self {
        let &ChangeArgs { bandwidth, downtime_limit, max_passes, policy, switch_after, throttle } =
            args;
        Self { bandwidth, downtime_limit, max_passes, policy, switch_after, throttle }
    }
}

/// A paused postcopy.
#[derive(Debug, Args)]
pub struct RecoverArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// At the source: where the destination's agent listens, if that changed. At the destination:
    /// listen at this address, too.
    #[arg(long, value_name = "ADDRESS")]
    address: Option<String>,
}

/// An operator's decision.
#[derive(Debug, Args)]
pub struct ResumeArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// Confirm that you looked at both sides, and the guest does not run at the destination.
    #[arg(long)]
    force: bool,
}

/// Reads a time: a number with us, ms, s, m or h.
///
/// # Errors
/// If the text is malformed. The error says what is allowed.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("\"{text}\": write a number and us, ms, s, m or h, as 300ms")),
    };
    let number: f64 =
        digits.parse().map_err(|_| format!("\"{text}\": \"{digits}\" is not a number"))?;
    Duration::try_from_secs_f64(number * unit).map_err(|error| format!("\"{text}\": {error}"))
}

/// Reads the longest time that something may take: as [`parse_duration`], but at least a
/// microsecond and at most a day.
///
/// # Errors
/// If the text is malformed or the time not allowed. The error says what is allowed.
pub fn parse_timeout(text: &str) -> Result<Duration, String> {
    const LONGEST: Duration = Duration::from_secs(24 * 3600);
    match parse_duration(text)? {
        time if (Duration::from_micros(1)..=LONGEST).contains(&time) => Ok(time),
        _ => Err(format!("\"{text}\": write a time from 1us to 24h")),
    }
}

/// Reads a number of bytes, with K, M, G or T for powers of 1024.
///
/// # Errors
/// If the text is malformed. The error says what is allowed.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    let number = number
        .map_err(|_| format!("\"{text}\": write a number of bytes, with K, M, G or T, as 2G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("\"{text}\" does not fit in 64 bits"))
}

/// Reads a bandwidth limit: as [`parse_size`], but at least [`MIN_BANDWIDTH`], or 0 for no limit.
///
/// # Errors
/// If the text is malformed or the limit too low. The error says what is allowed.
pub fn parse_bandwidth(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        rate @ (0 | MIN_BANDWIDTH..) => Ok(rate),
        _ => Err(format!("\"{text}\": write at least {}K, or 0 for no limit", MIN_BANDWIDTH >> 10)),
    }
}

/// Reads the name of a VM.
fn parse_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > MAX_VM_NAME || text.chars().any(char::is_control) {
        return Err(format!("{text:?}: write 1 to {MAX_VM_NAME} bytes without control characters"));
    }
    Ok(text.to_owned())
}

fn parse_policy(text: &str) -> Result<NonConvergence, String> {
    let found = NonConvergence::NAMES.iter().find(|(name, _)| *name == text);
    found
        .map(|(_, policy)| *policy)
        .ok_or_else(|| format!("\"{text}\": write keep-going, throttle, stop, fail or postcopy"))
}

fn parse_mode(text: &str) -> Result<Mode, String> {
    let found = Mode::NAMES.iter().find(|(name, _)| *name == text);
    found
        .map(|(_, mode)| *mode)
        .ok_or_else(|| format!("\"{text}\": write precopy, postcopy or hybrid"))
}

/// Reads whether a guest runs where it arrives: auto or never.
///
/// # Errors
/// If the text is something else. The error says what is allowed.
pub fn parse_resume(text: &str) -> Result<ResumePolicy, String> {
    let found = ResumePolicy::NAMES.iter().find(|(name, _)| *name == text);
    found.map(|(_, policy)| *policy).ok_or_else(|| format!("\"{text}\": write auto or never"))
}

fn parse_compression(text: &str) -> Result<Compression, String> {
    match (text, text.strip_prefix("zstd:")) {
        ("none", _) => Ok(Compression::None),
        ("lz4", _) => Ok(Compression::Lz4),
        ("zstd", _) => Ok(Compression::Zstd(Compression::DEFAULT_LEVEL)),
        (_, Some(level)) => match level.parse() {
            Ok(level @ 1..=Compression::MAX_LEVEL) => Ok(Compression::Zstd(level)),
            _ => Err(format!(
                "\"{text}\": \"{level}\" is not a level from 1 to {}",
                Compression::MAX_LEVEL
            )),
        },
        _ => Err(format!("\"{text}\": write none, lz4, zstd or zstd:LEVEL")),
    }
}

/// Makes a write beyond the limit of a file's size (`ulimit -f`) an error of that write.
///
/// Otherwise the kernel sends SIGXFSZ, which ends the process: an agent would leave its guest
/// behind, and other commands half a file. The signal gets a handler that does nothing. It is not
/// ignored, because child processes would inherit that.
fn handle_file_size_limit() -> std::io::Result<()> {
    signal_hook::flag::register(libc::SIGXFSZ, Arc::default()).map(drop)
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
        Command::Agent(args) => run_agent::run(&args, vm_name),
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
            operator::listen(&args.operator, &args.address, watched, (&args).into())
        }
        Command::Set(args) => operator::set(&args.operator, (&args.changes).into()),
        Command::Cancel(args) => operator::cancel(&args),
        Command::Postcopy(args) => operator::postcopy(&args),
        Command::Recover(args) => operator::recover(&args.operator, args.address.as_deref()),
        Command::Resume(args) => operator::resume(&args.operator, args.force),
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
        eprintln!("pageferry: {}", crate::error::chain(&*error));
        if error.is::<UsageError>() { Exit::BadInput } else { Exit::Failed }
    });
    exit.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_read_or_refused_with_the_reason() {
        assert_eq!(parse_duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        for wrong in ["", "3", "ms", "-1s", "1e99h"] {
            assert!(
                parse_duration(wrong).unwrap_err().contains(&format!("\"{wrong}\"")),
                "{wrong}"
            );
        }
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert_eq!(parse_size("0x1000"), Ok(4096));
        for wrong in ["", "G", "-1", "99999999999T"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
        assert_eq!((parse_bandwidth("0"), parse_bandwidth("64K")), (Ok(0), Ok(64 << 10)));
        for wrong in ["1", "63K", "65535"] {
            assert!(parse_bandwidth(wrong).unwrap_err().contains("at least 64K"), "{wrong}");
        }
    }

    #[test]
    fn a_compression_is_read_or_refused_with_the_reason() {
        assert_eq!(parse_compression("none"), Ok(Compression::None));
        assert_eq!(parse_compression("lz4"), Ok(Compression::Lz4));
        assert_eq!(parse_compression("zstd"), Ok(Compression::Zstd(1)));
        assert_eq!(parse_compression("zstd:19"), Ok(Compression::Zstd(19)));
        for wrong in
            ["", "gzip", "lz4:1", "zstd:", "zstd:0", "zstd:20", "zstd:-1", "zstd:257", "ZSTD"]
        {
            assert!(
                parse_compression(wrong).unwrap_err().contains(&format!("\"{wrong}\"")),
                "{wrong}"
            );
        }
    }

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
        assert!(parse_timeout("0s").unwrap_err().contains("1us to 24h"));
        assert!(parse_timeout("25h").unwrap_err().contains("1us to 24h"));
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
