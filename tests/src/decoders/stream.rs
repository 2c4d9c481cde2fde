// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Decoders of what two agents send each other.
#![allow(clippy::expect_used, reason = "a target fails by panicking")]

use super::control::{MOST, spooled};
use super::heap::{fair, within};
use super::{choice, refused, same};
use crate::random::page_text;
use pageferry_agent::incoming::decompress::Decompressor;
use pageferry_agent::outgoing::compress::Compressor;
use pageferry_agent::transport::{RecordReader, StreamSocket, TransportError};
use pageferry_protocol::control::job::Compression;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use pageferry_protocol::control::{DecodeError, Decoder};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, MAX_BLOCKS, PAGE_SIZE, PageRange};
use pageferry_protocol::stream::answer::{Accept, decode_error, encode_error};
use pageferry_protocol::stream::hello::{FEATURES, HELLO_ACKNOWLEDGE, HELLO_RECOVER, MAX_HELLO};
use pageferry_protocol::stream::payload::{
    MAX_BITMAP_PAGES, StatePart, Totals, decode_bitmap, decode_runs, encode_bitmap, encode_runs,
};
use pageferry_protocol::stream::record::{
    FLAG_LZ4, FLAG_PAUSED, FLAG_STRAY, FLAG_WHOLE, FLAG_ZSTD, FLAGS_COMPRESSED, MAX_DATA_PAGES,
};
use pageferry_protocol::stream::table::compare_tables;
use pageferry_protocol::stream::{Hello, Kind, MAX_PAYLOAD, RECORD_SIZE, RecordHeader};
use std::time::Duration;

/// The opening of a stream: the source's hello and the destination's answer.
pub fn hello(data: &[u8]) -> bool {
    let (kind, payload) = choice(data);
    match kind {
        0 => match within(fair(payload), || Hello::decode(payload)) {
            Ok(hello) => {
                assert!(hello.stream < hello.streams && hello.blocks.blocks().len() <= MAX_BLOCKS);
                compare_tables(&hello.blocks, &hello.blocks).expect("a table is equal to itself");
                let again = hello.encode();
                assert_eq!(again.len(), payload.len());
                // The blocks may have come in another order.
                same(Hello::decode(&again).expect("what was encoded"), hello);
                true
            }
            Err(error) => refused(&error),
        },
        1 => exact(payload, Accept::decode, Accept::encode),
        2 => match within(fair(payload), || decode_error(payload)) {
            Ok(error) => {
                let again = encode_error(&error);
                // All unknown codes become the same value.
                assert_eq!(again[4..], payload[4..]);
                same(decode_error(&again), Ok(error));
                true
            }
            Err(_) => false,
        },
        _ => false,
    }
}

/// Checks a payload that has only one encoding.
fn exact<T>(
    payload: &[u8], decode: impl Fn(&[u8]) -> Result<T, DecodeError>,
    encode: impl Fn(&T) -> Vec<u8>,
) -> bool {
    match within(fair(payload), || decode(payload)) {
        Ok(value) => {
            assert_eq!(encode(&value), payload);
            true
        }
        Err(error) => refused(&error),
    }
}

/// A hello with blocks, one without, and both answers.
pub fn hello_seeds() -> Vec<Vec<u8>> {
    let mut blocks = BlockTable::new();
    for (id, gpa) in [(3u32, 0u64), (0, 1 << 40), (9, 4 << 30)] {
        let block = BlockGeometry {
            id,
            name: format!("ram{id}"),
            gpa,
            length: 1 << 30,
            granularity: PAGE_SIZE,
        };
        blocks.insert(block, MAX_BLOCKS).expect("blocks that are apart");
    }
    let hello = |stream, blocks| {
        let (session, flags) = ([7; 16], HELLO_RECOVER | HELLO_ACKNOWLEDGE);
        let hello = Hello {
            version_min: 1,
            version_max: 3,
            features: 5,
            session,
            stream,
            streams: 4,
            urgent: 2,
            flags,
            blocks,
        };
        hello.encode()
    };
    let refusal = RemoteError::new(
        ErrorCode::Invalid,
        "block 3: length is 16 KiB at the source and 12 KiB here",
    );
    let accept = Accept { version: 1, features: 6, host_pages: vec![PAGE_SIZE, 2 << 20] }.encode();
    let payloads = [
        (0, hello(0, blocks)),
        (0, hello(3, BlockTable::new())),
        (1, accept),
        (2, encode_error(&refusal)),
    ];
    payloads.map(|(kind, payload)| [vec![kind], payload].concat()).into()
}

