// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The files in `testdata` are answers of QEMU 10.0.2 and 11.1.3. Flat views of other address
//! spaces are shortened to two. Each file has the answer of `info ramblock`, of `info mtree -f`, of
//! `query-memory-devices`, and of `query-memdev`.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::Value;

use super::{
    Error, FlatRange, GuestRam, MemoryDevice, RamBlock, guest_ram, parse_backends, parse_devices,
    parse_flat_view, parse_ram_blocks,
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What one QEMU said.
struct Answers {
    blocks: Vec<RamBlock>,
    flat_view: Vec<FlatRange>,
    devices: Vec<MemoryDevice>,
    backends: Vec<super::MemoryBackend>,
}

fn answers(name: &str) -> Answers {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/qemu/ram_layout/testdata");
    let text = fs::read_to_string(folder.join(format!("{name}.txt"))).unwrap();
    let part = |heading: &str| {
        let (_, part) = text.split_once(&format!("== {heading}\n")).unwrap();
        part.split_once("\n== ").map_or(part, |(part, _)| part).to_owned()
    };
    let json = |heading: &str| serde_json::from_str::<Value>(&part(heading)).unwrap();
    Answers {
        blocks: parse_ram_blocks(&part("info ramblock")).unwrap(),
        flat_view: parse_flat_view(&part("info mtree -f")).unwrap(),
        devices: parse_devices(&json("query-memory-devices")).unwrap(),
        backends: parse_backends(&json("query-memdev")).unwrap(),
    }
}

impl Answers {
    /// Finds guest memory; every writable block of a memory object counts as shared.
    fn guest_ram(&self) -> Result<Vec<GuestRam>, Error> {
        let is_shared = |hva| {
            let block = self.blocks.iter().find(|block| block.hva == hva).unwrap();
            !block.read_only && !block.name.ends_with("vga.vram")
        };
        guest_ram(&self.blocks, &self.flat_view, &self.devices, is_shared)
    }

    /// Name, offset, guest address, and length of each range.
    fn ranges(&self) -> Vec<(String, u64, u64, u64)> {
        let ranges = self.guest_ram().unwrap();
        for range in &ranges {
            let block = self.blocks.iter().find(|block| block.name == range.block).unwrap();
            assert_eq!(range.hva, block.hva + range.block_offset);
            assert_eq!(range.page_size, 4096);
        }
        ranges
            .into_iter()
            .map(|range| (range.block, range.block_offset, range.gpa, range.length))
            .collect()
    }
}

fn expect(machine: &str, ranges: &[(&str, u64, u64, u64)]) {
    for release in ["10.0", "11.1"] {
        let found = answers(&format!("{release}-{machine}")).ranges();
        let found: Vec<_> =
            found.iter().map(|(name, offset, gpa, size)| (&**name, *offset, *gpa, *size)).collect();
        assert_eq!(found, ranges, "{release} {machine}");
    }
}

#[test]
fn small_memory_is_one_range_with_what_vga_and_rom_hide() {
    expect("pc-512m", &[("pageferry-ram", 0, 0, 512 * MIB)]);
    expect("q35-512m", &[("pageferry-ram", 0, 0, 512 * MIB)]);
}

#[test]
fn memory_over_the_hole_is_two_ranges() {
    let pc = [("pageferry-ram", 0, 0, 3 * GIB), ("pageferry-ram", 3 * GIB, 4 * GIB, GIB)];
    expect("pc-4g", &pc);
    let q35 = [("pageferry-ram", 0, 0, 2 * GIB), ("pageferry-ram", 2 * GIB, 4 * GIB, 2 * GIB)];
    expect("q35-4g", &q35);
}

#[test]
fn firmware_that_shadows_its_rom_changes_nothing() {
    let pc = [("pageferry-ram", 0, 0, 3 * GIB), ("pageferry-ram", 3 * GIB, 4 * GIB, GIB)];
    expect("pc-4g-booted", &pc);
    let q35 = [("pageferry-ram", 0, 0, 2 * GIB), ("pageferry-ram", 2 * GIB, 4 * GIB, 2 * GIB)];
    expect("q35-4g-booted", &q35);
}

#[test]
fn dimms_and_virtio_mem_follow_the_memory_of_the_machine() {
    let pc = [
        ("pageferry-ram", 0, 0, 512 * MIB),
        ("0000:00:02.0/vm0", 0, 4 * GIB, GIB),
        ("d0", 0, 5 * GIB, 256 * MIB),
    ];
    expect("pc-hotplug", &pc);
    let q35 = [
        ("pageferry-ram", 0, 0, 2 * GIB),
        ("pageferry-ram", 2 * GIB, 4 * GIB, 2 * GIB),
        ("0000:00:01.0/vm0", 0, 6 * GIB, GIB),
        ("d0", 0, 7 * GIB, 256 * MIB),
    ];
    expect("q35-hotplug", &q35);
}

#[test]
fn nodes_have_a_range_each() {
    expect("q35-numa", &[("m0", 0, 0, 256 * MIB), ("m1", 0, 256 * MIB, 256 * MIB)]);
}

#[test]
fn unplugged_virtio_mem_that_the_flat_view_hides_has_its_address() {
    let answers = answers("10.0-pc-dynamic-memslots");
    assert!(answers.flat_view.iter().all(|range| range.region != "d0"));
    let pc = [("pageferry-ram", 0, 0, 512 * MIB), ("0000:00:02.0/d0", 0, 4 * GIB, 2 * GIB)];
    expect("pc-dynamic-memslots", &pc);
}

#[test]
fn canonical_paths_are_names_of_regions_too() {
    let pc =
        [("pageferry-ram", 0, 0, 512 * MIB), ("0000:00:02.0//objects/d0", 0, 4 * GIB, 256 * MIB)];
    expect("pc-canonical", &pc);
}

#[test]
fn an_object_that_no_device_uses_is_left_out() {
    assert!(answers("11.1-pc-unused").blocks.iter().any(|block| block.name.is_empty()));
    expect("pc-unused", &[("pageferry-ram", 0, 0, 512 * MIB)]);
}

#[test]
fn backends_say_that_they_are_shared() {
    let backends = answers("11.1-q35-hotplug").backends;
    assert_eq!(backends.len(), 3);
    assert!(backends.iter().all(|backend| backend.share));
    let ram = backends.iter().find(|backend| backend.id.as_deref() == Some("pageferry-ram"));
    assert_eq!(ram.unwrap().size, 4 * GIB);
}

fn block(name: &str, hva: u64, max_length: u64) -> RamBlock {
    RamBlock {
        name: name.into(),
        page_size: 4096,
        ram_offset: 0,
        used_length: max_length,
        max_length,
        hva,
        read_only: false,
    }
}

fn range(region: &str, offset: u64, gpa: u64, length: u64) -> FlatRange {
    FlatRange { gpa, length, is_memory: true, region: region.into(), offset }
}

fn ram_of(blocks: &[RamBlock], flat_view: &[FlatRange]) -> Result<Vec<GuestRam>, Error> {
    guest_ram(blocks, flat_view, &[], |_| true)
}

#[test]
fn an_alias_of_management_memory_is_left_out() {
    let blocks = [block("ram", 0x10_0000, 0x20_0000)];
    let flat_view = [
        range("ram", 0, 0, 0xa_0000),
        range("ram", 0x10_0000, 0x10_0000, 0x10_0000),
        range("ram", 0xa_0000, 0xfeda_0000, 0x2_0000),
    ];
    let found = ram_of(&blocks, &flat_view).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].gpa, found[0].length), (0, 0x20_0000));
}

