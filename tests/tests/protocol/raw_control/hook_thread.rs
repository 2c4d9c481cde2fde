// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the small VMM answers hooks: with success, unless a test wants something else.

use super::bodies::Status;
use super::bytes::{Body, u32_at, u64_at};
use super::frames::{ANSWER, ASK, Frame, Frames};
use super::vmm::Ram;
use pageferry_protocol::userfault::{AddressRange, RegisterMode, Userfaultfd, feature};
use pageferry_tests::scenario::lock;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

/// Codes of hooks.
pub mod code {
    pub const PAUSE: u32 = 0x2000;
    pub const RESUME: u32 = 0x2001;
    pub const START_TRACKING: u32 = 0x2002;
    pub const STOP_TRACKING: u32 = 0x2003;
    pub const SYNC_TRACKER: u32 = 0x2004;
    pub const CLEAR_TRACKER: u32 = 0x2005;
    pub const THROTTLE: u32 = 0x2006;
    pub const SAVE_STATE: u32 = 0x2007;
    pub const LOAD_STATE: u32 = 0x2008;
    pub const RELINQUISH: u32 = 0x2009;
    pub const EVENT: u32 = 0x200a;
    pub const REGISTER_FAULTS: u32 = 0x200b;
    pub const UNREGISTER_FAULTS: u32 = 0x200c;
    pub const WATCH_WRITES: u32 = 0x200d;
    pub const UNWATCH_WRITES: u32 = 0x200e;
    pub const ACCEPT_GUEST: u32 = 0x200f;
    pub const PROBE_FAULTS: u32 = 0x2010;
    pub const EXPECT_GUEST: u32 = 0x2011;
    pub const CHECK_GUEST: u32 = 0x2012;
    pub const MEMORY_ARRIVED: u32 = 0x2014;
}

/// What a test wants instead of success.
#[derive(Debug, Clone)]
pub enum Instead {
    /// An error with this code and sentence.
    Error(u32, &'static str),
    /// These bytes after the sequence number, and no descriptor.
    Bytes(Vec<u8>),
    /// Success, after an answer with a number that is not that of the hook.
    AfterAnother,
    /// No answer.
    Silence,
}

/// What the hooks have done so far.
#[derive(Debug, Default)]
pub struct Hooked {
    /// The hooks in their order, but events: code and body.
    pub called: Vec<(u32, Vec<u8>)>,
    /// The status of each event.
    pub events: Vec<Status>,
    pub instead: BTreeMap<u32, Instead>,
    pub paused: bool,
    /// The bytes of all pieces of state that came.
    pub loaded: Vec<u8>,
    /// Pages that the VMM's own tracker reports.
    pub tracked: BTreeSet<u64>,
    /// Until it is throttled, the guest writes this many pages between two syncs.
    pub writes: u64,
    /// This VMM answers events, too, which nobody asked for.
    pub answers_events: bool,
    registered: Option<Userfaultfd>,
    /// The mappings while the agent scans them.
    scanned: Option<Userfaultfd>,
}

impl Hooked {
    pub fn codes(&self) -> Vec<u32> {
        self.called.iter().map(|(code, _)| *code).collect()
    }

    /// Ends a registration whose end was refused.
    pub fn forget_registration(&mut self) {
        self.registered = None;
    }

