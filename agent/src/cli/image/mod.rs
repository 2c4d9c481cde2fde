// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry image`: tools for image files, which need no agent.
//!
//! - [`info`]: shows the header, blocks and state of an image, and its chain;
//! - [`map`]: draws a map of the guest's memory;
//! - [`stores`]: copies images, also from and to stores; lists and prunes a store;
//! - [`raw`]: imports raw files of memory as images, and exports images as raw files;
//! - [`layout_args`]: which guest memory is at which offset of a raw file;
//! - this file: the arguments, and the subcommands `verify` and `merge`.

pub mod info;
pub mod layout_args;
pub mod map;
pub mod raw;
pub mod stores;

use super::exit::Exit;
use super::parse::absolute;
use super::show;
use crate::error::chain as sentence;
use crate::image::merge::{MergeKeys, merge_with};
use crate::image::seal::KeySource;
use crate::image::verify::verify_with;
use crate::image::{ImageError, ImageKey};
use crate::store::is_stored;
use crate::store::process::read_past_cache;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pageferry_protocol::image::id_text;
use pageferry_protocol::memory::PAGE_SIZE;
use serde_json::json;
use std::error::Error;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

type Outcome = Result<Exit, Box<dyn Error>>;

/// Most errors that `verify --all` lists.
const MOST_ERRORS: usize = 100;

/// The end of the help of `image`.
pub(super) const ENVIRONMENT: &str = "\
Each image can be a file, or the name of one in a store: s3://BUCKET/vm1/monday.

Environment:
  PAGEFERRY_CACHE       folder of the cache of images in stores; otherwise
                        $XDG_CACHE_HOME/pageferry, ~/.cache/pageferry, or
                        /var/cache/pageferry
  PAGEFERRY_CACHE_SIZE  how much the cache keeps, as 500M; otherwise 20G
  AWS_*, GOOGLE_*, AZURE_*
                        credentials and options of the stores

docs/store.md explains them.";

/// What is done with an image.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Show what an image has, and what it builds on.
    Info(ImageArgs),
    /// Check every byte of an image and of all images that it builds on. The exit status is 0 only
    /// if there is no error.
    #[command(
        after_help = "Examples:\n  pageferry image verify guest.img\n  pageferry image verify --all --json monday.img"
    )]
    Verify(VerifyArgs),
    /// Merge an increment and all images that it builds on into one full image. With a key it is
    /// sealed: so an image gets another key, or its first one.
    #[command(
        after_help = "The new image has the id of IMAGE. Images that build on IMAGE also build on the new one, if it takes its place.\n\n\
                            Examples:\n  pageferry image merge tuesday.img --into whole.img\n  \
                            pageferry image merge tuesday.img --into tuesday.img --replace && rm sunday.img monday.img\n  \
                            pageferry image merge tuesday.img --key old.key --new-key new.key --into tuesday.img --replace"
    )]
    Merge(MergeArgs),
    /// Draw a map of the guest's memory: content, zero, discarded, or as in the base.
    #[command(
        after_help = "Examples:\n  pageferry image map guest.img\n  pageferry image map --whole tuesday.img\n  \
                            pageferry image map guest.img --png guest.png"
    )]
    Map(map::MapArgs),
    /// Copy an image as it is: between files, stores, or both. No key is needed.
    #[command(after_help = "Examples:\n  pageferry image copy guest.img s3://images/guest\n  \
                            pageferry image copy s3://images/guest guest.img --replace")]
    Copy(stores::CopyArgs),
    /// List the images in a store.
    #[command(after_help = "Examples:\n  pageferry image list s3://images\n  \
                            pageferry image list file:///mnt/images/ci --json")]
    List(stores::ListArgs),
    /// Remove from a store what belongs to no image: what uploads have left that were interrupted,
    /// and what images had that were deleted or replaced. Images and running uploads stay.
    #[command(after_help = "Examples:\n  pageferry image prune s3://images --dry-run\n  \
                            pageferry image prune s3://images --older-than 72h")]
    Prune(stores::PruneArgs),
    /// Make an image of a raw file of guest memory: a memory file of Firecracker, memory-ranges of
    /// Cloud Hypervisor, the backing file of a QEMU. Holes and zero pages take no space in the
    /// image.
    #[command(after_help = raw::IMPORT_EXAMPLES)]
    Import(raw::ImportArgs),
    /// Write the guest of an image, with all that it builds on, to a raw file of memory. Pages
    /// without content become holes.
    #[command(after_help = raw::EXPORT_EXAMPLES)]
    Export(raw::ExportArgs),
}

/// Which image.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// The image: a file, or the name of an image in a store.
    #[arg(value_name = "IMAGE")]
    path: PathBuf,
    /// The key of a sealed image, and of all images that it builds on: a file with 32 bytes or 64
    /// hexadecimal digits, or descriptor N that this command inherits. With a key, an image that is
    /// not sealed is refused.
    #[arg(long, value_name = "FILE|fd:N", value_parser = KeySource::parse)]
    key: Option<KeySource>,
    /// Print JSON: one object.
    #[arg(long)]
    json: bool,
}

impl ImageArgs {
    /// Reads the key, if one is named.
    fn read_key(&self) -> Result<Option<ImageKey>, Box<dyn Error>> {
        read_key("--key", self.key.as_ref())
    }
}

/// Reads the key that the option `name` names.
fn read_key(name: &str, source: Option<&KeySource>) -> Result<Option<ImageKey>, Box<dyn Error>> {
    let Some(source) = source else { return Ok(None) };
    let key = source.read();
    Ok(Some(key.map_err(|error| format!("{name} {source}: {}", sentence(&error)))?))
}

/// A check.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Continue after the first error, and list up to 100.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    threads: ThreadArgs,
}

