// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Decoders of images: the header, the sections that it points to, the file of the working set, the
//! index of an image in a store, and the key of sealed images.
#![allow(clippy::expect_used, reason = "a target fails by panicking")]

use super::heap::{fair, within};
use super::{choice, refused, same};
use pageferry_agent::image::ImageKey;
use pageferry_protocol::control::Decoder;
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::control::state_pieces::{MAX_PIECES, MAX_STATE, PieceSize};
use pageferry_protocol::image::header::{HEADER_SIZE, MAGIC, VERSION};
use pageferry_protocol::image::sealing::{MAC_SIZE, SALT_SIZE, Seal, Sealing};
use pageferry_protocol::image::states::states_size;
use pageferry_protocol::image::stored::{Form, Index, Piece};
use pageferry_protocol::image::working_set::{MAX_RUNS, SealedWorkingSet};
use pageferry_protocol::image::{
    Contents, Header, Section, StateWord, WorkingSet, checksum, decode_states, encode_states,
};
use pageferry_protocol::memory::geometry::MAX_BLOCKS;
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE, PageRange};

/// The checksum is made right first, so that the rest of the checks is reached.
const SEALED: u8 = 1 << 0;

/// Corrects the checksum in the last four bytes.
fn seal(bytes: &mut [u8]) {
    if let Some((checked, sum)) = bytes.split_last_chunk_mut() {
        *sum = checksum(checked).to_le_bytes();
    }
}

/// The number of `N` bytes at `at`, as in the table of the header's module.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u128 {
    bytes[at..at + N].iter().rev().fold(0, |number, byte| number << 8 | u128::from(*byte))
}

/// A header is accepted exactly if the model that follows the table accepts it, and its encoding is
/// the same bytes. Missing bytes at the end count as zero, so that most mutations do not hit
/// padding.
pub fn image_header(data: &[u8]) -> bool {
    let (how, data) = choice(data);
    let mut bytes = [0; HEADER_SIZE];
    let given = data.len().min(HEADER_SIZE);
    bytes[..given].copy_from_slice(&data[..given]);
    if how & SEALED != 0 {
        seal(&mut bytes);
    }
    let length = number::<8>(&bytes, 64);
    let lies_in_the_file = |at: usize| {
        let (offset, size) = (number::<8>(&bytes, at), number::<8>(&bytes, at + 8));
        offset >= HEADER_SIZE as u128 && offset + size <= length
    };
    let fits = bytes[..8] == MAGIC
        && number::<4>(&bytes, 8) == u128::from(VERSION)
        && number::<4>(&bytes, 12) <= 1
        && number::<8>(&bytes, 16) <= 1
        && number::<4>(&bytes, HEADER_SIZE - 4) == u128::from(checksum(&bytes[..HEADER_SIZE - 4]))
        && (72..192).step_by(24).all(lies_in_the_file);
    match within(fair(&[]), || Header::from_bytes(&bytes)) {
        Ok(header) => {
            assert!(fits, "{header:x?} was taken");
            assert_eq!(header.is_increment(), bytes[40..56] != [0; 16]);
            // Written as zero, and ignored when read.
            (72..192).step_by(24).for_each(|at| bytes[at + 20..at + 24].fill(0));
            assert_eq!(header.sealing.is_some(), bytes[16] == 1);
            match header.sealing {
                Some(_) => bytes[224..HEADER_SIZE - 4 - MAC_SIZE].fill(0),
                None => bytes[192..].fill(0),
            }
            seal(&mut bytes);
            same(header.to_bytes(), bytes.to_vec());
            true
        }
        Err(error) => {
            assert!(!fits, "{error}");
            refused(&error)
        }
    }
}

