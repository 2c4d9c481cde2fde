// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Discard, free and populate: with an agent, without one, and with one that dies in between.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use pageferry_client::{
    BlockRange, BlockSpec, Config, Error, ErrorCode, JobStatus, MappedBitmap, PageRange, Punch,
};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::reply::AddBlockReply;
use pageferry_protocol::control::request::{DISCARD_PUNCH, MAX_RANGES, Request, code};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;
use support::*;

fn range(block: u32, first: u64, count: u64) -> BlockRange {
    BlockRange { block, offset: first * PAGE, length: count * PAGE }
}

#[test]
fn living_agent_discards_and_populates() {
    let (client, _hooks, agent) = client(|mut agent| {
        agent.accept_block();
        for (flags, answer) in [(DISCARD_PUNCH, 3), (0, 0)] {
            let (request, _) = agent.request().unwrap();
            assert_eq!(
                request,
                Request::Discard { flags, ranges: vec![range(1, 0, 2), range(1, 4, 1)] }
            );
            agent.changed(&request, answer);
        }
        let (request, _) = agent.request().unwrap();
        assert_eq!(request, Request::Populate { ranges: vec![range(1, 0, 1)] });
        agent.changed(&request, 1);
    });
    let memory = written(8);
    client.add_block(spec(1, 0, &memory)).unwrap();
    let ranges = [range(1, 0, 2), range(1, 4, 1)];
    assert_eq!(client.discard(&ranges, Punch::Yes).unwrap(), 3);
    assert_eq!(client.discard(&ranges, Punch::No).unwrap(), 0);
    assert_eq!(client.populate(&[range(1, 0, 1)]).unwrap(), 1);
    // This agent only claims that it discarded. The test shows that the client itself frees
    // nothing.
    assert_eq!(discarded(&client, 1), [0u64; 0]);
    assert_eq!(allocated_pages(&memory), 8);
    agent.join().unwrap();
}

#[test]
fn wrong_ranges_are_refused_before_anything_happens() {
    let (client, _hooks, agent) = client(|mut agent| {
        agent.accept_block();
        assert!(agent.request().is_none(), "the agent gets no request");
    });
    let memory = written(4);
    client.add_block(spec(1, 0, &memory)).unwrap();
    let wrapping = BlockRange { block: 1, offset: 4096, length: u64::MAX };
    for (ranges, unknown) in [
        ([range(1, 0, 1), range(3, 0, 1)], true),
        ([range(1, 0, 1), range(1, 4, 1)], false),
        ([range(1, 0, 1), wrapping], false),
    ] {
        for error in
            [client.discard(&ranges, Punch::Yes), client.populate(&ranges)].map(Result::unwrap_err)
        {
            let names_it = match error {
                Error::UnknownBlock { id } => unknown && id == 3,
                Error::Range { block, .. } => !unknown && block == 1,
                _ => false,
            };
            assert!(names_it, "{error:?}");
        }
    }
    drop(client);
    agent.join().unwrap();
}

#[test]
fn silent_agent_does_not_keep_a_discard_from_happening() {
    let (client, _hooks, agent) = client_with(impatient(), MAX_RANGES, |mut agent| {
        agent.accept_block();
        agent.request().unwrap();
        assert!(agent.request().is_none());
    });
    let memory = written(8);
    client.add_block(spec(1, 0, &memory)).unwrap();
    // A discard rounds inward: half a page at either end stays.
    let ragged = BlockRange { block: 1, offset: PAGE / 2, length: 3 * PAGE };
    assert_eq!(client.discard(&[ragged, range(1, 6, 2)], Punch::Yes).unwrap(), 4);
    assert_eq!(discarded(&client, 1), [1, 2, 6, 7]);
    assert_eq!(allocated_pages(&memory), 4);
    agent.join().unwrap();

    assert_lost(client.status());
    assert_eq!(client.discard(&[range(1, 0, 2)], Punch::No).unwrap(), 1);
    assert_eq!(allocated_pages(&memory), 4, "the client frees the pages");
    assert_eq!(discarded(&client, 1), [0, 1, 2, 6, 7]);
    assert_eq!(logged(&client), [0u64; 0], "a discard marks nothing as dirty");
}

