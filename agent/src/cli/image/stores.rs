// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry image copy`, `list` and `prune`: images in object stores.

use super::{Outcome, absolute, bar, follow, text_of};
use crate::cli::exit::Exit;
use crate::cli::parse::{parse_duration, parse_store};
use crate::cli::show;
use crate::image::copy::copy;
use crate::store::maintain::{self, ListedImage};
use clap::Args;
use pageferry_protocol::image::id_text;
use serde_json::{Value, json};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

/// A copy.
#[derive(Debug, Args)]
pub struct CopyArgs {
    /// The image: a file, or the name of an image in a store.
    #[arg(value_name = "IMAGE")]
    path: PathBuf,
    /// The copy: a file, or a name in a store.
    #[arg(value_name = "COPY")]
    into: PathBuf,
    /// Replace an existing image when the new one is complete. What is not an image is refused.
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    threads: super::ThreadArgs,
    /// Print JSON: one object.
    #[arg(long)]
    json: bool,
}

/// A list.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The store, a folder in it, or an image.
    #[arg(value_name = "STORE", value_parser = parse_store)]
    store: String,
    /// Print JSON: one object.
    #[arg(long)]
    json: bool,
}

/// What to remove.
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// The store, or a folder in it.
    #[arg(value_name = "STORE", value_parser = parse_store)]
    store: String,
    /// Keep what is younger. A guest may still get its memory from an image that was replaced.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_duration)]
    older_than: Duration,
    /// Only say what would be removed.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON: one object.
    #[arg(long)]
    json: bool,
}

/// Copies an image.
///
/// # Errors
/// If it cannot be read, or the copy cannot be written.
pub fn run_copy(args: &CopyArgs) -> Outcome {
    let (path, into) = (absolute(&args.path)?, absolute(&args.into)?);
    let bar = bar("copying");
    let copied = copy(&path, &into, args.replace, args.threads.count(), &|done, all| {
        follow(&bar, done, all)
    });
    bar.finish_and_clear();
    let header = copied?;
    let (id, bytes) = (id_text(&header.id), header.file_length);
    if args.json {
        let base = header.is_increment().then(|| id_text(&header.base));
        let object = json!({
            "status": "copied",
            "path": text_of(&into),
            "id": id,
            "base": base,
            "file_length": bytes,
        });
        writeln!(io::stdout(), "{object}")?;
        return Ok(Exit::Done);
    }
    writeln!(io::stdout(), "copied to {}: id {id}", into.display())?;
    if header.is_increment() {
        writeln!(
            io::stderr(),
            "pageferry: it builds on image {}, which the copy needs, too",
            id_text(&header.base)
        )?;
    }
    Ok(Exit::Done)
}

/// Lists the images of a store.
///
/// # Errors
/// If the store does not answer.
pub fn run_list(args: &ListArgs) -> Outcome {
    let images = maintain::list(&args.store)?;
    let is_broken = images.iter().any(|image| image.index.is_err());
    if args.json {
        let images: Vec<Value> = images.iter().map(to_json).collect();
        writeln!(io::stdout(), "{}", json!({ "images": images }))?;
    } else {
        for image in &images {
            match &image.index {
                Ok(index) => writeln!(
                    io::stdout(),
                    "{}  {}  {} in the store, of {}",
                    image.name,
                    index.id,
                    show::bytes(index.stored),
                    show::bytes(index.length)
                )?,
                Err(error) => writeln!(io::stderr(), "pageferry: {error}")?,
            }
        }
        if images.is_empty() {
            writeln!(io::stderr(), "pageferry: no image in {}", args.store)?;
        }
    }
    Ok(if is_broken { Exit::Failed } else { Exit::Done })
}

fn to_json(image: &ListedImage) -> Value {
    match &image.index {
        Ok(index) => json!({
            "name": image.name,
            "put": image.put,
            "id": index.id,
            "file_length": index.length,
            "content_bytes": index.content,
            "stored_bytes": index.stored,
        }),
        Err(error) => json!({ "name": image.name, "put": image.put, "error": error.to_string() }),
    }
}

/// Removes what belongs to no image.
///
/// # Errors
/// If the store does not answer.
pub fn run_prune(args: &PruneArgs) -> Outcome {
    let pruned = maintain::prune(&args.store, args.older_than, args.dry_run)?;
    if args.json {
        let object = json!({
            "status": if args.dry_run { "found" } else { "removed" },
            "uploads": pruned.folders,
            "objects": pruned.objects,
            "bytes": pruned.bytes,
            "running_uploads": pruned.running,
            "young_uploads": pruned.young,
        });
        writeln!(io::stdout(), "{object}")?;
        return Ok(Exit::Done);
    }
    for folder in &pruned.folders {
        writeln!(io::stdout(), "{folder}")?;
    }
    let verb = if args.dry_run { "would remove" } else { "removed" };
    let (objects, bytes) = (pruned.objects, show::bytes(pruned.bytes));
    writeln!(io::stderr(), "pageferry: {verb} {objects} objects, {bytes}")?;
    if pruned.running + pruned.young > 0 {
        let (running, young) = (pruned.running, pruned.young);
        writeln!(
            io::stderr(),
            "pageferry: left alone: {running} uploads that run, {young} that are too young"
        )?;
    }
    Ok(Exit::Done)
}