#[test]
fn the_hidden_end_of_low_memory_stays_below_the_hole() {
    let blocks = [block("ram", 0, 4 * GIB)];
    let flat_view =
        [range("ram", 0, 0, 2 * GIB - 8 * MIB), range("ram", 2 * GIB, 4 * GIB, 2 * GIB)];
    let found = ram_of(&blocks, &flat_view).unwrap();
    assert_eq!((found[0].gpa, found[0].length), (0, 2 * GIB));
    assert_eq!((found[1].gpa, found[1].length), (4 * GIB, 2 * GIB));
}

#[test]
fn layouts_that_contradict_themselves_are_refused() {
    let one = [block("a", 0, 0x4000)];
    let two = [block("a", 0, 0x4000), block("b", 0x4000, 0x4000)];
    let same = [block("a", 0, 0x4000), block("0000:00:02.0/a", 0x4000, 0x4000)];

    assert_eq!(ram_of(&one, &[]), Err(Error::NoAddress { block: "a".into() }));
    assert!(matches!(ram_of(&same, &[range("a", 0, 0, 0x4000)]), Err(Error::TwoBlocks { .. })));
    assert!(matches!(
        ram_of(&one, &[range("a", 0x1000, 0, 0x4000)]),
        Err(Error::OutsideBlock { length: 0x4000, .. })
    ));
    assert!(matches!(
        ram_of(&one, &[range("a", 0, 0, 0x4000), range("a", 0, 0x8000, 0x4000)]),
        Err(Error::TwoAddresses { offset: 0, first: 0, second: 0x8000, .. })
    ));
    assert!(matches!(
        ram_of(&one, &[range("a", 0x1000, 0, 0x1000)]),
        Err(Error::AddressOverflow { offset: 0, .. })
    ));
    assert!(matches!(
        ram_of(&one, &[range("a", 0, u64::MAX - 0x1fff, 0x1000)]),
        Err(Error::AddressOverflow { offset: 0x4000, .. })
    ));
    assert!(matches!(
        ram_of(&two, &[range("a", 0, 0, 0x4000), range("b", 0, 0x3000, 0x4000)]),
        Err(Error::Overlap { gpa: 0x3000, .. })
    ));
}

