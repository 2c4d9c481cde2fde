// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! HMP `info ramblock`: QEMU's RAM blocks and where they are in its process.
//!
//! ```text
//!     Block Name    PSize              Offset  ...  Used and Total  ...                HVA  RO
//!  pageferry-ram    4 KiB  0x0000000000000000  ...  0x0000000020000000  0x00007f372bfff000  rw
//! ```

use super::Error;

/// A RAM block of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// Name by which migration knows it. It is empty if no device uses the block.
    pub name: String,
    /// Size in bytes of the pages of its file.
    pub page_size: u64,
    /// Offset in QEMU's own numbering of RAM.
    pub ram_offset: u64,
    /// Bytes in use.
    pub used_length: u64,
    /// Bytes that it can grow to; those that it has for guest memory.
    pub max_length: u64,
    /// Address in QEMU's process.
    pub hva: u64,
    /// Whether QEMU maps it read-only.
    pub read_only: bool,
}

/// Parses the output of `info ramblock`.
///
/// # Errors
///
/// Fails at the first line that is neither the header nor a RAM block.
pub fn parse(text: &str) -> Result<Vec<RamBlock>, Error> {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let header = lines.next().unwrap_or_default();
    let expects = |line: &str, expected| Error::Line {
        command: "info ramblock",
        line: line.to_owned(),
        expected,
    };
    if !(header.trim_start().starts_with("Block Name") && header.contains("HVA")) {
        return Err(expects(header, "a header from \"Block Name\" to \"HVA\""));
    }
    lines
        .map(|line| {
            block(line).ok_or_else(|| {
                expects(line, "name, page size, offset, used and total bytes, HVA, rw or ro")
            })
        })
        .collect()
}

/// Reads a line from its end, since a name may contain anything.
fn block(line: &str) -> Option<RamBlock> {
    let (rest, last) = take_last(line)?;
    // Older releases have no column RO.
    let (rest, read_only) = match last {
        "rw" => (rest, false),
        "ro" => (rest, true),
        _ => (line, false),
    };
    let (rest, hva) = take_last(rest)?;
    let (rest, total) = take_last(rest)?;
    let (rest, used) = take_last(rest)?;
    let (rest, offset) = take_last(rest)?;
    let (rest, unit) = take_last(rest)?;
    let (name, pages) = take_last(rest)?;
    let shift = match unit {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    let page_size = pages.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    Some(RamBlock {
        name: name.trim().to_owned(),
        page_size: page_size.is_power_of_two().then_some(page_size)?,
        ram_offset: hexadecimal(offset)?,
        used_length: hexadecimal(used)?,
        max_length: hexadecimal(total)?,
        hva: hexadecimal(hva)?,
        read_only,
    })
}

/// Splits the last word off.
fn take_last(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_end();
    let start = text.rfind(char::is_whitespace).map_or(0, |at| at + 1);
    // All white space that QEMU writes is ASCII; other white space ends a line that is refused.
    let word = text.get(start..)?;
    (!word.is_empty()).then(|| (&text[..start], word))
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}
