// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A stock vhost-user front-end, the vhost crate, hands its memory over to an agent with standard
//! requests.

use pageferry_protocol::control::codec::Decoder;
use pageferry_protocol::control::job::JobStatus;
use pageferry_protocol::control::reply::{RangesReply, Reply, decode_reply};
use pageferry_protocol::control::request::{BlockRange, DISCARD_PUNCH, Request};
use pageferry_protocol::control::{Frame, FrameSocket, Trackers};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::in_process::InProcessAgent;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Error as UserError, Frontend, VhostUserFrontend};
use vhost::{Error, VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};

const SOON: Duration = Duration::from_secs(10);

/// A front-end with its agent. Fields drop in order, so the connection is closed before the drop
/// waits for the agent.
struct Stock {
    frontend: Frontend,
    /// The same connection, for pageferry's own requests between the front-end's.
    own: FrameSocket,
    _agent: InProcessAgent,
}

impl Stock {
    fn new(need_reply: bool) -> Self {
        let (agent, socket) = InProcessAgent::start().unwrap();
        let stream = UnixStream::from(socket);
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        let own = FrameSocket::from(OwnedFd::from(stream.try_clone().unwrap()));
        let mut frontend = Frontend::from_stream(stream, 2);
        let offered = frontend.get_features().unwrap();
        let wanted = VhostUserVirtioFeatures::LOG_ALL | VhostUserVirtioFeatures::PROTOCOL_FEATURES;
        assert_eq!(offered & wanted.bits(), wanted.bits(), "offered: {offered:#x}");
        frontend.set_features(wanted.bits()).unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        assert!(protocol.contains(wanted), "offered: {protocol:?}");
        frontend.set_protocol_features(wanted).unwrap();
        if need_reply {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_owner().unwrap();
        Self { frontend, own, _agent: agent }
    }

    fn answer(&mut self, request: &Request) -> Frame {
        self.own
            .send(&Frame::request(request.code(), request.encode()), Instant::now() + SOON)
            .unwrap();
        let reply = self.own.recv(Instant::now() + SOON).unwrap();
        assert!(reply.is_reply() && reply.request == request.code());
        reply
    }

    fn trackers(&mut self) -> Trackers {
        let reply = self.answer(&Request::QueryStatus);
        decode_reply(&reply.body, JobStatus::decode).unwrap().unwrap().trackers
    }

    fn ask(&mut self, request: &Request) -> Reply<u64> {
        let reply = self.answer(request);
        let pages = |decoder: &mut Decoder<'_>| {
            RangesReply::decode(decoder).map(|reply| reply.changed_pages)
        };
        decode_reply(&reply.body, pages).unwrap()
    }

    fn discard(&mut self, block: u32, first: u64, count: u64) -> Reply<u64> {
        self.ask(&Request::Discard {
            flags: DISCARD_PUNCH,
            ranges: vec![pages(block, first, count)],
        })
    }

    fn populate(&mut self, block: u32, first: u64, count: u64) -> Reply<u64> {
        self.ask(&Request::Populate { ranges: vec![pages(block, first, count)] })
    }
}

fn pages(block: u32, first: u64, count: u64) -> BlockRange {
    BlockRange { block, offset: first * PAGE_SIZE, length: count * PAGE_SIZE }
}

fn memfd(size: u64) -> OwnedFd {
    pageferry_tests::files::memfd(size).unwrap()
}

fn region(fd: &OwnedFd, gpa: u64, pages: u64, offset: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: pages * PAGE_SIZE,
        userspace_addr: gpa.wrapping_add(0x7f00_0000_0000),
        mmap_offset: offset,
        mmap_handle: fd.as_raw_fd(),
    }
}

/// True if the page at this offset of the file holds nothing.
fn is_hole(fd: &OwnedFd, offset: u64) -> bool {
    match rustix::fs::seek(fd, rustix::fs::SeekFrom::Data(offset)) {
        Ok(data) => data >= offset + PAGE_SIZE,
        Err(rustix::io::Errno::NXIO) => true,
        Err(errno) => panic!("seek: {errno}"),
    }
}

