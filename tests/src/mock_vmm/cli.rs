// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The options of `mock_vmm`.

use clap::{Args, Parser, Subcommand, ValueEnum};
use pageferry_agent::cli::migration::OutgoingArgs;
use pageferry_agent::cli::parse::{parse_duration, parse_resume, parse_size};
use pageferry_client::ResumePolicy;
use std::path::PathBuf;
use std::time::Duration;

const ABOUT: &str = "A VMM for trying an agent by hand: its guest is a file";

/// A VMM without a virtual machine. It hands a file to an agent as guest memory, writes to it at a
/// set rate, and migrates, saves or restores it.
#[derive(Debug, Parser)]
#[command(name = "mock_vmm", version, about = ABOUT, max_term_width = 100)]
pub struct Cli {
    /// Which side it is.
    #[command(subcommand)]
    pub command: Command,
}

/// The two sides, and clones.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a guest and migrate it away, or save it.
    Source(SourceArgs),
    /// Wait for a guest, or restore one. The guest is verified and resumed, but does not write, so
    /// that the two files can be compared.
    Destination(DestinationArgs),
    /// Run many guests of one image, each with an agent of its own. They share the pages that none
    /// of them has written. Each is verified. Their agents have no socket: this is for looking at
    /// times and memory.
    Clone(CloneArgs),
}

/// What both sides need.
#[derive(Debug, Args)]
pub struct Common {
    /// The agent's socket.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// The guest's memory: an existing sparse file, which is used as it is.
    #[arg(long, value_name = "FILE")]
    pub memory: PathBuf,
    /// Size of the guest's memory in bytes, with K, M, G or T. The file may not be shorter.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: u64,
    /// Print one JSON object at the end.
    #[arg(long)]
    pub json: bool,
    /// Connect again when the agent is lost, and go on if no memory of the guest is lost by that.
    /// Without this the VMM ends then.
    #[arg(long)]
    pub supervise: bool,
}

/// Options of the source.
#[derive(Debug, Args)]
pub struct SourceArgs {
    /// What both sides need.
    #[command(flatten)]
    pub common: Common,
    /// Discard this range before the migration. May be given more than once.
    #[arg(long, value_name = "OFFSET+LENGTH", value_parser = parse_range)]
    pub discard: Vec<ByteRange>,
    /// Discard this range during the migration, after its first pass began. May be given more than
    /// once.
    #[arg(long, value_name = "OFFSET+LENGTH", value_parser = parse_range)]
    pub discard_during: Vec<ByteRange>,
    /// Tell the agent about the discards, but leave the stale bytes allocated in the file.
    #[arg(long)]
    pub no_punch: bool,
    /// Pages that the guest writes per second, at random among the pages that are allocated in the
    /// file at the start and not discarded.
    #[arg(long, value_name = "PAGES_PER_SECOND", default_value_t = 0)]
    pub write_rate: u64,
    /// Start with a guest that its operator has paused. It is moved or saved paused.
    #[arg(long)]
    pub start_paused: bool,
    /// What reports the guest's writes: the guest marks the shared dirty log, or the agent scans
    /// the mapping with userfaultfd.
    #[arg(long, value_enum, default_value_t = TrackerName::Log)]
    pub tracker: TrackerName,
    /// Where the destination's agent listens: tcp:HOST:PORT, tls:HOST:PORT or unix:PATH. Without
    /// this and without --snapshot-to the guest runs for 60 seconds, or --run-for, so that an
    /// operator can save or migrate it.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "snapshot_to")]
    pub to: Option<String>,
    /// Save the guest to this image, a file or a name in a store, instead of migrating it. Of the
    /// migration options only --bandwidth and --hook-timeout have an effect.
    #[arg(long, value_name = "FILE")]
    pub snapshot_to: Option<PathBuf>,
    /// With --snapshot-to: replace an image that has this name when the new one is complete.
    #[arg(long, requires = "snapshot_to")]
    pub replace: bool,
    /// With --snapshot-to: pause the guest until its memory is saved.
    #[arg(long, requires = "snapshot_to")]
    pub paused: bool,
    /// How long to wait for an operator.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub run_for: Duration,
    /// How the guest is migrated.
    #[command(flatten)]
    pub outgoing: OutgoingArgs,
}

/// Options of the destination.
#[derive(Debug, Args)]
pub struct DestinationArgs {
    /// What both sides need.
    #[command(flatten)]
    pub common: Common,
    /// Where the destination's agent listens for the source: tcp:HOST:PORT, tls:HOST:PORT or
    /// unix:PATH. Without this and without --restore-from the VMM waits for 60 seconds, or
    /// --wait-for, so that an operator can restore a guest, or have one migrate here.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "restore_from")]
    pub listen: Option<String>,
    /// Restore a guest from this image instead of waiting for one.
    #[arg(long, value_name = "FILE")]
    pub restore_from: Option<PathBuf>,
    /// With --restore-from: resume the guest at once. Its memory follows.
    #[arg(long, requires = "restore_from")]
    pub lazy: bool,
    /// With --lazy: read ahead the pages that this file names. If the file does not exist, write
    /// to it which pages the guest touches first.
    #[arg(long, value_name = "FILE", requires = "lazy")]
    pub working_set: Option<PathBuf>,
    /// Whether the guest is resumed: auto, if it ran before; never, it stays paused.
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = parse_resume)]
    pub resume: ResumePolicy,
    /// How long to wait for an operator.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub wait_for: Duration,
}

/// Options of clones.
#[derive(Debug, Args)]
pub struct CloneArgs {
    /// The image of a guest of mock_vmm: a file, or the name of an image in a store of --store.
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
    /// Number of clones. They run in this process.
    #[arg(short, long, value_name = "COUNT", default_value_t = 16,
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub number: u32,
    /// The program that is started as the agent of each clone, with the arguments agent --stdin.
    #[arg(long, value_name = "PROGRAM", default_value = "pageferry")]
    pub agent: PathBuf,
    /// A store that the agents may use, as in pageferry agent --store. May be given more than once.
    #[arg(long, value_name = "STORE")]
    pub store: Vec<String>,
    /// Have each clone write to all pages of the first SIZE bytes of its memory, with K, M, G or T.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub write: Option<u64>,
    /// Print one JSON object instead of tables.
    #[arg(long)]
    pub json: bool,
    /// How long to keep the clones after the report.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = parse_duration)]
    pub run_for: Duration,
    /// How long to wait for a clone to have all its memory.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub wait_for: Duration,
}

/// What reports the guest's writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TrackerName {
    /// The shared dirty log.
    Log,
    /// Asynchronous write protection by userfaultfd.
    Uffd,
}

/// A range of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

/// Reads `OFFSET+LENGTH`.
///
/// # Errors
/// What is allowed.
pub fn parse_range(text: &str) -> Result<ByteRange, String> {
    let (offset, length) = text
        .split_once('+')
        .ok_or_else(|| format!("\"{text}\": write OFFSET+LENGTH, as 256M+64M"))?;
    Ok(ByteRange { offset: parse_size(offset)?, length: parse_size(length)? })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn ranges_are_read_or_refused_with_what_is_allowed() {
        assert_eq!(parse_range("1M+4K"), Ok(ByteRange { offset: 1 << 20, length: 4096 }));
        for wrong in ["1M", "1M-4K", "+", "1M+"] {
            assert!(parse_range(wrong).unwrap_err().contains('"'), "{wrong}");
        }
    }
}
