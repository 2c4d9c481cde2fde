// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The arguments of migrations on the command line: `migrate`, `listen`, `set`, `recover` and
//! `resume`.

use super::parse::{
    parse_address, parse_bandwidth, parse_compression, parse_duration, parse_huge_pages,
    parse_mode, parse_policy, parse_resume, parse_throttle, parse_timeout,
};
use super::{DetachArgs, OperatorArgs, PauseArgs};
use clap::Args;
use pageferry_protocol::control::job::{
    Compression, HugePages, IncomingOptions, MAX_STREAMS, Mode, NonConvergence, OutgoingOptions,
    Parameters, ResumePolicy,
};
use std::time::Duration;

/// See [`usual_streams`].
const MOST_STREAMS: u16 = 8;

/// A migration.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    #[command(flatten)]
    pub(super) operator: OperatorArgs,
    #[command(flatten)]
    pub(super) detach: DetachArgs,
    #[command(flatten)]
    pub(super) pause: PauseArgs,
    /// Where the destination's agent listens: tcp:HOST:PORT, tls:HOST:PORT or unix:PATH.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    pub(super) to: String,
    #[command(flatten)]
    pub(super) options: OutgoingArgs,
}

/// Streams of a migration if the operator does not say. Each keeps a processor of both hosts busy,
/// and 8 fill any link. In postcopy, pages for which the guest waits share the link with them.
fn usual_streams(mode: Mode) -> u16 {
    if mode.may_postcopy() {
        return 1;
    }
    let processors = crate::processors::count();
    u16::try_from(processors).unwrap_or(MOST_STREAMS).min(MOST_STREAMS)
}

/// Options of an outgoing migration, for any command line that starts one.
#[derive(Debug, Clone, Args)]
pub struct OutgoingArgs {
    /// Number of connections that carry pages, 1 to 64.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64),
          help = "Number of connections that carry pages, 1 to 64 [default: one for each processor, at most 8; 1 with postcopy]")]
    pub streams: Option<u16>,
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
    /// Whether the destination may use huge pages.
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = parse_huge_pages,
          help = "Whether the destination may use huge pages: auto, where all of 2 MiB is used \
                  here; never")]
    pub huge_pages: HugePages,
}

/// Options on the command line that do not go together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub(super) String);

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
        let streams = args.streams.unwrap_or_else(|| usual_streams(args.mode));
        let urgent = args.urgent_streams;
        if args.mode.may_postcopy() && streams + urgent > MAX_STREAMS {
            return Err(UsageError(format!(
                "--streams {streams} and --urgent-streams {urgent} are {} connections: \
                 at most {MAX_STREAMS} are allowed",
                streams + urgent
            )));
        }
        Ok(Self {
            streams,
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
            huge_pages: args.huge_pages,
        })
    }
}

/// A guest that migrates here.
#[derive(Debug, Args)]
pub struct ListenArgs {
    #[command(flatten)]
    pub(super) operator: OperatorArgs,
    #[command(flatten)]
    pub(super) detach: DetachArgs,
    #[command(flatten)]
    pub(super) pause: PauseArgs,
    /// Where to listen: tcp:HOST:PORT, tls:HOST:PORT or unix:PATH. Port 0 lets the kernel choose;
    /// the command says which port it is.
    #[arg(value_name = "ADDRESS", value_parser = parse_address)]
    pub(super) address: String,
    #[command(flatten)]
    pub(super) options: IncomingArgs,
    /// Whether the guest gets huge pages.
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = parse_huge_pages,
          help = "Whether the guest gets huge pages: auto, where its source uses all of 2 MiB; \
                  never")]
    pub(super) huge_pages: HugePages,
}

/// Options of a guest that comes here.
#[derive(Debug, Args)]
pub struct IncomingArgs {
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

impl IncomingArgs {
    /// The options of the job.
    pub fn options(&self, huge_pages: HugePages) -> IncomingOptions {
        let &IncomingArgs { resume, peer_timeout, hook_timeout } = self;
        IncomingOptions { resume, peer_timeout, hook_timeout, huge_pages }
    }
}

/// Changes of the running job. What is not given stays as it is.
#[derive(Debug, Args)]
pub struct SetArgs {
    #[command(flatten)]
    pub(super) operator: OperatorArgs,
    #[command(flatten)]
    pub(super) changes: ChangeArgs,
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
    #[arg(long, value_name = "PERCENT", value_parser = parse_throttle)]
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
    pub(super) operator: OperatorArgs,
    /// At the source: where the destination's agent listens, if that changed. At the destination:
    /// listen at this address, too.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    pub(super) address: Option<String>,
}

/// An operator's decision.
#[derive(Debug, Args)]
pub struct ResumeArgs {
    #[command(flatten)]
    pub(super) operator: OperatorArgs,
    /// For a guest that was handed over, and whose destination did not confirm it: confirm that you
    /// looked at both sides, and the guest does not run at the destination.
    #[arg(long)]
    pub(super) force: bool,
}
