// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::memory::GuestMemory;
use crate::memory::test_support::{job, memory};
use crate::transport::RecordReader;
use pageferry_protocol::control::request::BlockRange;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

const PAGE: usize = PAGE_SIZE as usize;

/// A job with a block of 128 pages. Each page is full of its own number, except page 5, which is
/// zero.
fn guest() -> Arc<Job> {
    let memory = memory(&[128]);
    for page in (0..128).filter(|page| *page != 5) {
        memory.blocks()[0].backing.write(page * PAGE_SIZE, &[page as u8; PAGE]).unwrap();
    }
    job(memory)
}

fn mark(bitmap: &MappedBitmap, pages: &[u64]) {
    pages.iter().for_each(|page| _ = bitmap.set(PageRange::new(*page, 1)));
}

fn bits(pages: &[u64]) -> u64 {
    pages.iter().fold(0, |bits, page| bits | 1 << page)
}

fn socket(fd: impl Into<OwnedFd>) -> StreamSocket {
    StreamSocket::new(fd.into(), Duration::from_secs(60)).unwrap()
}

/// Returns what `send` sends: kind, flags and pages of each record, and the totals. Checks the
/// content.
fn sent(
    job: &Job, send: impl FnOnce(&mut PageSender, &SendContext<'_>, &GuestMemory),
) -> (Vec<(Kind, u16, u64, u64)>, Totals) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut sender = PageSender::new(0, socket(ours), None);
    let limiter = Limiter::new(0);
    let view = SendContext { job, limiter: &limiter, send_zeros: true, sent: None };
    send(&mut sender, &view, &job.memory);
    sender.flush(&view).unwrap();
    sender.socket().end_sending();
    let mut peer = RecordReader::new(socket(theirs));
    let mut records = Vec::new();
    while let Ok(record) = peer.read() {
        let range = record.header.range();
        for (page, content) in (range.first..).zip(record.payload.chunks(PAGE)) {
            assert!(content.iter().all(|byte| *byte == page as u8), "page {page}");
        }
        records.push((record.kind, record.header.flags(), range.first, range.count));
    }
    (records, sender.totals)
}

#[test]
fn dirty_pages_are_sent_unless_discarded_and_not_stray() {
    let job = guest();
    let block = &job.memory.blocks()[0];
    mark(&block.discarded, &[8, 9]);
    mark(&block.stray, &[9, 20]);
    let dirty = MappedBitmap::private(128).unwrap();
    mark(&dirty, &[1, 2, 4, 5, 8, 9, 70]);
    let (records, totals) = sent(&job, |sender, view, _| {
        sender.queue_dirty_word(view, (0, block), &dirty, 0).unwrap();
    });
    let expected = [
        (Kind::Data, 0, 1, 2),
        (Kind::Data, 0, 4, 1),
        (Kind::Data, FLAG_STRAY, 9, 1),
        (Kind::Zero, 0, 5, 1),
    ];
    assert_eq!(records, expected);
    assert_eq!((totals.data_pages, totals.zero_pages, totals.stray_pages), (4, 1, 1));
    assert_eq!((dirty.word(0), dirty.word(1)), (0, bits(&[6])), "the word is taken, and no other");
}

/// The destination waits for each of these pages.
#[test]
fn missing_pages_are_all_sent_and_discarded_ones_as_zero() {
    let job = guest();
    let block = &job.memory.blocks()[0];
    mark(&block.discarded, &[3, 4, 30]);
    mark(&block.stray, &[4]);
    let (records, totals) = sent(&job, |sender, view, _| {
        sender.queue_missing_pages(view, (0, block), 0, bits(&[2, 3, 4])).unwrap();
    });
    let expected =
        [(Kind::Data, 0, 2, 1), (Kind::Data, FLAG_STRAY, 4, 1), (Kind::Zero, FLAG_STRAY, 3, 1)];
    assert_eq!(records, expected);
    assert_eq!((totals.data_pages, totals.zero_pages, totals.stray_pages), (2, 1, 2));
}

#[test]
fn freed_dirty_pages_that_are_holes_are_sent_as_zero() {
    let job = guest();
    let block = &job.memory.blocks()[0];
    let freed = BlockRange { block: 0, offset: 70 * PAGE_SIZE, length: 4 * PAGE_SIZE };
    job.memory.free(&[freed]).unwrap();
    block.backing.write(71 * PAGE_SIZE, &[71; PAGE]).unwrap();
    mark(&block.discarded, &[73]);
    let dirty = MappedBitmap::private(128).unwrap();
    mark(&dirty, &[69, 70, 71, 72, 73]);
    let (records, totals) = sent(&job, |sender, view, _| {
        sender.send_known_holes(view, block, &dirty).unwrap();
    });
    assert_eq!(records, [(Kind::Zero, 0, 70, 1), (Kind::Zero, 0, 72, 1)]);
    assert_eq!(totals.zero_pages, 2);
}

/// Each write wakes the peer, so there should be one.
#[test]
fn without_a_limit_all_records_go_in_one_write() {
    let job = guest();
    // A socket of packets: each write is received by itself.
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let mut sender = PageSender::new(0, socket(ours), None);
    let limiter = Limiter::new(0);
    let view = SendContext { job: &job, limiter: &limiter, send_zeros: true, sent: None };
    sender.queue_missing_pages(&view, (0, &job.memory.blocks()[0]), 0, bits(&[2, 5, 8])).unwrap();
    sender.flush(&view).unwrap();
    sender.socket().end_sending();
    let mut buffer = vec![0; 1 << 20];
    let mut writes = || recv(&theirs, &mut buffer[..], RecvFlags::empty()).unwrap().1;
    assert_eq!((writes(), writes()), (3 * RECORD_SIZE + 2 * PAGE, 0));
}

#[test]
fn a_limit_splits_runs() {
    let split = |count, most| split_run(PageRange::new(7, count), most).collect::<Vec<_>>();
    assert_eq!(split(5, u64::MAX), [PageRange::new(7, 5)]);
    assert_eq!(split(5, 2), [PageRange::new(7, 2), PageRange::new(9, 2), PageRange::new(11, 1)]);
    assert_eq!(split(2, 1), [PageRange::new(7, 1), PageRange::new(8, 1)]);
}

#[test]
fn spread_moves_bits_to_their_places() {
    assert_eq!(spread(0b101, 0b1_0110_0000), 0b1_0010_0000);
    assert_eq!(spread(u64::MAX, u64::MAX), u64::MAX);
    assert_eq!(spread(0, u64::MAX), 0);
}