/// A full image, an increment, an image with empty sections at the end, and a sealed one.
pub fn image_header_seeds() -> Vec<Vec<u8>> {
    let section = |offset, length| Section { offset, length, checksum: 0x1234_5678 };
    let sections = [
        section(0x80_4000, 0x6a),
        section(0x80_2000, 0x110),
        section(0x80_3000, 0xc),
        section(0x80_0000, 0x1800),
        section(0x80_5000, 5),
    ];
    let full = Header {
        id: [1; 16],
        base: [0; 16],
        taken: 1_700_000_000,
        guest: RunState::Running,
        file_length: 0x80_5005,
        sections,
        sealing: None,
    };
    let increment = Header { id: [2; 16], base: [1; 16], guest: RunState::Paused, ..full.clone() };
    let edges =
        Header { sections: [section(u64::MAX, 0); 5], file_length: u64::MAX, ..full.clone() };
    let sealing = Some(Sealing { salt: [3; SALT_SIZE], mac: [4; MAC_SIZE] });
    let sealed = Header { sealing, ..full.clone() };
    // Only the fields. The padding is added again.
    let short = [&full, &increment, &edges, &sealed]
        .map(|header| [&[SEALED], &header.to_bytes()[..192]].concat());
    let whole =
        [full, increment, sealed].map(|header| [&[0], header.to_bytes().as_slice()].concat());
    [short.as_slice(), &whole].concat()
}

/// Contents are within all limits, have their blocks in order, and their encoding is the same
/// bytes.
pub fn image_contents(data: &[u8]) -> bool {
    match within(fair(data), || Contents::decode(data)) {
        Ok(contents) => {
            let blocks = contents.table.blocks();
            assert!(blocks.len() <= MAX_BLOCKS && contents.pieces.len() <= MAX_PIECES);
            assert!(
                blocks.is_sorted_by_key(|block| block.gpa) && contents.state_size() <= MAX_STATE
            );
            let mut bytes = data.to_vec();
            // In each block, written as zero and ignored when read.
            blocks.iter().fold(4, |at, block| {
                bytes[at + 4..at + 8].fill(0);
                at + 36 + block.name.len()
            });
            same(contents.encode(), bytes);
            true
        }
        Err(error) => refused(&error),
    }
}

/// Empty contents, blocks with pieces of state, and an increment of one block.
pub fn image_contents_seeds() -> Vec<Vec<u8>> {
    let block = |id: u32, gpa, length| BlockGeometry {
        id,
        name: format!("ram{id}"),
        gpa,
        length,
        granularity: PAGE_SIZE << id,
    };
    let table = |blocks: &[BlockGeometry]| {
        let mut table = BlockTable::new();
        blocks.iter().for_each(|block| {
            table.insert(block.clone(), MAX_BLOCKS).expect("blocks that are apart")
        });
        table
    };
    let pieces = vec![
        PieceSize { name: "vcpu".into(), length: 5 },
        PieceSize { name: String::new(), length: 1 << 29 },
    ];
    let blocks =
        table(&[block(3, 0, 1 << 30), block(0, 1 << 30, PAGE_SIZE), block(9, 4 << 30, 1 << 40)]);
    let increment = table(&[block(1, 1 << 40, 2 << 20)]);
    [
        Contents::default(),
        Contents { table: blocks, base_name: String::new(), pieces: pieces.clone() },
        Contents { table: increment, base_name: "../mönday.img".into(), pieces },
    ]
    .map(|contents| contents.encode())
    .into()
}

/// The image has a base.
const INCREMENT: u8 = 1 << 0;

/// States are accepted exactly if a model that reads single bits accepts them, for any number of
/// pages, and the values are the same. The result is that of the first number of pages, which is
/// one that can have this many bytes.
pub fn image_states(data: &[u8]) -> bool {
    let (how, data) = choice(data);
    let (cut, bytes) = choice(data);
    let (cut, most) = (u64::from(cut % 64), bytes.len() as u64 / 16 * 64);
    let pages = [most.saturating_sub(cut), most, most + 1, most / 2, cut, u64::MAX - cut];
    let taken = pages.map(|pages| states(bytes, pages, how & INCREMENT != 0));
    taken[0]
}

