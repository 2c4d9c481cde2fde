// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The arguments of `snapshot` and `restore` on the command line.

use super::parse::{
    absolute, parse_bandwidth, parse_capture_memory, parse_folder, parse_huge_pages, parse_resume,
    parse_timeout,
};
use super::{DetachArgs, OperatorArgs};
use clap::Args;
use pageferry_protocol::control::job::{
    HugePages, RestoreMode, RestoreOptions, ResumePolicy, SnapshotMode, SnapshotOptions,
};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A snapshot.
#[derive(Debug, Args)]
pub struct SnapshotCommand {
    #[command(flatten)]
    pub(super) operator: OperatorArgs,
    #[command(flatten)]
    pub(super) detach: DetachArgs,
    /// The image to write: a file, or a name in a store that the agent may use. It appears when it
    /// is complete, and not before.
    #[arg(value_name = "FILE")]
    pub(super) image: PathBuf,
    /// Let the agent read images in this folder, too, on which the image builds. May be given more
    /// than once. The folder of the image, and that of --base, need not be given.
    #[arg(long, value_name = "FOLDER", value_parser = parse_folder)]
    pub(super) folder: Vec<PathBuf>,
    #[command(flatten)]
    pub(super) options: SnapshotArgs,
}

/// Options of a snapshot, for any command line that starts one.
#[derive(Debug, Clone, Args)]
pub struct SnapshotArgs {
    /// What happens to the guest meanwhile.
    #[arg(long, value_name = "MODE", default_value = "background", value_parser = parse_mode,
          help = "What happens to the guest: background, it runs while it is saved; paused, it is paused until its memory is saved")]
    pub mode: SnapshotMode,
    /// Save only what changed since this image, a file or a name in a store. The last snapshot
    /// with --track must have made it, and the VMM must have declared its trackers (see status).
    #[arg(long, value_name = "FILE")]
    pub base: Option<PathBuf>,
    /// Keep track of what is written from now on, so that the next snapshot can be an increment to
    /// this one. The VMM must have declared its trackers (see status).
    #[arg(long)]
    pub track: bool,
    /// Replace an image of that name when the new one is complete. Any other file is refused.
    #[arg(long)]
    pub replace: bool,
    /// Write through the page cache. Use it if the image is restored from soon.
    #[arg(long)]
    pub cached: bool,
    /// In the background: most memory for pages that the guest wrote to before they were saved, at
    /// least 4M, with K, M, G or T. It is allocated as it is needed. If it is full, the guest waits
    /// for the disk.
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = parse_capture_memory)]
    pub capture_memory: u64,
    #[command(flatten)]
    common: ImageArgs,
}

/// A restore.
#[derive(Debug, Args)]
pub struct RestoreCommand {
    #[command(flatten)]
    pub(super) operator: OperatorArgs,
    #[command(flatten)]
    pub(super) detach: DetachArgs,
    /// The image: a file, or the name of an image in a store that the agent may use. The images
    /// that it builds on are found automatically.
    #[arg(value_name = "FILE")]
    pub(super) image: PathBuf,
    /// Let the agent read images in this folder, too, on which the image builds. May be given more
    /// than once. The folder of the image need not be given.
    #[arg(long, value_name = "FOLDER", value_parser = parse_folder)]
    pub(super) folder: Vec<PathBuf>,
    #[command(flatten)]
    pub(super) options: RestoreArgs,
}

/// Options of a restore, for any command line that starts one.
#[derive(Debug, Clone, Args)]
pub struct RestoreArgs {
    /// Run the guest at once. Its memory follows, the pages that it touches first.
    #[arg(long)]
    pub lazy: bool,
    /// With --lazy: read ahead the pages that this file names, or this object of a store. If it
    /// does not exist, write to it which pages the guest touches first. Any file but a working set
    /// is refused.
    #[arg(long, value_name = "FILE", requires = "lazy")]
    pub working_set: Option<PathBuf>,
    /// Whether the guest runs after the restore.
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = parse_resume,
          help = "Whether the guest runs after the restore: auto, if it ran when it was saved; never, it stays paused")]
    pub resume: ResumePolicy,
    /// Whether the guest gets huge pages.
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = parse_huge_pages,
          help = "Without --lazy: whether the guest gets huge pages: auto, where the image has all \
                  of 2 MiB; never")]
    pub huge_pages: HugePages,
    #[command(flatten)]
    common: ImageArgs,
}

/// Options of both snapshots and restores.
#[derive(Debug, Clone, Args)]
pub struct ImageArgs {
    /// Number of threads.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: u16,
    /// Limit in bytes per second, at least 64K, with K, M, G or T. 0 is no limit. Pages that the
    /// guest waits for are not limited.
    #[arg(long, value_name = "BYTES_PER_S", default_value = "0", value_parser = parse_bandwidth)]
    pub bandwidth: u64,
    /// Longest time that the VMM may take to answer a hook.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_timeout)]
    pub hook_timeout: Duration,
}

impl TryFrom<SnapshotArgs> for SnapshotOptions {
    type Error = io::Error;

    fn try_from(args: SnapshotArgs) -> io::Result<Self> {
        let ImageArgs { workers, bandwidth, hook_timeout } = args.common;
        let SnapshotArgs { mode, base, track, replace, cached, capture_memory, .. } = args;
        let base = base.as_deref().map(from_root).transpose()?.unwrap_or_default();
        Ok(Self {
            mode,
            workers,
            bandwidth,
            base,
            track,
            replace,
            cached,
            capture_memory,
            hook_timeout,
        })
    }
}

impl TryFrom<RestoreArgs> for RestoreOptions {
    type Error = io::Error;

    fn try_from(args: RestoreArgs) -> io::Result<Self> {
        let ImageArgs { workers, bandwidth, hook_timeout } = args.common;
        let mode = if args.lazy { RestoreMode::Lazy } else { RestoreMode::Eager };
        let working_set =
            args.working_set.as_deref().map(from_root).transpose()?.unwrap_or_default();
        let (resume, huge_pages) = (args.resume, args.huge_pages);
        let shared_base = false;
        Ok(Self {
            mode,
            workers,
            bandwidth,
            working_set,
            resume,
            hook_timeout,
            huge_pages,
            shared_base,
        })
    }
}

/// The absolute path of `path`. The agent's current folder may differ from the operator's, so the
/// agent gets only absolute paths.
///
/// # Errors
/// As [`absolute`], or if the path is not UTF-8.
pub fn from_root(path: &Path) -> io::Result<String> {
    absolute(path)?.into_os_string().into_string().map_err(|path| {
        let sentence = format!("path {} is not UTF-8", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, sentence)
    })
}

fn parse_mode(text: &str) -> Result<SnapshotMode, String> {
    // Mode `Stopped` is for a guest that the VMM has stopped itself, so only a VMM may use it.
    let found = SnapshotMode::NAMES
        .iter()
        .find(|(name, mode)| *name == text && *mode != SnapshotMode::Stopped);
    found.map(|(_, mode)| *mode).ok_or_else(|| format!("\"{text}\": write background or paused"))
}
