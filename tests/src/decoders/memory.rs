// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ranges and blocks: the rules for a peer's numbers, compared with models that use wider numbers.

use super::heap::{fair, within};
use pageferry_protocol::control::{Decoder, Encoder};
use pageferry_protocol::memory::geometry::{MAX_BLOCK_LENGTH, MAX_NAME};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE, PageRange};

/// Limit of blocks in a table. It is small, so that the limit is reached.
const LIMIT: usize = 8;
/// The numbers of a step are small, so that blocks overlap.
const SMALL: u8 = 1 << 0;
/// The step removes a block.
const REMOVE: u8 = 1 << 1;

/// A table accepts a block exactly if the model does, and is unchanged otherwise.
pub fn geometry(data: &[u8]) -> bool {
    let (mut steps, mut table, mut model) =
        (Decoder::new(data), BlockTable::new(), Vec::<BlockGeometry>::new());
    while let Some((flags, block)) = step(&mut steps) {
        let id = block.id;
        if flags & REMOVE != 0 {
            let expected = model.iter().position(|other| other.id == id).map(|at| model.remove(at));
            assert_eq!(table.remove(id), expected);
            continue;
        }
        let fits = alone(&block)
            && model.len() < LIMIT
            && model.iter().all(|other| get_along(&block, other));
        match within(fair(data), || table.insert(block.clone(), LIMIT)) {
            Ok(()) => {
                assert!(fits, "{block:x?} was taken beside {model:x?}");
                model.push(block);
            }
            Err(error) => {
                assert!(!fits && error.to_string().contains(&id.to_string()), "{block:x?}: {error}")
            }
        }
        model.sort_by_key(|block| block.gpa);
        assert_eq!(table.blocks(), model);
        assert_eq!(table.get(id), model.iter().find(|block| block.id == id));
    }
    !model.is_empty()
}

fn step(steps: &mut Decoder<'_>) -> Option<(u8, BlockGeometry)> {
    let flags = steps.u8("flags").ok()?;
    let id = u32::from(steps.u8("id").ok()? % 16);
    let name = "n".repeat(usize::from(steps.u16("name").ok()? % 300));
    let [mut gpa, mut length, mut granularity] = [0; 3].map(|_| steps.u64("number").unwrap_or(0));
    if flags & SMALL != 0 {
        (gpa, length) = (gpa % 64 * PAGE_SIZE, length % 16 * PAGE_SIZE);
        granularity = PAGE_SIZE << (granularity % 10);
    }
    Some((flags, BlockGeometry { id, name, gpa, length, granularity }))
}

fn alone(block: &BlockGeometry) -> bool {
    let end = u128::from(block.gpa) + u128::from(block.length);
    block.gpa.is_multiple_of(PAGE_SIZE)
        && block.length.is_multiple_of(PAGE_SIZE)
        && (1..=MAX_BLOCK_LENGTH).contains(&block.length)
        && end <= u128::from(u64::MAX)
        && block.granularity.count_ones() == 1
        && block.granularity >= PAGE_SIZE
        && (1..=MAX_NAME).contains(&block.name.len())
}

fn get_along(one: &BlockGeometry, other: &BlockGeometry) -> bool {
    let end = |block: &BlockGeometry| u128::from(block.gpa) + u128::from(block.length);
    let apart = end(one) <= u128::from(other.gpa) || end(other) <= u128::from(one.gpa);
    apart && one.id != other.id && one.name != other.name
}

/// Adjacent blocks, one that overlaps, and one that is removed.
pub fn geometry_seeds() -> Vec<Vec<u8>> {
    let step = |flags: u8, id: u8, name: u16, gpa: u64, length: u64| {
        Encoder::new().u8(flags).u8(id).u16(name).u64(gpa).u64(length).u64(PAGE_SIZE).finish()
    };
    let pair = [step(0, 1, 3, 0, 8 * PAGE_SIZE), step(0, 2, 4, 8 * PAGE_SIZE, 1 << 50)].concat();
    let busy = [
        step(SMALL, 1, 1, 0, 9),
        step(SMALL, 2, 2, 8, 9),
        step(SMALL | REMOVE, 1, 0, 0, 0),
        step(0, 1, 1, 0, PAGE_SIZE),
    ];
    let many = (0..12)
        .map(|id| step(SMALL, id, 1 + u16::from(id), u64::from(id) * 5, 5))
        .collect::<Vec<_>>();
    let last = step(0, 1, 1, u64::MAX - (2 * PAGE_SIZE - 1), PAGE_SIZE);
    vec![pair, busy.concat(), many.concat(), last]
}

