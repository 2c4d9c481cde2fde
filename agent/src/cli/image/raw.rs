// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry image import` and `export`: raw files of guest memory become images, and the other
//! way round.
//!
//! Which guest memory is at which offset comes from one of the options of [`LayoutArgs`]. An import
//! needs one of them, or an image that has the same blocks (`--like`). Without one, an export
//! writes the blocks one after another.

use super::layout_args::{LayoutArgs, named};
use super::{ImageArgs, Outcome, ThreadArgs, absolute, bar, counted, follow, read_key, text_of};
use crate::cli::exit::Exit;
use crate::cli::parse::parse_block_size;
use crate::cli::show;
use crate::image::raw::{LayoutError, Output, Piece, RawFile, RawLayout, export, import};
use crate::image::seal::KeySource;
use crate::image::{Chain, Image, ImageKey};
use clap::{ArgGroup, Args};
use pageferry_protocol::image::id_text;
use pageferry_protocol::memory::PAGE_SIZE;
use serde_json::json;
use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;

/// The end of the help of `import`.
pub(super) const IMPORT_EXAMPLES: &str = "\
Layouts:
  firecracker          Firecracker 1.13 and later on x86-64: gaps at 3 GiB and at 256 GiB
  firecracker-1.12     Firecracker up to 1.12 on x86-64: a gap at 3.25 GiB
  firecracker-aarch64  Firecracker on aarch64: memory from 2 GiB on
  raw                  one block at guest address 0

Examples:
  pageferry image import --layout firecracker --state vmstate=vm.state vm.mem vm.img
  pageferry image import --cloud-hypervisor snap/state.json snap/memory-ranges vm.img
  pageferry image import --block ram0=0+3G --block ram1=4G+1G /dev/shm/qemu.ram vm.img
  pageferry image import --like monday.img /dev/shm/qemu.ram tuesday.img";

/// The end of the help of `export`.
pub(super) const EXPORT_EXAMPLES: &str = "\
Without a layout, the blocks are one after another in the order of their addresses, as in a memory \
file of Firecracker. With --block, blocks that are not named are left out.

Examples:
  pageferry image export tuesday.img vm.mem --state vmstate=vm.state
  pageferry image export vm.img high.ram --block ram1=4G+1G";

/// An import.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("memory layout")
    .args(["layout", "blocks", "cloud_hypervisor", "like"]).required(true)))]
pub struct ImportArgs {
    /// The raw file, not a name in a store. Nothing may write to it meanwhile: pause or end the
    /// VMM.
    #[arg(value_name = "MEMORY_FILE")]
    memory: PathBuf,
    /// The new image: a file, or a name in a store.
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    #[command(flatten)]
    layout: LayoutArgs,
    /// The blocks of this image, which may be in a store, one after another in the order of their
    /// addresses.
    #[arg(long, value_name = "IMAGE")]
    like: Option<PathBuf>,
    /// The unit of the guest's discards, which an image notes for each block.
    #[arg(long, value_name = "SIZE", default_value = "4K", value_parser = parse_block_size,
          conflicts_with = "like")]
    granularity: u64,
    /// Put this file into the image as a piece of the VMM's state. Repeat it for several pieces.
    #[arg(long = "state", value_name = "NAME=FILE", value_parser = parse_piece)]
    pieces: Vec<Piece>,
    /// Seal the image with this key: a file with 32 bytes or 64 hexadecimal digits, or descriptor N
    /// that this command inherits.
    #[arg(long, value_name = "FILE|fd:N", value_parser = KeySource::parse)]
    key: Option<KeySource>,
    /// Replace an existing image when the new one is complete. A file that is not an image is
    /// refused.
    #[arg(long)]
    replace: bool,
    /// Print JSON: one object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: ThreadArgs,
}

/// An export.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("memory layout").args(["layout", "blocks", "cloud_hypervisor"])))]
pub struct ExportArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// The new raw file, not a name in a store.
    #[arg(value_name = "MEMORY_FILE")]
    memory: PathBuf,
    #[command(flatten)]
    layout: LayoutArgs,
    /// Write this piece of the VMM's state to a file. Repeat it for several pieces.
    #[arg(long = "state", value_name = "NAME=FILE", value_parser = parse_piece)]
    pieces: Vec<Piece>,
    /// Replace existing files when the new ones are complete. The memory file replaces only a file
    /// of the same length. Images are never replaced.
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    threads: ThreadArgs,
}

