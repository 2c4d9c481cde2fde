// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is mapped in this process, as `/proc/self/maps` says.

use crate::block::BlockSpec;
use crate::error::Error;
use rustix::fs::{fstat, major, minor};

/// Checks that the memory of a clone is a private mapping of the block in the base, which can be
/// read and written.
///
/// # Errors
/// What is mapped there instead.
pub(crate) fn check_private_mapping(spec: &BlockSpec<'_>) -> Result<(), Error> {
    let maps = std::fs::read_to_string("/proc/self/maps");
    let maps = maps.map_err(Error::io("read /proc/self/maps"))?;
    let stat = fstat(spec.memory).map_err(Error::kernel("look at the base of a clone"))?;
    let base = (major(stat.st_dev), minor(stat.st_dev), stat.st_ino);
    check(&maps, (spec.vmm_address, spec.length), spec.fd_offset, base)
        .map_err(|why| Error::NoPrivateMapping { id: spec.id, why })
}

/// A line of the file.
struct Line<'a> {
    start: u64,
    end: u64,
    access: &'a str,
    offset: u64,
    /// Major and minor number of the device, and the inode.
    file: (u32, u32, u64),
}

fn parse(line: &str) -> Option<Line<'_>> {
    let mut words = line.split_ascii_whitespace();
    let (range, access) = (words.next()?, words.next()?);
    let offset = u64::from_str_radix(words.next()?, 16).ok()?;
    let (device, inode) = (words.next()?, words.next()?.parse().ok()?);
    let (start, end) = range.split_once('-')?;
    let (major, minor) = device.split_once(':')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let of_device = |text| u32::from_str_radix(text, 16).ok();
    let (start, end) = (number(start)?, number(end)?);
    Some(Line { start, end, access, offset, file: (of_device(major)?, of_device(minor)?, inode) })
}

fn check(
    maps: &str, (address, length): (u64, u64), offset: u64, base: (u32, u32, u64),
) -> Result<(), String> {
    let end = address.saturating_add(length);
    let mut next = address;
    for line in maps.lines().filter_map(parse) {
        if line.end <= next || line.start >= end {
            continue;
        }
        if line.start > next {
            break;
        }
        if !(line.access.starts_with("rw") && line.access.ends_with('p')) {
            return Err(format!("the mapping at {next:#x} is {}, expected is rw-p", line.access));
        }
        let found = line.offset.wrapping_add(next - line.start);
        let expected = offset.wrapping_add(next - address);
        if line.file != base || found != expected {
            return Err(format!("at {next:#x} is not byte {expected:#x} of the base"));
        }
        next = line.end;
    }
    if next < end { Err(format!("nothing is mapped at {next:#x}")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
        1000-3000 rw-p 00005000 00:1c 77                         /dev/shm/base\n\
        3000-4000 rw-p 00007000 00:1c 77                         /dev/shm/base\n\
        4000-5000 rw-s 00008000 00:1c 77                         /dev/shm/base\n\
        5000-6000 r--p 00009000 00:1c 77                         /dev/shm/base\n\
        7000-8000 rw-p 00000000 00:00 0 \n";
    const BASE: (u32, u32, u64) = (0, 0x1c, 77);

    fn found(place: (u64, u64), offset: u64, base: (u32, u32, u64)) -> String {
        check(MAPS, place, offset, base).err().unwrap_or_default()
    }

    #[test]
    fn only_a_private_mapping_of_the_right_part_is_taken() {
        assert_eq!(found((0x1000, 0x3000), 0x5000, BASE), "");
        assert_eq!(found((0x2000, 0x1000), 0x6000, BASE), "");
        assert_eq!(
            found((0x2000, 0x1000), 0x5000, BASE),
            "at 0x2000 is not byte 0x5000 of the base"
        );
        assert_eq!(
            found((0x1000, 0x1000), 0x5000, (0, 0x1c, 78)),
            "at 0x1000 is not byte 0x5000 of the base"
        );
        assert_eq!(
            found((0x3000, 0x2000), 0x7000, BASE),
            "the mapping at 0x4000 is rw-s, expected is rw-p"
        );
        assert_eq!(
            found((0x5000, 0x1000), 0x9000, BASE),
            "the mapping at 0x5000 is r--p, expected is rw-p"
        );
        assert_eq!(found((0x5000, 0x2000), 0x9000, BASE), found((0x5000, 0x1000), 0x9000, BASE));
        assert_eq!(found((0x6000, 0x1000), 0, BASE), "nothing is mapped at 0x6000");
        assert_eq!(found((0x7000, 0x1000), 0, BASE), "at 0x7000 is not byte 0x0 of the base");
        assert_eq!(found((u64::MAX - 1, 2), 0, BASE), "nothing is mapped at 0xfffffffffffffffe");
    }
}