#[test]
fn lines_and_answers_that_are_not_understood_are_named() {
    let header = "  Block Name    PSize   Offset  Used  Total  HVA  RO\n";
    for (text, named) in [
        ("nothing", "nothing"),
        (&format!("{header}ram 4 KiB 0x0 0x1000 0x1000"), "0x1000"),
        (&format!("{header}ram 3 KiB 0x0 0x1000 0x1000 0x0 rw"), "3 KiB"),
        (&format!("{header}ram 4 KiB 0x0 0x1000 0x1000 0y0 rw"), "0y0"),
    ] {
        let error = parse_ram_blocks(text).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    let view = "FlatView #0\n AS \"memory\", root: system\n";
    for line in [
        "  0000000000000000-00000000000bffff (prio 0, rum): ram",
        "  0000000000000000-00000000000bffff (prio x, ram): ram",
        "  0000000000000001-0000000000000000 (prio 0, ram): ram",
        "  0-1 (prio 0, ram): ram",
    ] {
        let error = parse_flat_view(&format!("{view}{line}\n")).unwrap_err().to_string();
        assert!(error.contains(line), "{error}");
    }
    for text in [&format!("{view}  No rendered FlatView"), "FlatView #0\n AS \"I/O\", root: io\n"] {
        assert_eq!(parse_flat_view(text), Err(Error::NoFlatView));
    }
    for answer in ["{}", "[{}]", r#"[{"type":"dimm","data":{"memdev":"/objects/a"}}]"#] {
        assert!(parse_devices(&serde_json::from_str(answer).unwrap()).is_err(), "{answer}");
        assert!(parse_backends(&serde_json::from_str(answer).unwrap()).is_err(), "{answer}");
    }
}

#[test]
fn lines_of_other_setups_are_understood() {
    let view = "FlatView #3\r\n AS \"memory\", root: system\r\n Root memory region: system\r\n  \
                0000000000000000-00000000000bffff (prio 0, ram): a b @0000000000001000 KVM\r\n  \
                00000000000c0000-00000000000dffff (prio -1, nv-ram): pmem KVM\r\n\r\n\
                FlatView #4\r\n AS \"x\", root: x\r\n  garbage\r\n";
    let found = parse_flat_view(view).unwrap();
    assert_eq!(found[0], range("a b", 0x1000, 0, 0xc_0000));
    assert_eq!(found[1], range("pmem", 0, 0xc_0000, 0x2_0000));

    let header = "Block Name    PSize   Offset  Used  Total  HVA\n";
    let line = "  a b    2 MiB  0x0000000000000000 0x0000000000200000 0x0000000000200000 0x7f00\n";
    let found = parse_ram_blocks(&format!("{header}{line}")).unwrap();
    assert_eq!((&*found[0].name, found[0].page_size, found[0].hva), ("a b", 2 * MIB, 0x7f00));
}

/// Pages of a machine: the memory of blocks is cut into spans, which are placed one behind the
/// other with holes between them.
#[derive(Debug, Clone)]
struct Machine {
    /// For each block, for each span: pages of hole before it, and whether each page is visible.
    blocks: Vec<Vec<(u64, Vec<bool>)>>,
}

const PAGE: u64 = 4096;

fn machine() -> impl Strategy<Value = Machine> {
    // The first page of a span is visible: what is hidden there belongs to the span below.
    let visible = prop::collection::vec(any::<bool>(), 0..6).prop_map(|mut pages| {
        pages.insert(0, true);
        pages
    });
    let spans = prop::collection::vec((1..4_u64, visible), 1..4);
    prop::collection::vec(spans, 1..4).prop_map(|blocks| Machine { blocks })
}

impl Machine {
    /// Block, page in the block, guest page, and visibility of each page of memory.
    fn pages(&self) -> Vec<(usize, u64, u64, bool)> {
        let mut pages = Vec::new();
        let mut guest_page = 0;
        for (block, spans) in self.blocks.iter().enumerate() {
            let mut block_page = 0;
            for (hole, visible) in spans {
                guest_page += hole;
                for is_visible in visible {
                    pages.push((block, block_page, guest_page, *is_visible));
                    block_page += 1;
                    guest_page += 1;
                }
            }
        }
        pages
    }

    fn ram_blocks(&self) -> String {
        let mut text = String::from("Block Name    PSize  Offset  Used  Total  HVA  RO\n");
        for (index, spans) in self.blocks.iter().enumerate() {
            let pages: usize = spans.iter().map(|(_, visible)| visible.len()).sum();
            let length = pages as u64 * PAGE;
            let hva = (index as u64 + 1) << 32;
            text += &format!("dev/b{index}    4 KiB  0x0 {length:#x} {length:#x} {hva:#x}  rw\n");
        }
        text
    }

    /// The flat view in single pages, with devices where memory is hidden.
    fn flat_view(&self) -> String {
        let mut text = String::from("FlatView #0\n AS \"memory\", root: system\n");
        for (block, block_page, guest_page, is_visible) in self.pages() {
            let (first, offset) = (guest_page * PAGE, block_page * PAGE);
            let last = first + PAGE - 1;
            text += &if is_visible {
                format!("  {first:016x}-{last:016x} (prio 0, ram): b{block} @{offset:016x}\n")
            } else {
                format!("  {first:016x}-{last:016x} (prio 1, i/o): device\n")
            };
        }
        text
    }
}

proptest! {
    #[test]
    fn every_page_is_found_at_its_address_whether_it_is_visible_or_not(machine in machine()) {
        let blocks = parse_ram_blocks(&machine.ram_blocks()).unwrap();
        let flat_view = parse_flat_view(&machine.flat_view()).unwrap();

        let found = ram_of(&blocks, &flat_view).unwrap();

        let mut pages = Vec::new();
        for range in &found {
            let block: usize = range.block.strip_prefix("dev/b").unwrap().parse().unwrap();
            prop_assert_eq!(range.hva, ((block as u64 + 1) << 32) + range.block_offset);
            for page in 0..range.length / PAGE {
                pages.push((block, range.block_offset / PAGE + page, range.gpa / PAGE + page));
            }
        }
        let expected: Vec<_> =
            machine.pages().into_iter().map(|(block, page, gpa, _)| (block, page, gpa)).collect();
        prop_assert_eq!(pages, expected);
        // No range could be joined with the next one.
        let spans: usize = machine.blocks.iter().map(Vec::len).sum();
        prop_assert_eq!(found.len(), spans);
    }

    #[test]
    fn any_text_is_read_or_refused(
        lines in prop::collection::vec("[ -~é\u{2003}]{0,40}", 0..6),
        cut in 0..4000_usize,
    ) {
        let header = "Block Name HVA\n".to_owned();
        let _ = parse_ram_blocks(&(header + &lines.join("\n")));
        let view = "FlatView #0\n AS \"memory\", root: system\n  ".to_owned();
        let _ = parse_flat_view(&(view + &lines.join("\n  ")));

        let real = include_str!("testdata/11.1-q35-4g-booted.txt");
        let cut = &real[..cut.min(real.len())];
        let _ = parse_ram_blocks(cut);
        let _ = parse_flat_view(cut);
    }

    #[test]
    fn any_ranges_are_covered_without_overlap_or_refused(
        ranges in prop::collection::vec((0..3_usize, any::<[u64; 3]>(), any::<[bool; 3]>()), 0..8),
    ) {
        let names = ["a", "b", "c"];
        let blocks: Vec<_> =
            (1..=3).map(|index| block(names[index as usize - 1], index << 32, 0x8000)).collect();
        // Small numbers, with some that overflow.
        let small = |value: u64, is_wild: bool| if is_wild { value } else { value % 8 * PAGE };
        let flat_view: Vec<_> = ranges
            .iter()
            .map(|(name, [offset, gpa, length], [a, b, c])| {
                let wild = *a && *b && *c;
                range(names[*name], small(*offset, wild), small(*gpa, wild), small(*length, wild))
            })
            .collect();

        if let Ok(found) = ram_of(&blocks, &flat_view) {
            let total: u64 = found.iter().map(|range| range.length).sum();
            prop_assert_eq!(total, 3 * 0x8000);
            for pair in found.windows(2) {
                prop_assert!(pair[0].gpa + pair[0].length <= pair[1].gpa);
            }
        }
    }
}
