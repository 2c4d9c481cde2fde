// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory of the vm-memory crate: its regions as blocks, and its writes in the dirty log.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(feature = "vm-memory")]

mod support;

use pageferry_client::{Client, Error, HookChannel, LogBitmap};
use pageferry_protocol::control::request::Request;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use support::*;
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory,
};

const LOW: u64 = 0x10_0000;
const HIGH: u64 = 0x40_0000;

/// Two regions in one file. Neither is at its start or at guest address zero.
fn memory<B: NewBitmap>(file: &OwnedFd) -> GuestMemoryMmap<B> {
    let at = |offset| Some(FileOffset::new(file.try_clone().unwrap().into(), offset));
    let pages = |count: usize| count * 4096;
    let ranges = [
        (GuestAddress(HIGH), pages(5), at(8 * PAGE)),
        (GuestAddress(LOW), pages(70), at(13 * PAGE)),
    ];
    GuestMemoryMmap::from_ranges_with_files(sorted(ranges)).unwrap()
}

/// vm-memory requires its regions in order.
fn sorted(
    mut ranges: [(GuestAddress, usize, Option<FileOffset>); 2],
) -> [(GuestAddress, usize, Option<FileOffset>); 2] {
    ranges.sort_by_key(|(address, ..)| *address);
    ranges
}

fn added() -> (Client, HookChannel, GuestMemoryMmap<LogBitmap>) {
    let (client, hooks, agent) = client(|mut agent| {
        agent.accept_block();
        agent.accept_block();
        agent
    });
    let memory = memory::<LogBitmap>(&written(100));
    memory.write_obj(1u64, GuestAddress(LOW)).unwrap();
    assert_eq!(client.add_guest_memory(&memory).unwrap(), [0, 1]);
    assert_eq!(logged(&client), [0u64; 0], "earlier writes are in pass 0 and not in the log");
    agent.join().unwrap();
    (client, hooks, memory)
}

#[test]
fn regions_are_blocks_in_order_of_their_address() {
    let (client, _hooks, agent) =
        client(|mut agent| [agent.accept_block().0, agent.accept_block().0]);
    let memory = memory::<()>(&written(100));
    assert_eq!(client.add_guest_memory(&memory).unwrap(), [0, 1]);
    let places = agent.join().unwrap().map(|request| match request {
        Request::AddBlock { geometry, fd_offset, vmm_address, flags } => {
            assert!(vmm_address != 0 && flags == 0 && geometry.granularity == PAGE);
            (geometry.id, geometry.name, geometry.gpa, geometry.length / PAGE, fd_offset / PAGE)
        }
        other => panic!("{other:?}"),
    });
    let low = (0, "ram@0x100000".to_owned(), LOW, 70, 13);
    let high = (1, "ram@0x400000".to_owned(), HIGH, 5, 8);
    assert_eq!(places, [low, high]);
    assert_eq!(client.discarded(1).unwrap().pages(), 5);
}

#[test]
fn write_marks_the_pages_it_touches_and_no_other() {
    let (client, _hooks, memory) = added();
    let mut expected = Vec::new();
    let mut check = |pages: &[u64]| {
        expected.extend_from_slice(pages);
        expected.sort_unstable();
        expected.dedup();
        assert_eq!(logged(&client), expected);
    };
    memory.write_obj(1u8, GuestAddress(LOW + 3 * PAGE + 5)).unwrap();
    check(&[0x103]);
    memory.write_slice(&[1; 4097], GuestAddress(HIGH + 2 * PAGE - 1)).unwrap();
    check(&[0x401, 0x402]);
    // 66 pages, in two words of the log.
    memory.write_slice(&vec![1; 66 * 4096], GuestAddress(LOW + 4 * PAGE)).unwrap();
    check(&(0x104..0x146).collect::<Vec<_>>());
    memory.store(7u32, GuestAddress(HIGH + 4 * PAGE + 8), Ordering::Relaxed).unwrap();
    check(&[0x404]);
    memory.read_obj::<u64>(GuestAddress(HIGH)).unwrap();
    check(&[]);
}

#[test]
fn slices_of_slices_mark_at_their_place() {
    let (client, _hooks, memory) = added();
    let slice = memory.get_slice(GuestAddress(HIGH + PAGE - 8), 3 * 4096).unwrap();
    let inner = slice.subslice(4096, 4096).unwrap();
    // From 8 bytes before the end of page 1: the first 8 bytes lie in it, the ninth in page 2.
    inner.write_obj(1u8, 7).unwrap();
    assert_eq!(logged(&client), [0x401]);
    inner.get_slice(8, 100).unwrap().write_obj(1u8, 0).unwrap();
    assert_eq!(logged(&client), [0x401, 0x402]);
    assert!(inner.bitmap().dirty_at(0) && inner.bitmap().dirty_at(8));
    assert!(!slice.bitmap().dirty_at(0));
}

#[test]
fn mark_never_reaches_past_its_region() {
    let (client, _hooks, memory) = added();
    let region = memory.find_region(GuestAddress(HIGH)).unwrap();
    let mapping = region.get_mmap();
    mapping.bitmap().mark_dirty(4 * 4096 + 1, usize::MAX);
    mapping.bitmap().mark_dirty(5 * 4096, 1);
    mapping.bitmap().mark_dirty(usize::MAX, 1);
    mapping.bitmap().mark_dirty(0, 0);
    mapping.bitmap().slice_at(usize::MAX).mark_dirty(usize::MAX, 9);
    assert_eq!(logged(&client), [0x404]);
}

#[test]
fn region_belongs_to_one_log() {
    let (_first, _hooks, memory) = added();
    let (second, _hooks, agent) = client(|mut agent| assert!(agent.request().is_none()));
    assert!(matches!(second.add_guest_memory(&memory), Err(Error::BitmapAttached { gpa: LOW })));
    drop(second);
    agent.join().unwrap();
}

#[test]
fn anonymous_memory_is_refused_before_any_block_is_added() {
    let (client, _hooks, agent) = client(|mut agent| assert!(agent.request().is_none()));
    let file = FileOffset::new(written(1).into(), 0);
    let ranges = [(GuestAddress(LOW), 4096, Some(file)), (GuestAddress(HIGH), 8192, None)];
    let memory = GuestMemoryMmap::<LogBitmap>::from_ranges_with_files(ranges).unwrap();
    let error = client.add_guest_memory(&memory).unwrap_err();
    assert!(matches!(error, Error::RegionWithoutFile { gpa: HIGH, length: 8192 }), "{error}");
    assert!(client.discarded(0).is_none());
    drop(client);
    agent.join().unwrap();
}