/// Imports a raw file.
///
/// # Errors
/// If a file cannot be read, does not have the layout, or the image cannot be written.
pub(super) fn run_import(args: &ImportArgs) -> Outcome {
    let (memory, path) = (absolute(&args.memory)?, absolute(&args.image)?);
    let key = read_key("--key", args.key.as_ref())?;
    let memory = RawFile::open(&memory)?;
    let layout = import_layout(args, memory.length(), key.as_ref());
    let layout = layout.map_err(|error| named(error, memory.path()))?;
    let pieces = absolute_pieces(&args.pieces)?;
    let bar = bar("importing");
    let show = |done, all| follow(&bar, done, all);
    let threads = args.threads.count();
    let output = Output { path: &path, replace: args.replace, threads, show: &show };
    let imported = import(&memory, &layout, &pieces, key.as_ref(), output);
    bar.finish_and_clear();
    let imported = imported?;
    let (id, totals) = (id_text(&imported.id), imported.totals);
    let blocks = layout.table().blocks().len();
    if args.json {
        let object = json!({
            "status": "imported",
            "path": text_of(&path),
            "id": id,
            "sealed": key.is_some(),
            "blocks": blocks,
            "present_pages": totals.present,
            "zero_pages": totals.zero,
            "bytes": totals.bytes,
        });
        writeln!(io::stdout(), "{object}")?;
    } else {
        let (bytes, blocks) = (show::bytes(totals.bytes), counted(blocks, "block"));
        let path = path.display();
        writeln!(io::stdout(), "imported {blocks} into {path}: {bytes}, id {id}")?;
    }
    Ok(Exit::Done)
}

/// The layout of an import.
fn import_layout(
    args: &ImportArgs, length: u64, key: Option<&ImageKey>,
) -> Result<RawLayout, Box<dyn Error>> {
    if let Some(like) = &args.like {
        let like = absolute(like)?;
        // Only its blocks are used, so it may be in plain text also if the new image is sealed.
        let key =
            key.filter(|_| Image::peek(&like).is_ok_and(|(header, _)| header.sealing.is_some()));
        let image = Image::open_contents(&like, key)?;
        return Ok(RawLayout::dense(&image.contents().table)?);
    }
    // The command line has one of the options.
    args.layout.read(length, args.granularity)?.ok_or_else(|| LayoutError::Empty.into())
}

/// Exports an image.
///
/// # Errors
/// If the image cannot be read, does not have the layout, or a file cannot be written.
pub(super) fn run_export(args: &ExportArgs) -> Outcome {
    let (path, memory) = (absolute(&args.image.path)?, absolute(&args.memory)?);
    let key = args.image.read_key()?;
    let chain = Chain::open_with(&path, key.as_ref())?;
    let length = chain.table().blocks().iter().map(|block| block.length).sum();
    // Only an image notes the granularity, so any will do.
    let layout = match args.layout.read(length, PAGE_SIZE) {
        Ok(Some(layout)) => layout,
        Ok(None) => RawLayout::dense(chain.table())?,
        Err(error) => return Err(named(error, &memory)),
    };
    let pieces = absolute_pieces(&args.pieces)?;
    let bar = bar("exporting");
    let show = |done, all| follow(&bar, done, all);
    let threads = args.threads.count();
    let output = Output { path: &memory, replace: args.replace, threads, show: &show };
    let exported = export(&chain, &layout, args.layout.is_partial(), &pieces, output);
    bar.finish_and_clear();
    let exported = exported?;
    let images = chain.layers().len();
    if args.image.json {
        let object = json!({
            "status": "exported",
            "path": text_of(&memory),
            "id": id_text(&chain.newest().header().id),
            "images": images,
            "present_pages": exported.present,
            "bytes": exported.length,
        });
        writeln!(io::stdout(), "{object}")?;
    } else {
        let content = show::bytes(exported.present * PAGE_SIZE);
        writeln!(
            io::stdout(),
            "exported {} to {}: {}, content {content}",
            counted(images, "image"),
            memory.display(),
            show::bytes(exported.length)
        )?;
    }
    Ok(Exit::Done)
}

/// The pieces, with absolute paths.
fn absolute_pieces(pieces: &[Piece]) -> Result<Vec<Piece>, Box<dyn Error>> {
    let piece =
        |Piece { name, path }: &Piece| Ok(Piece { name: name.clone(), path: absolute(path)? });
    pieces.iter().map(piece).collect()
}

/// Reads a piece of the VMM's state.
fn parse_piece(text: &str) -> Result<Piece, String> {
    match text.split_once('=') {
        Some((name, path)) if !path.is_empty() => {
            Ok(Piece { name: name.to_owned(), path: path.into() })
        }
        _ => Err(format!("\"{text}\": write NAME=FILE, as vmstate=vm.state")),
    }
}