    /// The body of the last hook of this code.
    pub fn last(&self, code: u32) -> Vec<u8> {
        let mut called = self.called.iter().rev();
        called.find(|(called, _)| *called == code).expect("the hook was not called").1.clone()
    }
}

/// The state of this VMM: the names of its pieces, and their bytes.
pub const STATE: [(&str, &[u8]); 3] = [("vcpu", b"hello"), ("none", b""), ("disk", b"abc")];

/// Answers hooks until the connection ends.
pub fn run(socket: &Frames, ram: &Ram, hooked: &Mutex<Hooked>) {
    let mut last = 0;
    while let Some(frame) = socket.receive() {
        assert_eq!(frame.flags, ASK, "{:#x}", frame.code);
        let sequence = u64_at(&frame.body, 0);
        assert!(sequence > last, "{sequence} after {last}");
        last = sequence;
        if frame.code == code::EVENT {
            let mut hooked = lock(hooked);
            hooked.events.push(Status::read(&frame.body[8..]));
            if hooked.answers_events {
                socket.send(frame.code, ANSWER, &Body::new().u64(sequence).u32(0).0, &[]);
            }
            continue;
        }
        let instead = {
            let mut hooked = lock(hooked);
            hooked.called.push((frame.code, frame.body.clone()));
            hooked.instead.get(&frame.code).cloned()
        };
        let answer = |number: u64, bytes: &[u8], fds: &[BorrowedFd<'_>]| {
            socket.send(frame.code, ANSWER, &Body::new().u64(number).raw(bytes).0, fds);
        };
        match instead {
            Some(Instead::Error(code, sentence)) => {
                answer(sequence, &Body::new().u32(code).text(sentence).0, &[]);
            }
            Some(Instead::Bytes(bytes)) => answer(sequence, &bytes, &[]),
            Some(Instead::Silence) => {}
            Some(Instead::AfterAnother) => {
                answer(sequence - 1, &Body::new().u32(8).text("of another").0, &[]);
                succeed(&frame, ram, hooked, answer);
            }
            None => succeed(&frame, ram, hooked, answer),
        }
    }
}

/// Does what the hook asks for, and answers.
fn succeed(
    frame: &Frame, ram: &Ram, hooked: &Mutex<Hooked>,
    answer: impl Fn(u64, &[u8], &[BorrowedFd<'_>]),
) {
    let (sequence, body) = (u64_at(&frame.body, 0), &frame.body);
    let success = Body::new().u32(0).0;
    let expected_fds = usize::from(frame.code == code::LOAD_STATE);
    assert_eq!(frame.fds.len(), expected_fds, "{:#x}", frame.code);
    match frame.code {
        code::SAVE_STATE => {
            let (list, file) = saved();
            // The result, the run state, and the list.
            let bytes = Body::new().u32(0).u32(0).raw(&list).0;
            return answer(sequence, &bytes, &[file.as_fd()]);
        }
        code::REGISTER_FAULTS => {
            let features = feature::MISSING_SHMEM | feature::MISSING_HUGETLBFS | feature::POISON;
            let uffd = register(ram, features, RegisterMode::Missing);
            answer(sequence, &success, &[uffd.as_fd()]);
            lock(hooked).registered = Some(uffd);
            return;
        }
        code::WATCH_WRITES => {
            let features = feature::WP_HUGETLBFS_SHMEM | feature::WP_UNPOPULATED;
            let uffd = register(ram, features, RegisterMode::WriteProtect);
            answer(sequence, &success, &[uffd.as_fd()]);
            lock(hooked).registered = Some(uffd);
            return;
        }
        code::PROBE_FAULTS => {
            let features = feature::MISSING_SHMEM | feature::MISSING_HUGETLBFS | feature::POISON;
            unregister(ram, &register(ram, features, RegisterMode::Missing));
        }
        code::UNREGISTER_FAULTS | code::UNWATCH_WRITES => {
            if let Some(uffd) = lock(hooked).registered.take() {
                unregister(ram, &uffd);
            }
        }
        code::PAUSE => lock(hooked).paused = true,
        code::RESUME => lock(hooked).paused = u32_at(body, 12) == 1,
        code::LOAD_STATE => {
            assert_eq!(body[8..], saved().0, "the list of the pieces");
            let mut bytes = vec![0; STATE.iter().map(|(_, bytes)| bytes.len()).sum()];
            File::from(frame.fds[0].try_clone().unwrap()).read_exact_at(&mut bytes, 0).unwrap();
            lock(hooked).loaded = bytes;
        }
        code::SYNC_TRACKER => {
            let mut hooked = lock(hooked);
            let written = 0..hooked.writes;
            hooked.tracked.extend(written);
            hooked.tracked.iter().for_each(|page| ram.mark(*page));
        }
        code::CLEAR_TRACKER => {
            let (block, words, first) = (u32_at(body, 8), u32_at(body, 12), u64_at(body, 16));
            assert_eq!((block, body.len()), (1, 24 + 8 * words as usize));
            let is_set = |page: u64| {
                let bit = page.checked_sub(first).filter(|bit| *bit < 64 * u64::from(words));
                bit.is_some_and(|bit| {
                    u64_at(body, 24 + 8 * (bit / 64) as usize) >> (bit % 64) & 1 == 1
                })
            };
            lock(hooked).tracked.retain(|page| !is_set(*page));
        }
        code::THROTTLE if u32_at(body, 8) > 0 => lock(hooked).writes = 0,
        code::THROTTLE => {}
        // Bit 0, the VMM's own tracker, is always on here.
        code::START_TRACKING if u32_at(body, 8) & 2 != 0 => {
            let features =
                feature::WP_HUGETLBFS_SHMEM | feature::WP_UNPOPULATED | feature::WP_ASYNC;
            let uffd = register(ram, features, RegisterMode::WriteProtect);
            lock(hooked).scanned = Some(uffd);
        }
        code::STOP_TRACKING if u32_at(body, 8) & 2 != 0 => {
            if let Some(uffd) = lock(hooked).scanned.take() {
                unregister(ram, &uffd);
            }
        }
        code::START_TRACKING | code::STOP_TRACKING => {}
        code::RELINQUISH | code::MEMORY_ARRIVED => {}
        code::EXPECT_GUEST | code::CHECK_GUEST | code::ACCEPT_GUEST => {}
        other => panic!("hook {other:#x} is not in the document"),
    }
    answer(sequence, &success, &[]);
}

/// The list of the pieces, and the file with their bytes.
fn saved() -> (Vec<u8>, File) {
    let mut file = tempfile::tempfile().unwrap();
    let mut list = Body::new().u32(STATE.len() as u32);
    for (name, bytes) in STATE {
        list = list.u64(bytes.len() as u64).text(name);
        file.write_all(bytes).unwrap();
    }
    file.rewind().unwrap();
    (list.0, file)
}

fn register(ram: &Ram, features: u64, mode: RegisterMode) -> Userfaultfd {
    let uffd = Userfaultfd::open(features).unwrap();
    uffd.register(range(ram), mode).unwrap();
    uffd
}

fn unregister(ram: &Ram, uffd: &Userfaultfd) {
    uffd.unregister(range(ram)).unwrap();
}

fn range(ram: &Ram) -> AddressRange {
    AddressRange { start: ram.address(), length: ram.length() }
}

/// The thread that answers hooks, and its state.
#[derive(Debug)]
pub struct HookThread {
    pub hooked: Arc<Mutex<Hooked>>,
    socket: Frames,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl HookThread {
    /// Answers the hooks that come on `socket`.
    pub fn start(socket: Frames, ram: Arc<Ram>) -> Self {
        let hooked = Arc::<Mutex<Hooked>>::default();
        let (theirs, ours) = (Arc::clone(&hooked), socket.again());
        let thread = std::thread::spawn(move || run(&ours, &ram, &theirs));
        Self { hooked, socket, thread: Some(thread) }
    }
}

impl HookThread {
    /// Our end of the channel.
    pub fn socket(&self) -> &Frames {
        &self.socket
    }
}

impl Drop for HookThread {
    fn drop(&mut self) {
        self.socket.shut_down();
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        // Not while another panic is under way: that one is the reason.
        if !std::thread::panicking() {
            assert!(!matches!(ended, Some(Err(_))), "a hook panicked");
        }
    }
}

/// Both ends of a hook channel: ours, and the agent's.
pub fn hook_pair() -> (Frames, OwnedFd) {
    let (ours, agents) = std::os::unix::net::UnixStream::pair().unwrap();
    (Frames::new(ours), agents.into())
}