#[test]
fn client_discards_the_rest_when_the_agent_closes() {
    let (client, _hooks, agent) = client_with(quiet(), 2, |mut agent| {
        agent.accept_block();
        let (request, _) = agent.request().unwrap();
        assert!(matches!(&request, Request::Discard { ranges, .. } if ranges.len() == 2));
        agent.changed(&request, 2);
        agent.request().unwrap();
    });
    let memory = written(8);
    client.add_block(spec(1, 0, &memory)).unwrap();
    let ranges: Vec<BlockRange> = (0..6).map(|first| range(1, first, 1)).collect();
    assert_eq!(client.discard(&ranges, Punch::Yes).unwrap(), 6);
    assert_eq!(discarded(&client, 1), [2, 3, 4, 5], "the first batch was acknowledged");
    assert_eq!(allocated_pages(&memory), 4);
    agent.join().unwrap();
}

#[test]
fn refused_discard_happens_all_the_same() {
    let (client, _hooks, agent) = client(|mut agent| {
        agent.accept_block();
        let (request, _) = agent.request().unwrap();
        agent.refuse(&request, ErrorCode::Other, "no");
    });
    let memory = written(2);
    client.add_block(spec(1, 0, &memory)).unwrap();
    assert_eq!(client.discard(&[range(1, 0, 1)], Punch::Yes).unwrap(), 1);
    assert_eq!((discarded(&client, 1), allocated_pages(&memory)), (vec![0], 1));
    agent.join().unwrap();
}

#[test]
fn offset_in_the_file_and_granularity_count() {
    let (client, _hooks, agent) = client(|mut agent| {
        agent.accept_block();
    });
    let memory = written(16);
    let (fd_offset, length, granularity) = (4 * PAGE, 10 * PAGE, 4 * PAGE);
    client
        .add_block(BlockSpec { fd_offset, length, granularity, ..spec(1, 0x100000, &memory) })
        .unwrap();
    agent.join().unwrap();
    // Pages 4 to 7 are a whole unit, and so is the rest at the end.
    assert_eq!(client.discard(&[range(1, 3, 7)], Punch::Yes).unwrap(), 6);
    assert_eq!(discarded(&client, 1), [4, 5, 6, 7, 8, 9]);
    let mut content = vec![0; 16 * PAGE as usize];
    assert_eq!(rustix::io::pread(&memory, &mut content, 0), Ok(16 * PAGE as usize));
    let holes: Vec<usize> = (0..16).filter(|page| content[page * PAGE as usize] == 0).collect();
    assert_eq!(holes, [8, 9, 10, 11, 12, 13]);

    // A populate rounds outward. The marks in the log tell the next agent of it.
    assert_eq!(client.populate(&[range(1, 5, 1)]).unwrap(), 4);
    assert_eq!(discarded(&client, 1), [8, 9]);
    assert_eq!(logged(&client), [0x104, 0x105, 0x106, 0x107]);
    assert_eq!(client.populate(&[range(1, 5, 1)]).unwrap(), 0, "a second populate does no harm");
}