fn header_of(bytes: &[u8]) -> Option<RecordHeader> {
    Some(RecordHeader::from_wire(*bytes.first_chunk::<RECORD_SIZE>()?))
}

/// A record that is accepted is within all limits, and has only one encoding.
pub fn record(data: &[u8]) -> bool {
    let Some(header) = header_of(data) else { return false };
    let payload = &data[RECORD_SIZE..];
    assert_eq!(header.to_wire(), data[..RECORD_SIZE]);
    let kind = match within(fair(data), || header.check()) {
        Ok(kind) => kind,
        Err(error) => return refused(&error),
    };
    let (range, length) = (header.range(), header.payload_length());
    assert!(length <= MAX_PAYLOAD);
    let known = match kind {
        Kind::Data => FLAG_STRAY | FLAG_WHOLE | FLAGS_COMPRESSED,
        Kind::Zero | Kind::Remaining => FLAG_STRAY,
        Kind::End => FLAG_PAUSED,
        _ => 0,
    };
    assert_eq!(header.flags() & !known, 0);
    let compressed = header.flags() & FLAGS_COMPRESSED;
    assert!([0, FLAG_LZ4, FLAG_ZSTD].contains(&compressed));
    if kind == Kind::Data {
        assert!(range.count <= MAX_DATA_PAGES);
        let length = length as u64;
        assert!(if compressed == 0 {
            length == range.bytes()
        } else {
            length > 0 && length < range.bytes()
        });
    }
    let rebuilt = RecordHeader::new(kind, header.flags(), header.block(), range, length)
        .with_checksum(payload);
    assert_eq!(rebuilt.verify(kind, payload), Ok(()));
    assert_eq!(header.verify(kind, payload).is_ok(), rebuilt == header, "one checksum is right");
    rebuilt.check().is_ok()
}

fn sealed(kind: Kind, flags: u16, range: PageRange, payload: &[u8]) -> Vec<u8> {
    let header = RecordHeader::new(kind, flags, 3, range, payload.len()).with_checksum(payload);
    [header.to_wire().as_slice(), payload].concat()
}

/// All kinds of records, and both compressions.
pub fn record_seeds() -> Vec<Vec<u8>> {
    let seed = |kind| match kind {
        Kind::Data => sealed(kind, FLAG_STRAY, PageRange::new(9, 2), &[7; 2 * PAGE_SIZE as usize]),
        Kind::Zero => sealed(kind, 0, PageRange::new(0, 1 << 40), &[]),
        Kind::Remaining => sealed(kind, FLAG_STRAY, PageRange::new(64, 70), &[0xff; 16]),
        Kind::Received => sealed(kind, 0, PageRange::new(0, 64), &[0x55; 8]),
        Kind::Request => sealed(kind, 0, PageRange::new(5, 512), &[]),
        Kind::End => sealed(kind, FLAG_PAUSED, PageRange::default(), b"something of its own"),
        Kind::PassEnd | Kind::PassDone => sealed(kind, 0, PageRange::new(5, 0), &[]),
        Kind::Commit | Kind::Loaded | Kind::Resumed | Kind::Complete => {
            sealed(kind, 0, PageRange::default(), &[])
        }
        _ => sealed(kind, 0, PageRange::default(), b"something of its own"),
    };
    let mut seeds: Vec<_> = Kind::ALL.map(seed).into();
    for (flag, other) in [(FLAG_LZ4, FLAG_WHOLE), (FLAG_ZSTD, FLAG_STRAY)] {
        seeds.push(sealed(Kind::Data, flag | other, PageRange::new(9, 3), &packed(flag, 3)));
    }
    seeds
}

/// Pages of text, compressed.
fn packed(flag: u16, pages: u64) -> Vec<u8> {
    let compression = if flag == FLAG_LZ4 { Compression::Lz4 } else { Compression::Zstd(1) };
    let text: Vec<u8> = (0..pages).flat_map(page_text).collect();
    let mut compressor = Compressor::new(compression).expect("memory").expect("a compressor");
    compressor.begin(text.len());
    assert_eq!(compressor.add(&text).1, flag, "text shrinks");
    compressor.output().to_vec()
}

/// The reader waits for missing bytes, and reads in large pieces.
const WAITING: u8 = 1 << 0;
/// The checksums are made right first, so that the rest of the checks is reached.
const SEALED: u8 = 1 << 1;

