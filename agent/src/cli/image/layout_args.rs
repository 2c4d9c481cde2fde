// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The options that say which guest memory is at which offset of a raw file.

use crate::cli::parse::parse_size;
use crate::error::chain as sentence;
use crate::image::raw::cloud_hypervisor::{MAX_STATE_JSON, layout_of};
use crate::image::raw::named::NamedLayout;
use crate::image::raw::{LayoutError, RawBlock, RawFault, RawLayout};
use crate::opener;
use clap::Args;
use pageferry_protocol::memory::BlockGeometry;
use std::error::Error;
use std::path::{Path, PathBuf};

/// Where guest memory is in the raw file.
#[derive(Debug, Args)]
pub struct LayoutArgs {
    /// A layout that follows from the length of the file.
    #[arg(long, value_name = "NAME", value_parser = parse_layout)]
    layout: Option<NamedLayout>,
    /// A block: its name, guest address and length, and its offset in the file. Repeat it for
    /// several blocks. Without an offset, a block follows the one before. Without an id, blocks are
    /// numbered from 0 on.
    #[arg(long = "block", value_name = "[ID:]NAME=GPA+LENGTH[@OFFSET]", value_parser = parse_block)]
    blocks: Vec<BlockOption>,
    /// Cloud Hypervisor's state.json, for the memory-ranges beside it. Each memory slot becomes a
    /// block.
    #[arg(long, value_name = "STATE_JSON")]
    cloud_hypervisor: Option<PathBuf>,
}

/// A block as an option names it.
#[derive(Debug, Clone)]
struct BlockOption {
    id: Option<u32>,
    name: String,
    gpa: u64,
    length: u64,
    offset: Option<u64>,
}

impl LayoutArgs {
    /// The layout of a file of `length` bytes; `None` if no option names one.
    pub(super) fn read(
        &self, length: u64, granularity: u64,
    ) -> Result<Option<RawLayout>, Box<dyn Error>> {
        if let Some(layout) = self.layout {
            return Ok(Some(layout.layout(length, granularity)?));
        }
        if let Some(path) = &self.cloud_hypervisor {
            let failed = |error: &dyn Error| {
                format!("--cloud-hypervisor {}: {}", path.display(), sentence(error))
            };
            let bytes = opener::read(path, MAX_STATE_JSON).map_err(|error| failed(&error))?;
            return Ok(Some(layout_of(&bytes, granularity).map_err(|error| failed(&error))?));
        }
        if self.blocks.is_empty() {
            return Ok(None);
        }
        Ok(Some(self.of_blocks(granularity)?))
    }

    /// True if the blocks that no option names are to be left out.
    pub(super) fn is_partial(&self) -> bool {
        !self.blocks.is_empty()
    }

    /// The layout of the blocks that the options name.
    fn of_blocks(&self, granularity: u64) -> Result<RawLayout, LayoutError> {
        let mut end = 0u64;
        let block = |(number, option): (u32, &BlockOption)| {
            let BlockOption { gpa, length, ref name, .. } = *option;
            let (id, offset) = (option.id.unwrap_or(number), option.offset.unwrap_or(end));
            // The layout refuses a block that ends after the largest offset.
            end = offset.saturating_add(length);
            let block = BlockGeometry { id, name: name.clone(), gpa, length, granularity };
            RawBlock { block, offset }
        };
        RawLayout::new((0..).zip(&self.blocks).map(block))
    }
}

/// Names the raw file in an error of its layout. Other errors name their files.
pub(super) fn named(error: Box<dyn Error>, memory: &Path) -> Box<dyn Error> {
    match error.downcast::<LayoutError>() {
        Ok(error) => RawFault::from(*error).of(memory).into(),
        Err(other) => other,
    }
}

/// Reads the name of a layout.
fn parse_layout(text: &str) -> Result<NamedLayout, String> {
    let found = NamedLayout::NAMES.iter().find(|(name, _)| *name == text);
    let names = NamedLayout::NAMES.map(|(name, _)| name).join(", ");
    found.map(|(_, layout)| *layout).ok_or_else(|| format!("\"{text}\": write one of {names}"))
}

/// Reads a block.
fn parse_block(text: &str) -> Result<BlockOption, String> {
    let wrong = || {
        format!("\"{text}\": write [ID:]NAME=GPA+LENGTH[@OFFSET], as ram0=0+3G or 1:ram1=4G+1G@3G")
    };
    let (name, place) = text.rsplit_once('=').ok_or_else(wrong)?;
    let (id, name) = match name.split_once(':').map(|(id, name)| (id.parse(), name)) {
        Some((Ok(id), name)) => (Some(id), name),
        // A name may have a colon.
        _ => (None, name),
    };
    let (place, offset) = match place.split_once('@') {
        Some((place, offset)) => (place, Some(parse_size(offset)?)),
        None => (place, None),
    };
    let (gpa, length) = place.split_once('+').ok_or_else(wrong)?;
    let (gpa, length) = (parse_size(gpa)?, parse_size(length)?);
    Ok(BlockOption { id, name: name.to_owned(), gpa, length, offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_read_or_refused_with_the_form() {
        let BlockOption { id, name, gpa, length, offset } =
            parse_block("7:/objects/a=b=0x100000000+1G@3G").unwrap();
        assert_eq!((id, &name[..], offset), (Some(7), "/objects/a=b", Some(3 << 30)));
        assert_eq!((gpa, length), (4 << 30, 1 << 30));
        let block = parse_block("pci:0=0+4K").unwrap();
        assert_eq!((block.id, &block.name[..], block.offset), (None, "pci:0", None));
        for wrong in ["", "ram", "ram=0", "ram=0+", "ram=+1G", "ram=0+1G@", "ram=0+x"] {
            let error = parse_block(wrong).unwrap_err();
            assert!(error.contains("write "), "{wrong}: {error}");
        }
        assert!(parse_layout("qemu").unwrap_err().contains("firecracker, "));
    }
}