#[test]
fn discard_that_cannot_free_is_no_error() {
    let (client, _hooks, agent) = client(|mut agent| {
        agent.accept_block();
    });
    let memory = memfd_create("sealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&memory, 2 * PAGE).unwrap();
    assert_eq!(rustix::io::pwrite(&memory, &[0x5a; 2 * PAGE as usize], 0), Ok(2 * PAGE as usize));
    rustix::fs::fcntl_add_seals(&memory, rustix::fs::SealFlags::WRITE).unwrap();
    client.add_block(spec(1, 0, &memory)).unwrap();
    agent.join().unwrap();
    assert_eq!(client.discard(&[range(1, 0, 1)], Punch::Yes).unwrap(), 1);
    assert_eq!((discarded(&client, 1), allocated_pages(&memory)), (vec![0], 2));
}

#[test]
fn busy_populate_surfaces_and_changes_nothing() {
    let (client, _hooks, agent) = client_with(quiet(), 2, |mut agent| {
        let (_, fds) = agent.accept_block();
        let bitmap = MappedBitmap::shared(fds[1].as_fd(), 8).unwrap();
        // The first batch populates, the second is refused, and the first one is undone.
        let (first, _) = agent.request().unwrap();
        bitmap.clear(PageRange::new(0, 2));
        agent.changed(&first, 2);
        let (second, _) = agent.request().unwrap();
        agent.refuse(&second, ErrorCode::Busy, "job 4 sends these pages");
        let (undo, _) = agent.request().unwrap();
        assert_eq!(undo, Request::Discard { flags: 0, ranges: vec![range(1, 1, 1)] });
        bitmap.set(PageRange::new(1, 1));
        agent.changed(&undo, 1);
    });
    let memory = written(8);
    client.add_block(spec(1, 0, &memory)).unwrap();
    client.discarded(1).unwrap().set(PageRange::new(1, 3));
    let ranges: Vec<BlockRange> = (0..4).map(|first| range(1, first, 1)).collect();
    match client.populate(&ranges) {
        Err(Error::Refused { code: ErrorCode::Busy, sentence }) => {
            assert!(sentence.contains("job 4"))
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(discarded(&client, 1), [1, 2, 3]);
    agent.join().unwrap();
}

/// Largest number of bytes that one request discards.
const MOST: u64 = 32 << 20;

/// A memfd of this many times [`MOST`] bytes. All of it is a hole.
fn sparse(times: u64) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, times * MOST).unwrap();
    fd
}

/// Plays an agent that answers discards with the right number of pages, and is dropped after `most`
/// requests. Returns the ranges of each request.
fn requests_until(agent: &mut FakeAgent, unit: u64, most: usize) -> Vec<Vec<(u64, u64)>> {
    let mut asked = Vec::new();
    while asked.len() < most
        && let Some((request, _)) = agent.request()
    {
        let Request::Discard { ranges, .. } = &request else { panic!("{request:?}") };
        let inward = |range: &BlockRange| {
            let (start, end) =
                (range.offset.next_multiple_of(unit), (range.offset + range.length) / unit * unit);
            end.saturating_sub(start) / PAGE
        };
        agent.changed(&request, ranges.iter().map(inward).sum());
        asked.push(ranges.iter().map(|range| (range.offset, range.length)).collect());
    }
    asked
}

#[test]
fn no_request_discards_more_than_can_be_saved_in_time() {
    const UNIT: u64 = 2 << 20;
    let ragged = BlockRange { block: 1, offset: MOST / 2 + 1, length: 2 * MOST + 5 };
    let small = |first: u64| BlockRange { block: 1, offset: 3 * MOST + first * UNIT, length: UNIT };
    let half = BlockRange { block: 1, offset: 2 * MOST + MOST / 4, length: MOST };
    let ranges = [small(0), ragged, small(2), small(3), half];
    let whole = (2 * MOST - UNIT) / PAGE;
    let expected = whole + 3 * UNIT / PAGE + MOST / PAGE;

    let (client, _hooks, agent) = client(|mut agent| {
        agent.accept_block();
        requests_until(&mut agent, UNIT, usize::MAX)
    });
    let memory = sparse(4);
    client.add_block(BlockSpec { granularity: UNIT, ..spec(1, 0, &memory) }).unwrap();
    assert_eq!(client.discard(&ranges, Punch::No).unwrap(), expected);
    drop(client);
    let asked = agent.join().unwrap();
    let flat: Vec<_> = asked.iter().flatten().copied().collect();
    let pieces = [
        (3 * MOST, UNIT),
        (MOST / 2 + 1, MOST / 2 - 1),
        (MOST, MOST),
        (2 * MOST, MOST / 2 + 6),
        (3 * MOST + 2 * UNIT, UNIT),
        (3 * MOST + 3 * UNIT, UNIT),
        // Not larger than one request, so it is not split.
        (2 * MOST + MOST / 4, MOST),
    ];
    assert_eq!(flat, pieces);
    assert_eq!(asked.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1, 3, 1]);
}

#[test]
fn large_discard_is_complete_also_when_the_agent_dies() {
    for answers in [0, 1, 2] {
        let (client, _hooks, agent) = client(move |mut agent| {
            agent.accept_block();
            requests_until(&mut agent, PAGE, answers);
        });
        let memory = sparse(4);
        client.add_block(spec(1, 0, &memory)).unwrap();
        let ragged = BlockRange { block: 1, offset: MOST / 2 + 1, length: 3 * MOST };
        assert_eq!(client.discard(&[ragged], Punch::Yes).unwrap(), 3 * MOST / PAGE - 1);
        let bitmap = client.discarded(1).unwrap();
        // This agent only claims that it discarded, and does not set the marks.
        let first = [MOST / 2 / PAGE + 1, MOST / PAGE, 2 * MOST / PAGE][answers];
        let end = (3 * MOST + MOST / 2) / PAGE;
        assert_eq!(
            bitmap.runs(bitmap.all()).collect::<Vec<_>>(),
            [PageRange::new(first, end - first)]
        );
        agent.join().unwrap();
    }
}