fn states(bytes: &[u8], pages: u64, increment: bool) -> bool {
    let bit = |page: u64, half: u64| {
        bytes[(page / 64 * 16 + half * 8 + page % 64 / 8) as usize] >> (page % 8) & 1
    };
    let state = |page| (bit(page, 0), bit(page, 1));
    let length = bytes.len() as u64;
    let whole = u128::from(length) == u128::from(pages).div_ceil(64) * 16;
    let fits = whole
        && (0..pages).all(|page| increment || state(page) != (1, 1))
        && (pages..length * 4).all(|page| state(page) == (0, 0));
    let decode = || {
        decode_states(bytes, PageRange::new(0, pages), increment).map(Iterator::collect::<Vec<_>>)
    };
    match within(fair(bytes), decode) {
        Ok(found) => {
            assert!(fits, "states of {pages} pages were taken");
            assert_eq!(states_size(pages), length);
            let mut words = vec![StateWord::default(); bytes.len() / 16];
            for (index, word) in found {
                assert_ne!(word, StateWord::default(), "a word that is all zero is left out");
                words[index as usize] = word;
            }
            for page in 0..pages {
                let word = words[(page / 64) as usize];
                let of = |set: u64| set >> (page % 64) & 1 == 1;
                let found =
                    [word.present, word.discarded, word.unchanged, word.zero(u64::MAX)].map(of);
                let expected =
                    [(1, 0), (0, 1), (1, 1), (0, 0)].map(|expected| state(page) == expected);
                assert_eq!(found, expected, "page {page} of {pages}");
            }
            let mut again = Vec::new();
            encode_states(words, &mut again);
            same(again, bytes.to_vec());
            true
        }
        Err(error) => {
            assert!(!fits, "{pages} pages: {error}");
            refused(&error)
        }
    }
}

/// Blocks that end inside a word and at the end of one, for increments and for full images.
pub fn image_states_seeds() -> Vec<Vec<u8>> {
    let zero = StateWord::default();
    let present = StateWord { present: u64::MAX, ..zero };
    let mixed = StateWord { present: 0b1001, discarded: 0xff00, unchanged: 0 };
    let increment = StateWord { unchanged: 0x5500_0000, ..mixed };
    let seed = |how: u8, cut: u8, words: &[StateWord]| {
        let mut bytes = vec![how, cut];
        encode_states(words.iter().copied(), &mut bytes);
        bytes
    };
    vec![
        seed(0, 0, &[present, zero, mixed]),
        seed(0, 48, &[mixed]),
        seed(INCREMENT, 0, &[increment, present, increment]),
        seed(INCREMENT, 33, &[zero, increment]),
        seed(0, 0, &[]),
    ]
}

/// A working set has the number of runs that its bytes hold, and its encoding is the same bytes.
pub fn working_set(data: &[u8]) -> bool {
    let (how, bytes) = choice(data);
    let mut bytes = bytes.to_vec();
    if how & SEALED != 0 {
        seal(&mut bytes);
    }
    match within(fair(&bytes), || WorkingSet::decode(&bytes)) {
        Ok(set) => {
            assert!(set.runs.len() <= MAX_RUNS);
            for (at, (block, range)) in (32..).step_by(24).zip(&set.runs) {
                let mut run = Decoder::new(&bytes[at..]);
                assert_eq!(run.u32("block"), Ok(*block));
                // Written as zero, and ignored when read.
                bytes[at + 4..at + 8].fill(0);
                let numbers = [number::<8>(&bytes, at + 8), number::<8>(&bytes, at + 16)];
                assert_eq!(numbers, [range.first, range.count].map(u128::from));
            }
            seal(&mut bytes);
            same(set.encode(), bytes);
            true
        }
        Err(error) => refused(&error),
    }
}

