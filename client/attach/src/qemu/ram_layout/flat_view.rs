// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! HMP `info mtree -f`: what is at which guest physical address.
//!
//! ```text
//! FlatView #0
//!  AS "memory", root: system
//!  Root memory region: system
//!   0000000000100000-00000000bfffffff (prio 0, ram): pageferry-ram @0000000000100000
//! ```
//!
//! The order of the views changes from call to call. The one of address space "memory" is what the
//! processors see outside of system management mode. Under KVM a line may end in ` KVM`.

use super::Error;

/// A range of the flat view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatRange {
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes, at least one. A range of the whole address space is cut by one byte.
    pub length: u64,
    /// Whether RAM or ROM is there; otherwise a device is.
    pub is_memory: bool,
    /// Name of the memory region.
    pub region: String,
    /// Offset of the range in the region.
    pub offset: u64,
}

/// Parses the output of `info mtree -f`, and gives the view of address space "memory".
///
/// # Errors
///
/// Fails if that view is missing, or at the first of its lines that is not understood.
pub fn parse(text: &str) -> Result<Vec<FlatRange>, Error> {
    let mut is_memory_view = false;
    let mut ranges = Vec::new();
    for line in text.lines() {
        if line.starts_with("FlatView #") {
            if is_memory_view {
                break;
            }
        } else if line.starts_with(" AS \"memory\",") {
            is_memory_view = true;
        } else if is_memory_view && line.trim() == "No rendered FlatView" {
            return Err(Error::NoFlatView);
        } else if is_memory_view && line.starts_with("  ") {
            ranges.push(range(line.trim()).ok_or_else(|| Error::Line {
                command: "info mtree -f",
                line: line.to_owned(),
                expected: "FIRST-LAST (prio N, TYPE): REGION @OFFSET",
            })?);
        } else if !(line.is_empty() || line.starts_with(' ')) && is_memory_view {
            break;
        }
    }
    if ranges.is_empty() {
        return Err(Error::NoFlatView);
    }
    Ok(ranges)
}

fn range(line: &str) -> Option<FlatRange> {
    let (addresses, rest) = line.split_once(" (prio ")?;
    let (first, last) = addresses.split_once('-')?;
    let (gpa, last) = (hexadecimal(first)?, hexadecimal(last)?);
    let (priority, rest) = rest.split_once(", ")?;
    priority.parse::<i32>().ok()?;
    let (kind, rest) = rest.split_once("): ")?;
    let is_memory = match kind.strip_prefix("nv-").unwrap_or(kind) {
        "ram" | "rom" | "ramd" | "romd" => true,
        "i/o" | "container" => false,
        _ => return None,
    };
    let rest = rest.strip_suffix(" KVM").unwrap_or(rest);
    let at_offset =
        rest.rsplit_once(" @").and_then(|(region, offset)| Some((region, hexadecimal(offset)?)));
    let (region, offset) = at_offset.unwrap_or((rest, 0));
    Some(FlatRange {
        gpa,
        length: last.checked_sub(gpa)?.saturating_add(1),
        is_memory,
        region: region.to_owned(),
        offset,
    })
}

/// Parses the digits of an address, which QEMU writes with leading zeros and without prefix.
fn hexadecimal(digits: &str) -> Option<u64> {
    let is_address = digits.len() == 16 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_address.then(|| u64::from_str_radix(digits, 16).ok())?
}