#[test]
fn unit_larger_than_a_request_is_not_cut() {
    let (client, _hooks, agent) = client(|mut agent| {
        agent.accept_block();
        requests_until(&mut agent, 2 * MOST, usize::MAX)
    });
    let memory = sparse(6);
    client.add_block(BlockSpec { granularity: 2 * MOST, ..spec(1, 0, &memory) }).unwrap();
    let range = BlockRange { block: 1, offset: PAGE, length: 6 * MOST - PAGE };
    assert_eq!(client.discard(&[range], Punch::No).unwrap(), 4 * MOST / PAGE);
    drop(client);
    let asked = agent.join().unwrap();
    assert_eq!(
        asked,
        [vec![(PAGE, 2 * MOST - PAGE)], vec![(2 * MOST, 2 * MOST)], vec![(4 * MOST, 2 * MOST)]]
    );
}

#[test]
fn large_discard_lets_other_requests_and_new_blocks_pass() {
    let (started, starts) = std::sync::mpsc::channel();
    let (client, _hooks, agent) = client_with(quiet(), 1, move |mut agent| {
        agent.accept_block();
        let mut seen = Vec::new();
        while let Some((request, _)) = agent.request() {
            match &request {
                Request::Discard { .. } => agent.changed(&request, 0),
                Request::QueryStatus => {
                    agent.reply(&request, &Ok(JobStatus::default()), JobStatus::encode)
                }
                Request::AddBlock { .. } => {
                    let added = AddBlockReply { host_page_size: 4096, sealed: 1 };
                    agent.reply(&request, &Ok(added), AddBlockReply::encode);
                }
                _ => agent.done(&request),
            }
            if seen.is_empty() {
                started.send(()).unwrap();
            }
            if seen.last() != Some(&request.code()) {
                seen.push(request.code());
            }
        }
        seen
    });
    let memory = written(8);
    client.add_block(spec(1, 0, &memory)).unwrap();
    let discarding = client.clone();
    let discard = std::thread::spawn(move || {
        discarding.discard(&vec![range(1, 0, 1); 100_000], Punch::No).unwrap()
    });
    starts.recv().unwrap();
    client.status().unwrap();
    client.remove_block(1).unwrap();
    client.add_block(spec(1, 0, &memory)).unwrap();
    discard.join().unwrap();
    client.cancel().unwrap();
    drop(client);
    let seen = agent.join().unwrap();
    let expected = [
        code::DISCARD,
        code::QUERY_STATUS,
        code::DISCARD,
        code::REMOVE_BLOCK,
        code::ADD_BLOCK,
        code::CANCEL,
    ];
    // The second discard may be missing, if both the query and the removal already waited.
    let without_it =
        [code::DISCARD, code::QUERY_STATUS, code::REMOVE_BLOCK, code::ADD_BLOCK, code::CANCEL];
    assert!(seen == expected || seen == without_it, "{seen:x?}");
}

#[test]
fn requests_shrink_with_the_request_timeout() {
    let hasty = Config { request_timeout: Duration::from_secs(1), ..quiet() };
    let (client, _hooks, agent) = client_with(hasty, MAX_RANGES, |mut agent| {
        agent.accept_block();
        requests_until(&mut agent, PAGE, usize::MAX)
    });
    let memory = sparse(1);
    client.add_block(spec(1, 0, &memory)).unwrap();
    assert_eq!(
        client.discard(&[BlockRange { block: 1, offset: 0, length: MOST }], Punch::No).unwrap(),
        MOST / PAGE
    );
    drop(client);
    let asked = agent.join().unwrap();
    assert_eq!(asked.len() as u64, MOST / (8 << 20));
}

#[test]
fn living_agent_frees_and_the_client_does_not() {
    let (client, _hooks, agent) = client(|mut agent| {
        agent.accept_block();
        let (request, _) = agent.request().unwrap();
        assert_eq!(request, Request::Free { ranges: vec![range(1, 0, 2), range(1, 4, 1)] });
        agent.changed(&request, 3);
    });
    let memory = written(8);
    client.add_block(spec(1, 0, &memory)).unwrap();
    assert_eq!(client.free(&[range(1, 0, 2), range(1, 4, 1)]).unwrap(), 3);
    assert!(discarded(&client, 1).is_empty() && logged(&client).is_empty());
    assert_eq!(allocated_pages(&memory), 8);
    agent.join().unwrap();
}