/// No run, one run and several runs, with their own checksum, or with one that is corrected after
/// each mutation.
pub fn working_set_seeds() -> Vec<Vec<u8>> {
    let run = |block, first, count| (block, PageRange::new(first, count));
    let sets = [
        vec![],
        vec![run(3, 0, 1)],
        vec![run(0, 512, 8), run(7, 0, 1 << 40), run(0, u64::MAX, u64::MAX)],
    ];
    let seeds = sets.map(|runs| WorkingSet { image: [7; 16], runs }.encode());
    let seed = |how: u8| seeds.iter().map(move |bytes| [&[how], bytes.as_slice()].concat());
    seed(0).chain(seed(SEALED)).collect()
}

/// A sealed working set has the parts that its bytes have, and its encoding is the same bytes. One
/// that is not sealed is none.
pub fn sealed_working_set(data: &[u8]) -> bool {
    let (how, bytes) = choice(data);
    let mut bytes = bytes.to_vec();
    if how & SEALED != 0 {
        seal(&mut bytes);
    }
    let Some(set) = within(fair(&bytes), || SealedWorkingSet::decode(&bytes)) else {
        return false;
    };
    assert!(WorkingSet::decode(&bytes).is_err(), "it is of a later version for other readers");
    assert_eq!((set.salt.as_slice(), set.seal.nonce.as_slice()), (&bytes[16..48], &bytes[48..56]));
    // Written as zero, and ignored when read.
    bytes[12..16].fill(0);
    seal(&mut bytes);
    same(set.encode(), bytes);
    true
}

/// Nothing, and a few bytes, that are sealed.
pub fn sealed_working_set_seeds() -> Vec<Vec<u8>> {
    let seal = Seal { nonce: [1, 0, 0, 0, 0, 0, 0, 0], tag: [2; 16] };
    let set = |bytes: Vec<u8>| SealedWorkingSet { salt: [3; SALT_SIZE], seal, bytes }.encode();
    let seeds = [set(Vec::new()), set(vec![4; 60])];
    let seed = |how: u8| seeds.iter().map(move |bytes| [&[how], bytes.as_slice()].concat());
    seed(0).chain(seed(SEALED)).collect()
}

/// An index is accepted exactly if the model that follows the tables of docs/store.md accepts it.
/// Then its pieces are found by their numbers, and its encoding is the same bytes.
pub fn stored_index(data: &[u8]) -> bool {
    let (how, bytes) = choice(data);
    let mut bytes = bytes.to_vec();
    if how & SEALED != 0 {
        seal(&mut bytes);
    }
    let pieces_at = pieces_of_index(&bytes);
    match within(fair(&bytes), || Index::decode(&bytes)) {
        Ok(index) => {
            let at = pieces_at.expect("the model refuses it");
            assert_eq!(index.pieces.len(), (bytes.len() - 4 - at) / INDEX_PIECE);
            for piece in &index.pieces {
                assert_eq!(index.find(piece.number), Some(piece));
                assert!(piece.number < index.count() && index.content_length(piece.number) > 0);
                assert!(index.packs.get(piece.pack as usize).is_some());
            }
            // Written as zero, and ignored when read.
            bytes[60..64].fill(0);
            let end = bytes.len() - 4;
            bytes[at..end].chunks_mut(INDEX_PIECE).for_each(|piece| piece[28..32].fill(0));
            seal(&mut bytes);
            same(index.encode(), bytes);
            true
        }
        Err(error) => {
            assert_eq!(pieces_at, None, "{error}");
            refused(&error)
        }
    }
}

/// Bytes of a piece in an index.
const INDEX_PIECE: usize = 48;