fn fill(fd: &OwnedFd, size: u64) {
    let bytes = vec![7; size as usize];
    assert_eq!(rustix::io::pwrite(fd, &bytes, 0).unwrap(), bytes.len());
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(outcome: Result<T, Error>) {
    match outcome {
        Err(Error::VhostUserProtocol(UserError::BackendInternalError)) => {}
        other => panic!("not refused by an answer: {other:?}"),
    }
}

/// All requests with which a front-end hands its memory over, and the use of that memory
/// afterwards.
fn hand_over(need_reply: bool) {
    let mut stock = Stock::new(need_reply);
    assert_eq!(stock.frontend.get_max_mem_slots().unwrap(), 509);
    let (low, high) = (memfd(0x40_000), memfd(0x40_000));
    fill(&low, 0x40_000);
    fill(&high, 0x40_000);
    let table = [region(&low, 0x10_000, 16, 0x3000), region(&high, 0x1_0000_0000, 8, 0)];
    assert!(stock.frontend.set_mem_table(&table).unwrap().is_none());
    let third = region(&high, 0x2_0000_0000, 4, 0x20_000);
    stock.frontend.add_mem_region(&third).unwrap();
    let log = memfd(0x10_000 + 0x80_000);
    let log_at = VhostUserDirtyLogRegion {
        mmap_size: 0x80_000,
        mmap_offset: 0x10_000,
        mmap_handle: log.as_raw_fd(),
    };
    stock.frontend.set_log_base(0, Some(log_at)).unwrap();

    // With VHOST_F_LOG_ALL a front-end makes its back-ends log. It does not cover vCPUs.
    assert_eq!(stock.trackers(), Trackers::default());
    let declared = Request::SetTrackers { sources: Trackers::LOG_IS_COMPLETE };
    assert!(stock.answer(&declared).body.iter().all(|byte| *byte == 0), "success");
    assert_eq!(stock.trackers(), Trackers::LOG_IS_COMPLETE);

    // The regions are at the right places: a discard frees exactly the right pages of the right
    // file.
    assert_eq!(stock.discard(0, 2, 3).unwrap(), 3);
    assert_eq!(stock.discard(2, 1, 1).unwrap(), 1);
    let holes =
        |fd: &OwnedFd| (0..0x40).filter(|page| is_hole(fd, page * PAGE_SIZE)).collect::<Vec<u64>>();
    assert_eq!(holes(&low), [3 + 2, 3 + 3, 3 + 4]);
    assert_eq!(holes(&high), [0x20 + 1]);

    // The log is at the right place, too: a populated page is marked at its guest address.
    assert_eq!(stock.populate(0, 2, 3).unwrap(), 3);
    let mut byte = [0];
    assert_eq!(rustix::io::pread(&log, &mut byte, 0x10_000 + (0x10 + 2) / 8).unwrap(), 1);
    assert_eq!(byte, [0b0001_1100]);

    stock.frontend.remove_mem_region(&third).unwrap();
    let refused = stock.discard(2, 0, 1).unwrap_err();
    assert!(refused.sentence.contains("block 2 does not exist"), "{refused}");
    assert_eq!(stock.discard(1, 0, 1).unwrap(), 1, "the other regions stay");

    // A second table replaces the first.
    stock.frontend.set_mem_table(&table[1..]).unwrap();
    assert!(stock.discard(1, 0, 1).is_err());
    assert_eq!(stock.discard(0, 7, 1).unwrap(), 1);
}

#[test]
fn a_front_end_with_acknowledgements_hands_memory_over() {
    hand_over(true);
}

#[test]
fn a_front_end_without_acknowledgements_hands_memory_over() {
    hand_over(false);
}

#[test]
fn a_request_for_a_virtqueue_is_refused_and_the_session_goes_on() {
    let mut stock = Stock::new(true);
    assert_refused(stock.frontend.set_vring_num(0, 128));
    assert_refused(stock.frontend.set_vring_base(1, 0));
    assert_refused(stock.frontend.set_vring_enable(0, true));
    let ram = memfd(0x10_000);
    stock.frontend.set_mem_table(&[region(&ram, 0, 16, 0)]).unwrap();
    assert_eq!(stock.discard(0, 0, 1).unwrap(), 1);
    assert_eq!(stock.frontend.get_max_mem_slots().unwrap(), 509);
}

#[test]
fn a_region_larger_than_its_file_is_refused() {
    let mut stock = Stock::new(true);
    let ram = memfd(0x10_000);
    stock.frontend.set_mem_table(&[region(&ram, 0, 15, 0x1000)]).unwrap();
    assert_refused(stock.frontend.add_mem_region(&region(&ram, 0x100_000, 16, 0x1000)));
    assert_refused(stock.frontend.set_mem_table(&[region(&ram, 0x100_000, 17, 0)]));
    assert_eq!(
        stock.discard(0, 14, 1).unwrap(),
        1,
        "a table that is refused leaves the one before in force"
    );
    stock.frontend.add_mem_region(&region(&ram, 0x100_000, 15, 0x1000)).unwrap();
    assert_eq!(stock.discard(1, 0, 15).unwrap(), 15);
}

#[test]
fn overlapping_and_unknown_regions_are_refused() {
    let mut stock = Stock::new(true);
    let ram = memfd(0x10_000);
    stock.frontend.set_mem_table(&[region(&ram, 0, 16, 0)]).unwrap();
    assert_refused(stock.frontend.add_mem_region(&region(&ram, 0xf000, 1, 0)));
    assert_refused(stock.frontend.remove_mem_region(&region(&ram, 0x1000, 16, 0)));
    assert_refused(stock.frontend.add_mem_region(&region(&ram, 0x10_800, 1, 0)));
    assert_refused(stock.frontend.add_mem_region(&region(&ram, u64::MAX - 0xfff, 16, 0)));
    assert_refused(stock.frontend.set_features(1 << 20));
    assert_eq!(stock.discard(0, 0, 16).unwrap(), 16);
    assert!(stock.discard(1, 0, 1).is_err());
}

#[test]
fn a_log_that_does_not_fit_is_refused_and_the_session_goes_on() {
    for need_reply in [true, false] {
        let mut stock = Stock::new(need_reply);
        let ram = memfd(0x10_000);
        stock.frontend.set_mem_table(&[region(&ram, 0, 16, 0)]).unwrap();
        let log = memfd(0x1000);
        let log_of = |mmap_size| VhostUserDirtyLogRegion {
            mmap_size,
            mmap_offset: 0,
            mmap_handle: log.as_raw_fd(),
        };
        // The reply is a log of size zero, which the front-end detects.
        match stock.frontend.set_log_base(0, Some(log_of(0x2000))) {
            Err(Error::VhostUserProtocol(UserError::InvalidMessage)) => {}
            other => panic!("not refused by an answer: {other:?}"),
        }
        // Without a file there is no log, and no reply that could be mistaken for another one.
        // (With acknowledgements there is a reply, but this front-end does not wait for it.)
        if !need_reply {
            stock.frontend.set_log_base(0x1000, None).unwrap();
        }
        assert_eq!(stock.frontend.get_max_mem_slots().unwrap(), 509);
        stock.frontend.set_log_base(0, Some(log_of(0x1000))).unwrap();
        assert_eq!(stock.discard(0, 0, 1).unwrap(), 1);
        assert_eq!(stock.populate(0, 0, 1).unwrap(), 1);
        let mut byte = [0];
        assert_eq!(rustix::io::pread(&log, &mut byte, 0).unwrap(), 1);
        assert_eq!(byte, [1]);
    }
}