#[test]
fn free_without_an_agent_punches_and_marks_the_log() {
    let (client, _hooks, agent) = client_with(impatient(), MAX_RANGES, |mut agent| {
        agent.accept_block();
        // The agent does not answer this request.
        agent.request().unwrap();
        assert!(agent.request().is_none());
    });
    let memory = written(16);
    client.add_block(spec(1, 0x100000, &memory)).unwrap();
    assert!(matches!(client.free(&[range(2, 0, 1)]), Err(Error::UnknownBlock { id: 2 })));
    assert!(matches!(
        client.free(&[range(1, 0, 1), range(1, 16, 1)]),
        Err(Error::Range { block: 1, .. })
    ));
    assert_eq!(client.free(&[range(1, 0, 2)]).unwrap(), 2);
    agent.join().unwrap();
    assert_eq!(client.discard(&[range(1, 6, 2)], Punch::No).unwrap(), 2);
    // Half a page at either end stays, and discarded pages stay discarded.
    let ragged = BlockRange { block: 1, offset: 4 * PAGE + PAGE / 2, length: 5 * PAGE };
    assert_eq!(client.free(&[ragged]).unwrap(), 2);
    assert_eq!(discarded(&client, 1), [6, 7]);
    assert_eq!(logged(&client), [0x100, 0x101, 0x105, 0x108]);
    assert_eq!(allocated_pages(&memory), 10);
}

#[test]
fn populate_is_refused_as_gone_or_busy() {
    let (client, _hooks, agent) = client(|mut agent| {
        agent.accept_block();
        let mut refuse = |code| {
            let (request, _) = agent.request().unwrap();
            assert!(matches!(request, Request::Populate { .. }), "{request:?}");
            agent.refuse(&request, code, "why");
        };
        refuse(ErrorCode::Gone);
        refuse(ErrorCode::Busy);
        refuse(ErrorCode::Busy);
        refuse(ErrorCode::Busy);
        let (request, _) = agent.request().unwrap();
        agent.changed(&request, 1);
        agent
    });
    client.add_block(spec(1, 0, &written(4))).unwrap();
    let gone = client.populate_within(&[range(1, 0, 1)], LONG).unwrap_err();
    assert!(matches!(&gone, Error::GuestGone { sentence } if sentence == "why"), "{gone}");
    let busy = client.populate_within(&[range(1, 0, 1)], Duration::ZERO).unwrap_err();
    assert!(matches!(busy, Error::Refused { code: ErrorCode::Busy, .. }), "{busy}");
    assert_eq!(client.populate_within(&[range(1, 0, 1)], LONG).unwrap(), 1);
    drop(agent.join().unwrap());
}

#[test]
fn populate_of_a_relinquished_guest_is_always_refused() {
    let mut attached = Attached::new(Vmm::default());
    attached.add_block(0, 4);
    for hook in [Hook::Pause, Hook::Relinquish { session: [7; 16], release: false }] {
        assert_eq!(attached.hook(&hook), Ok(()), "{}", hook.name());
    }
    let (client, _vmm) = attached.lose_agent();
    let refused = || {
        let gone = client.populate(&[range(2, 0, 1)]).unwrap_err();
        assert!(matches!(gone, Error::GuestGone { .. }), "{gone}");
    };
    refused();
    let (ours, agents) = std::os::unix::net::UnixStream::pair().unwrap();
    let second = std::thread::spawn(move || {
        let mut agent = FakeAgent::shake_hands(agents.into(), MAX_RANGES);
        agent.accept_block();
        agent
    });
    let _hooks = client.reattach_socket(ours.into()).unwrap();
    let mut agent = second.join().unwrap();
    refused();
    let idle = std::thread::spawn(move || {
        let (request, _) = agent.request().expect("a query of the job's status");
        agent.reply(&request, &Ok(JobStatus::default()), JobStatus::encode);
    });
    client.take_by_force().unwrap();
    idle.join().unwrap();
    // That agent has ended now.
    client.populate(&[range(2, 0, 1)]).unwrap();
}