/// Where the pieces of an index begin; `None` if it is to be refused.
fn pieces_of_index(bytes: &[u8]) -> Option<usize> {
    let end = bytes.len().checked_sub(4).filter(|end| *end >= 64)?;
    let (size, length) = (number::<4>(bytes, 12), number::<8>(bytes, 16));
    let is_head_right = bytes[..8] == *b"PFstore\0"
        && number::<4>(bytes, end) == u128::from(checksum(&bytes[..end]))
        && number::<4>(bytes, 8) == 1
        && (16..=24).any(|power| size == 1 << power)
        && (1..=1 << 50).contains(&length);
    let (packs, mut at) = (number::<4>(bytes, 56), 64);
    for _ in 0..packs {
        let name = bytes[..end].get(at..at + 4).map(|bytes| number::<4>(bytes, 0) as usize)?;
        let text = bytes[..end].get(at + 4..at + 4 + name)?;
        std::str::from_utf8(text).ok().filter(|_| (1..=2048).contains(&name))?;
        at += 4 + name;
    }
    let mut pieces = bytes[at..end].chunks_exact(INDEX_PIECE);
    let mut next = 0;
    let are_right = pieces.all(|piece| {
        let (piece_number, pack, form) =
            (number::<8>(piece, 0), number::<4>(piece, 8), number::<4>(piece, 12));
        let (offset, packed) = (number::<8>(piece, 16), number::<4>(piece, 24));
        let content = size.min(length.saturating_sub(piece_number * size));
        let is_next = piece_number >= next && content > 0;
        next = piece_number + 1;
        let fits = match form {
            1 => packed == content,
            2 => (1..=content).contains(&packed),
            _ => false,
        };
        is_next && pack < packs && offset <= 1 << 50 && fits
    });
    let is_whole = (end - at).is_multiple_of(INDEX_PIECE);
    (is_head_right && is_whole && are_right).then_some(at)
}

/// An image without content, one with a single piece, and one with both forms in two packs, whose
/// last piece is short.
pub fn stored_index_seeds() -> Vec<Vec<u8>> {
    let piece = |number, pack, form, offset, length| {
        let hash = [number as u8; 16];
        Piece { number, pack, form, offset, length, hash }
    };
    let index = |length, piece_size, packs: &[&str], pieces| Index {
        image: [1; 16],
        upload: [2; 16],
        length,
        piece_size,
        packs: packs.iter().map(|name| (*name).to_owned()).collect(),
        pieces,
    };
    let seeds = [
        index(1 << 20, 1 << 20, &[], vec![]),
        index(64 << 10, 64 << 10, &["a"], vec![piece(0, 0, Form::Zstd, 0, 9)]),
        index(
            (5 << 20) + 1,
            1 << 20,
            &["vm/a.parts/0/00000000", "vm/mönday.parts/1/00000000"],
            vec![
                piece(0, 0, Form::Zstd, 7, 1 << 20),
                piece(2, 1, Form::Plain, 1 << 50, 1 << 20),
                piece(5, 1, Form::Plain, 0, 1),
            ],
        ),
    ]
    .map(|index| index.encode());
    let seed = |how: u8| seeds.iter().map(move |bytes| [&[how], bytes.as_slice()].concat());
    seed(0).chain(seed(SEALED)).collect()
}

/// A key is taken exactly if it is 32 bytes, or 64 digits with or without a newline, and not zero.
pub fn image_key(data: &[u8]) -> bool {
    let digits = data.strip_suffix(b"\n").unwrap_or(data);
    let is_hex = digits.len() == 64 && digits.iter().all(u8::is_ascii_hexdigit);
    let is_zero = data.iter().all(|byte| *byte == 0) || digits.iter().all(|digit| *digit == b'0');
    let fits = match data.len() {
        32 => data.iter().any(|byte| *byte != 0),
        _ => is_hex && !is_zero,
    };
    match within(fair(data), || ImageKey::parse(data)) {
        Ok(_) => {
            assert!(fits, "{data:?} was taken");
            true
        }
        Err(error) => {
            assert!(!fits, "{error}");
            refused(&error)
        }
    }
}

/// Each form of a key.
pub fn image_key_seeds() -> Vec<Vec<u8>> {
    vec![vec![7; 32], vec![b'a'; 64], b"0123456789abcdef0123456789ABCDEF".repeat(2), {
        let mut line = vec![b'0'; 63];
        line.extend_from_slice(b"1\n");
        line
    }]
}