/// A merge.
#[derive(Debug, Args)]
pub struct MergeArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// The new image: a file, or a name in a store.
    #[arg(long, value_name = "NEW")]
    into: PathBuf,
    /// Seal the new image with this key, instead of that of --key. Without either it is in plain
    /// text, as the old one is.
    #[arg(long, value_name = "FILE|fd:N", value_parser = KeySource::parse)]
    new_key: Option<KeySource>,
    /// Replace an existing image when the new one is complete. It may belong to the chain. A file
    /// that is not an image is refused.
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    threads: ThreadArgs,
}

/// The number of threads.
#[derive(Debug, Args)]
pub struct ThreadArgs {
    /// Number of threads. The default is one for each processor.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=512))]
    threads: Option<u16>,
}

impl ThreadArgs {
    fn count(&self) -> usize {
        self.threads.map_or_else(crate::processors::count, usize::from)
    }
}

/// Runs the subcommand.
///
/// # Errors
/// If an image cannot be opened, read or written.
pub fn run(command: &ImageCommand) -> Outcome {
    match command {
        ImageCommand::Info(args) => info::run(args),
        ImageCommand::Verify(args) => run_verify(args),
        ImageCommand::Merge(args) => run_merge(args),
        ImageCommand::Map(args) => map::run(args),
        ImageCommand::Copy(args) => stores::run_copy(args),
        ImageCommand::List(args) => stores::run_list(args),
        ImageCommand::Prune(args) => stores::run_prune(args),
        ImageCommand::Import(args) => raw::run_import(args),
        ImageCommand::Export(args) => raw::run_export(args),
    }
}

fn run_verify(args: &VerifyArgs) -> Outcome {
    let path = absolute(&args.image.path)?;
    let key = args.image.read_key()?;
    // What the store has is checked, and not what the cache has kept of it.
    let _past = is_stored(&path).then(read_past_cache).transpose()?;
    let bar = bar("verifying");
    let report = verify_with(
        &path,
        key.as_ref(),
        args.threads.count(),
        if args.all { MOST_ERRORS } else { 1 },
        &|done, all| follow(&bar, done, all),
    );
    bar.finish_and_clear();
    let errors: Vec<String> = report.errors.iter().map(|error| sentence(error)).collect();
    let cut = report.error_limit_reached && args.all;
    for error in &errors {
        writeln!(io::stderr(), "pageferry: {error}")?;
    }
    if args.image.json {
        let images = report.images.iter().map(
            |image| json!({ "path": text_of(image.path()), "id": id_text(&image.header().id) }),
        );
        let object = json!({
            "status": status(&report.errors),
            "images": images.collect::<Vec<_>>(),
            "pages": report.pages,
            "errors": errors,
            "more_errors": cut,
        });
        writeln!(io::stdout(), "{object}")?;
    } else {
        if cut {
            writeln!(
                io::stderr(),
                "pageferry: there may be more: at most {MOST_ERRORS} errors are listed"
            )?;
        }
        if errors.is_empty() {
            let (pages, bytes) = (report.pages, show::bytes(report.pages * PAGE_SIZE));
            writeln!(
                io::stdout(),
                "no errors: {}, {pages} pages with content ({bytes})",
                counted(report.images.len(), "image")
            )?;
        }
    }
    Ok(if errors.is_empty() { Exit::Done } else { Exit::Failed })
}

/// The status in the JSON object. "unreadable" differs from "damaged": a program that deletes
/// damaged images must not delete an image that could only not be read.
fn status(errors: &[ImageError]) -> &'static str {
    match errors {
        [] => "good",
        errors if errors.iter().all(|error| error.fault.is_unreadable()) => "unreadable",
        _ => "damaged",
    }
}

fn run_merge(args: &MergeArgs) -> Outcome {
    let (path, into) = (absolute(&args.image.path)?, absolute(&args.into)?);
    let (old, new) = (args.image.read_key()?, read_key("--new-key", args.new_key.as_ref())?);
    let keys = MergeKeys { old: old.as_ref(), new: new.as_ref() };
    let bar = bar("merging");
    let merged =
        merge_with(&path, keys, &into, args.replace, args.threads.count(), &|done, all| {
            follow(&bar, done, all)
        });
    bar.finish_and_clear();
    let merged = merged?;
    let (id, totals) = (id_text(&merged.id), merged.totals);
    if args.image.json {
        let object = json!({
            "status": "merged",
            "path": text_of(&into),
            "id": id,
            "sealed": keys.new.or(keys.old).is_some(),
            "images": merged.images,
            "present_pages": totals.present,
            "zero_pages": totals.zero,
            "discarded_pages": totals.discarded,
            "bytes": totals.bytes,
        });
        writeln!(io::stdout(), "{object}")?;
    } else {
        let bytes = show::bytes(totals.bytes);
        writeln!(
            io::stdout(),
            "merged {} into {}: {bytes}, id {id}",
            counted(merged.images, "image"),
            into.display()
        )?;
    }
    Ok(Exit::Done)
}

/// A count with its noun, such as "1 image" or "3 images".
fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

fn text_of(path: &Path) -> String {
    path.display().to_string()
}

/// A progress bar on standard error. Without a terminal it is hidden.
fn bar(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    // The template is a constant. If it were wrong, the bar would have the default style.
    if let Ok(style) = ProgressStyle::with_template("{prefix:12} {bar:30} {percent:>3}% {msg}") {
        bar.set_style(style);
    }
    bar.set_prefix(what);
    bar
}

/// Shows progress. The threads may report out of order, so the bar can jump back for a moment; the
/// next report corrects it.
fn follow(bar: &ProgressBar, done: u64, all: u64) {
    bar.set_length(all.max(1));
    bar.set_position(done);
}