/// A socket returns the records in the bytes, and then the reason why there are no more. A stranger
/// can only send a hello, and gets no more memory than a hello takes.
pub fn record_stream(data: &[u8]) -> bool {
    let (how, bytes) = choice(data);
    let mut bytes = bytes[..bytes.len().min(MOST)].to_vec();
    if how & SEALED != 0 {
        seal(&mut bytes);
    }
    let waiting = how & WAITING != 0;
    // While a buffer grows, the old one of at most 1.25 MiB is there, too.
    let limit = if waiting { MAX_PAYLOAD + (2 << 20) } else { 2 * MAX_HELLO + 8192 };
    let socket = StreamSocket::new(spooled(&bytes), Duration::from_secs(5)).expect("a stream");
    let (mut reader, mut rest, mut records) = (RecordReader::new(socket), bytes.as_slice(), 0);
    loop {
        match within(limit, || read(&mut reader, waiting)) {
            Ok((kind, payload)) => {
                let header = header_of(rest).expect("a whole header");
                assert_eq!(header.check(), Ok(kind));
                let (whole, after) = rest.split_at(RECORD_SIZE + payload.len());
                assert_eq!(payload, &whole[RECORD_SIZE..]);
                assert_eq!(header.verify(kind, payload), Ok(()));
                assert!(waiting || kind == Kind::Hello);
                rest = after;
                records += 1;
            }
            Err(error) => {
                check_end(&error, rest, waiting);
                return matches!(error, TransportError::Closed) && records > 0;
            }
        }
    }
}

fn read(reader: &mut RecordReader, waiting: bool) -> Result<(Kind, &[u8]), TransportError> {
    if waiting {
        return reader.read().map(|record| (record.kind, record.payload));
    }
    Ok((Kind::Hello, reader.try_read_hello()?.expect("all that will come is here")))
}

/// Checks the reason why the rest is not a record.
fn check_end(error: &TransportError, rest: &[u8], waiting: bool) {
    let header = header_of(rest);
    match (error, header) {
        (TransportError::Closed, None) => assert!(rest.is_empty(), "{} bytes more", rest.len()),
        (TransportError::ClosedInRecord { missing }, header) => {
            let payload = header.map_or(0, |header| header.payload_length());
            assert_eq!(rest.len() + missing, RECORD_SIZE + payload);
        }
        (TransportError::HelloExpected { kind, length }, Some(header)) => {
            assert_eq!((header.check(), header.payload_length()), (Ok(*kind), *length));
            assert!(!waiting && (*kind != Kind::Hello || *length > MAX_HELLO));
        }
        (TransportError::SpeaksTls, _) => assert!(!waiting && rest.starts_with(&[0x16, 3])),
        (TransportError::Record(error), Some(header)) => {
            let payload = || &rest[RECORD_SIZE..RECORD_SIZE + header.payload_length()];
            assert_eq!(header.check().and_then(|kind| header.verify(kind, payload())), Err(*error));
        }
        _ => assert_eq!(error.to_string(), "", "only the bytes can be wrong"),
    }
}

/// Corrects the checksums of all complete records.
fn seal(bytes: &mut [u8]) {
    let mut at = 0;
    while let Some(header) = bytes.get(at..).and_then(header_of) {
        let end = at + RECORD_SIZE + header.payload_length();
        let Some(payload) = bytes.get(at + RECORD_SIZE..end) else { return };
        let sealed = header.with_checksum(payload).to_wire();
        bytes[at..at + RECORD_SIZE].copy_from_slice(&sealed);
        at = end;
    }
}

/// All kinds in one stream, and what a stranger may send.
pub fn record_stream_seeds() -> Vec<Vec<u8>> {
    let all = record_seeds().concat();
    let hello = sealed(Kind::Hello, 0, PageRange::default(), &[5; 100]);
    let hellos = [hello.as_slice(), &hello].concat();
    [(0, &hello), (WAITING, &all), (SEALED, &hellos), (SEALED | WAITING, &all)]
        .map(|(how, stream)| [&[how], stream.as_slice()].concat())
        .into()
}

/// The payloads that are not pages. The first number is the size in pages of the block of the runs.
pub fn payload(data: &[u8]) -> bool {
    let (kind, payload) = choice(data);
    match kind {
        0 => {
            let mut decoder = Decoder::new(payload);
            let pages = decoder.u64("pages").unwrap_or(0);
            runs(decoder.remainder(), pages)
        }
        1 => match within(fair(payload), || StatePart::decode(payload)) {
            Ok(part) => {
                assert!(part.offset + part.bytes.len() as u64 <= part.length);
                assert_eq!(part.encode(), payload);
                true
            }
            Err(error) => refused(&error),
        },
        2 => exact(payload, Totals::decode, Totals::encode),
        3 => pages(FLAG_LZ4, payload),
        4 => pages(FLAG_ZSTD, payload),
        5 => {
            let mut decoder = Decoder::new(payload);
            let [first, count, pages] =
                ["first", "count", "pages"].map(|field| decoder.u64(field).unwrap_or(0));
            bitmap(decoder.remainder(), PageRange::new(first, count), pages)
        }
        _ => false,
    }
}