/// A discard covers all whole units inside the bytes, and a populate all units that the bytes touch
/// (`round-safely`). Intersections of ranges with any numbers do not wrap around.
pub fn range(data: &[u8]) -> bool {
    let mut numbers = Decoder::new(data);
    let [a, b, c, d] = [0; 4].map(|_| numbers.u64("number").unwrap_or(0));
    meet(PageRange::new(a, b), PageRange::new(c, d));
    let unit = PAGE_SIZE << (numbers.u8("unit").unwrap_or(0) % 20);
    // The lengths that a block can have.
    let block = (c % (MAX_BLOCK_LENGTH + 1)).max(PAGE_SIZE) / PAGE_SIZE * PAGE_SIZE;
    rounding(a, b, unit, block)
}

fn rounding(offset: u64, length: u64, unit: u64, block: u64) -> bool {
    let (inward, outward) = (
        PageRange::inward(offset, length, unit, block),
        PageRange::outward(offset, length, unit, block),
    );
    let end = u128::from(offset) + u128::from(length);
    if end > u128::from(block) {
        for refused in [inward, outward] {
            let error = refused
                .map_or_else(|error| error.to_string(), |range| format!("{range:?} was taken"));
            assert!(
                error.contains(&format!("{offset:#x}")) && error.contains(&format!("{length:#x}")),
                "{error}"
            );
        }
        return false;
    }
    let (Ok(inward), Ok(outward), end) = (inward, outward, end as u64) else { return false };
    let bytes = |range: PageRange| (range.first * PAGE_SIZE, (range.end() * PAGE_SIZE).min(block));
    let whole = |at: u64| at.is_multiple_of(unit) || at == block;
    assert!(outward.fits(block / PAGE_SIZE), "{outward:?} is outside of the block");
    if !inward.is_empty() {
        let (start, stop) = bytes(inward);
        assert!(
            whole(start) && whole(stop) && offset <= start && stop <= end,
            "{inward:?} is not inside of the bytes"
        );
        assert!(start - offset < unit && end - stop < unit, "{inward:?} leaves out a whole unit");
    } else {
        let next = offset.next_multiple_of(unit);
        assert!(next >= block || end < block.min(next + unit), "a whole unit is left out");
    }
    if length > 0 {
        let (start, stop) = bytes(outward);
        assert!(
            whole(start) && whole(stop) && start <= offset && end <= stop,
            "{outward:?} misses a byte"
        );
        assert!(offset - start < unit && stop - end < unit, "{outward:?} is too large");
    } else {
        assert!(outward.is_empty());
    }
    true
}

fn meet(one: PageRange, other: PageRange) {
    let end = |range: PageRange| u128::from(range.first) + u128::from(range.count);
    // A range that exceeds the largest number ends there.
    let stop = |range: PageRange| end(range).min(u128::from(u64::MAX));
    let first = u128::from(one.first.max(other.first));
    let shared = stop(one).min(stop(other)).saturating_sub(first);
    let common = one.intersection(&other);
    assert_eq!(u128::from(common.count), shared, "{one:?} and {other:?}");
    assert_eq!(one.overlaps(&other), shared > 0, "{one:?} and {other:?}");
    assert_eq!(other.intersection(&one).count, common.count);
    assert_eq!(
        one.fits(other.first),
        end(one) <= u128::from(other.first),
        "{one:?} in {:#x} pages",
        other.first
    );
}

/// Aligned and unaligned ranges, at both ends of a block.
pub fn range_seeds() -> Vec<Vec<u8>> {
    let seed = |[a, b, c, d]: [u64; 4], unit: u8| {
        Encoder::new().u64(a).u64(b).u64(c).u64(d).u8(unit).finish()
    };
    vec![
        seed([0, 1 << 24, 1 << 24, 3], 0),
        seed([1, 4096, 1 << 24, 3], 0),
        seed([(2 << 20) - 1, 4 << 20, (1 << 24) + PAGE_SIZE, 5], 9),
        seed([1 << 24, PAGE_SIZE, (1 << 24) + PAGE_SIZE, 5], 9),
        seed([0, 0, PAGE_SIZE, u64::MAX], 1),
    ]
}