/// Compressed pages. The first byte is the number of pages minus one. The result has exactly their
/// size, and takes no more memory.
fn pages(flag: u16, bytes: &[u8]) -> bool {
    let (more, payload) = choice(bytes);
    let range = PageRange::new(9, 1 + u64::from(more));
    let header = RecordHeader::new(Kind::Data, flag, 3, range, payload.len());
    if header.check().is_err() {
        return false;
    }
    assert_eq!(header.flags() & FLAGS_COMPRESSED, flag);
    let mut decompressor = Decompressor::new(FEATURES);
    match within(fair(payload) + range.bytes() as usize, || {
        decompressor.unpack(&header, payload).map(<[u8]>::len)
    }) {
        Ok(length) => {
            assert_eq!(length as u64, range.bytes());
            true
        }
        Err(error) => refused(&error),
    }
}

fn runs(payload: &[u8], pages: u64) -> bool {
    let (numbers, rest) = payload.as_chunks::<8>();
    let mut numbers = numbers.iter().map(|bytes| u128::from(u64::from_le_bytes(*bytes)));
    let mut fits = rest.is_empty() && payload.len().is_multiple_of(16);
    while let (Some(first), Some(count)) = (numbers.next(), numbers.next()) {
        fits &= count > 0 && first + count <= u128::from(pages);
    }
    match within(fair(payload), || decode_runs(payload, pages).map(Iterator::collect::<Vec<_>>)) {
        Ok(runs) => {
            assert!(fits, "{runs:?} of {pages} pages were taken");
            assert_eq!(encode_runs(&runs), payload);
            true
        }
        Err(error) => {
            assert!(!fits, "{error}");
            false
        }
    }
}

/// A bitmap covers the range of its record in whole words, and has no bit after its end.
fn bitmap(payload: &[u8], range: PageRange, pages: u64) -> bool {
    let (words, rest) = payload.as_chunks::<8>();
    let words: Vec<u64> = words.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
    let inside = u128::from(range.first) + u128::from(range.count) <= u128::from(pages);
    let whole = rest.is_empty() && words.len() as u64 == range.count.div_ceil(64);
    let set = (0..words.len() as u64 * 64)
        .filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1);
    let ends = set.max().is_none_or(|last| last < range.count);
    let some = range.count > 0 && range.count <= MAX_BITMAP_PAGES;
    let fits = inside && whole && ends && some && range.first.is_multiple_of(64);
    match within(fair(payload), || {
        decode_bitmap(payload, range, pages).map(Iterator::collect::<Vec<_>>)
    }) {
        Ok(found) => {
            assert!(fits, "{range:?} of {pages} pages in {} bytes was taken", payload.len());
            assert!(
                found.iter().map(|(index, _)| *index).eq((range.first / 64..).take(words.len()))
            );
            assert_eq!(encode_bitmap(found.into_iter().map(|(_, bits)| bits)), payload);
            true
        }
        Err(error) => {
            assert!(!fits, "{error}");
            false
        }
    }
}

/// Runs up to the end of a block, parts of the state, totals, compressed pages and bitmaps.
pub fn payload_seeds() -> Vec<Vec<u8>> {
    let runs = encode_runs(&[PageRange::new(0, 1), PageRange::new(5, 10), PageRange::new(999, 1)]);
    let part = StatePart { name: "vcpu0", length: 9, offset: 4, bytes: b"12345" }.encode();
    let empty = StatePart { name: "", length: 1 << 30, offset: 1 << 30, bytes: b"" }.encode();
    let totals = Totals {
        data_pages: 1,
        zero_pages: 2,
        discarded_pages: 3,
        stray_pages: 4,
        passes: u64::MAX,
        remaining_pages: 5,
    };
    let totals = totals.encode();
    let runs = [1000u64.to_le_bytes().to_vec(), runs].concat();
    let [lz4, zstd] = [FLAG_LZ4, FLAG_ZSTD].map(|flag| [vec![4], packed(flag, 5)].concat());
    let numbers =
        |numbers: [u64; 3]| numbers.into_iter().flat_map(u64::to_le_bytes).collect::<Vec<u8>>();
    let bitmap = [numbers([64, 130, 194]), encode_bitmap([5, u64::MAX, 0b11])].concat();
    [(0, runs), (1, part), (1, empty), (2, totals), (3, lz4), (4, zstd), (5, bitmap)]
        .map(|(kind, payload)| [vec![kind], payload].concat())
        .into()
}
