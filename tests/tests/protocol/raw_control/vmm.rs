// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A small VMM: its memory, the files that it shares with its agent, and its requests.

use super::bodies::{self, PAGE, Status};
use super::bytes::{Body, last_text_at, u32_at};
use super::frames::{ANSWER, ASK, Frame, Frames};
use super::hook_thread::{HookThread, Hooked, hook_pair};
use pageferry_tests::deadline::wait_for;
use pageferry_tests::files::memfd;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::scenario::{SOON, lock};
use rustix::fs::{MemfdFlags, SealFlags};
use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// Pages of guest memory.
pub const PAGES: u64 = 64;

/// Codes of requests.
pub mod code {
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const HELLO: u32 = 0x1000;
    pub const ADD_BLOCK: u32 = 0x1001;
    pub const REMOVE_BLOCK: u32 = 0x1002;
    pub const DISCARD: u32 = 0x1003;
    pub const POPULATE: u32 = 0x1004;
    pub const SET_TRACKERS: u32 = 0x1005;
    pub const FREE: u32 = 0x1008;
    pub const START_OUTGOING: u32 = 0x1010;
    pub const START_INCOMING: u32 = 0x1011;
    pub const CANCEL: u32 = 0x1012;
    pub const SET_PARAMETERS: u32 = 0x1013;
    pub const QUERY_STATUS: u32 = 0x1014;
    pub const SUBSCRIBE: u32 = 0x1015;
    pub const RESUME: u32 = 0x1016;
    pub const START_POSTCOPY: u32 = 0x1017;
    pub const RECOVER: u32 = 0x1018;
    pub const START_SNAPSHOT: u32 = 0x1019;
    pub const START_RESTORE: u32 = 0x101a;
    pub const QUERY_AGENT: u32 = 0x101b;
    pub const BALLOON: u32 = 0x101c;
    pub const PLUGGED_MEMORY: u32 = 0x101d;
    pub const CONNECT_DEVICE: u32 = 0x101e;
    pub const CONTINUE: u32 = 0x101f;
    pub const UPGRADE: u32 = 0x1020;
    pub const GRANT: u32 = 0x1021;
    pub const OPEN_BASE: u32 = 0x1022;
    pub const EVENT: u32 = 0x1100;
}

/// An agent process, and a folder for its files.
pub struct Host {
    agent: AgentProcess,
    pub folder: tempfile::TempDir,
}

impl Host {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
        Self { agent, folder }
    }

    /// A connection, which counts as an operator's until it hands over memory.
    pub fn connect(&self) -> Frames {
        Frames::new(UnixStream::connect(self.agent.socket()).unwrap())
    }

    /// Kills the agent at once.
    pub fn kill(&mut self) {
        self.agent.process().kill().unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// A refusal: its code and its sentence.
pub type Answer = Result<Vec<u8>, (u32, String)>;

/// Sends a native request, and returns what follows the result in its answer, with descriptors.
pub fn ask_frame(
    control: &Frames, request: u32, body: &Body, fds: &[BorrowedFd<'_>],
) -> Result<(Vec<u8>, Vec<OwnedFd>), (u32, String)> {
    control.send(request, ASK, &body.0, fds);
    let answer = loop {
        let frame = control.receive().expect("the agent closed the connection");
        // A subscriber gets them between an answer and the next.
        if (frame.code, frame.flags) != (code::EVENT, ASK) {
            break frame;
        }
    };
    let Frame { body, fds, .. } = answer;
    assert_eq!((answer.code, answer.flags), (request, ANSWER));
    match u32_at(&body, 0) {
        0 => Ok((body[4..].to_vec(), fds)),
        error => Err((error, last_text_at(&body, 4))),
    }
}

/// What an agent in a sandbox needs to connect to the address, or to use the file.
fn grant_for(address: &str) -> Option<OwnedFd> {
    if let Some(address) = address.strip_prefix("tcp:") {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(address).unwrap();
        return Some(socket.into());
    }
    let path = Path::new(address.strip_prefix("unix:").unwrap_or(address));
    Some(File::open(path.parent()?).ok()?.into())
}

pub fn ask(control: &Frames, code: u32, body: &Body, fds: &[BorrowedFd<'_>]) -> Answer {
    ask_frame(control, code, body, fds).map(|(body, _)| body)
}

/// The status of the last job, as anybody may ask.
pub fn status(control: &Frames) -> Status {
    Status::read(&ask(control, code::QUERY_STATUS, &Body::new(), &[]).unwrap())
}

/// Guest memory at guest address 0, with the dirty log and the discard bitmap.
#[derive(Debug)]
pub struct Ram {
    pub file: OwnedFd,
    mapping: MmapRegion<()>,
    pub log: OwnedFd,
    log_words: MmapRegion<()>,
    pub discards: OwnedFd,
    discard_words: MmapRegion<()>,
}

fn map(file: &OwnedFd, length: u64) -> MmapRegion<()> {
    let file = File::from(file.try_clone().unwrap());
    MmapRegion::from_file(FileOffset::new(file, 0), length as usize).unwrap()
}

fn word(words: &MmapRegion<()>, index: u64) -> &AtomicU64 {
    words.get_atomic_ref::<AtomicU64>(index as usize * 8).unwrap()
}

impl Ram {
    pub fn new() -> Self {
        let (file, log, discards) = (memfd(PAGES * PAGE), memfd(PAGE), memfd(PAGES / 8));
        let (file, log, discards) = (file.unwrap(), log.unwrap(), discards.unwrap());
        let mapping = map(&file, PAGES * PAGE);
        let (log_words, discard_words) = (map(&log, PAGE), map(&discards, PAGES / 8));
        Self { file, mapping, log, log_words, discards, discard_words }
    }

    pub fn address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    pub fn length(&self) -> u64 {
        PAGES * PAGE
    }

    /// A device writes a page, and then marks it.
    pub fn write(&self, page: u64, byte: u8) {
        let file = File::from(self.file.try_clone().unwrap());
        file.write_all_at(&[byte; PAGE as usize], page * PAGE).unwrap();
        self.mark(page);
    }

    /// Marks a page of the guest in the dirty log.
    pub fn mark(&self, page: u64) {
        word(&self.log_words, page / 64).fetch_or(1 << (page % 64), Ordering::Release);
    }

    pub fn is_marked(&self, page: u64) -> bool {
        word(&self.log_words, page / 64).load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    pub fn is_discarded(&self, page: u64) -> bool {
        word(&self.discard_words, page / 64).load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    /// Bytes of the file that are allocated, as the pages that begin with something else than zero.
    pub fn pages(&self) -> Vec<u8> {
        let file = File::from(self.file.try_clone().unwrap());
        let mut first = [0];
        (0..PAGES)
            .map(|page| file.read_exact_at(&mut first, page * PAGE).map(|()| first[0]).unwrap())
            .collect()
    }

    /// Writes a page as a vCPU does, which marks nothing.
    pub fn store(&self, page: u64, byte: u8) {
        let offset = (page * PAGE) as usize;
        let word = self.mapping.get_atomic_ref::<AtomicU64>(offset).unwrap();
        word.store(byte.into(), Ordering::Relaxed);
    }

    /// Reads the first byte of a page as a vCPU does, which waits if the page is missing.
    pub fn touch(&self, page: u64) -> u8 {
        let offset = (page * PAGE) as usize;
        self.mapping.get_atomic_ref::<AtomicU64>(offset).unwrap().load(Ordering::Relaxed) as u8
    }
}

/// The fence word of a VMM, and its file.
pub struct Fence {
    pub file: OwnedFd,
    word: MmapRegion<()>,
}

impl Fence {
    pub fn new() -> Self {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("fence", flags).unwrap();
        rustix::fs::ftruncate(&file, PAGE).unwrap();
        let word = map(&file, PAGE);
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
        Self { file, word }
    }

    pub fn admit(&self, number: u64) {
        word(&self.word, 0).store(number, Ordering::SeqCst);
    }
}

/// A VMM that is attached to an agent.
pub struct Vmm {
    pub control: Frames,
    pub ram: Arc<Ram>,
    /// Kept, because the agent acts only while its number is in it.
    _fence: Fence,
    hooks: HookThread,
}

/// The body of a HELLO that offers version 1, with the fence as agent `number`.
pub fn hello(number: u64) -> Body {
    Body::new().u16(1).u16(1).u32(0).u64(1).u64(number).text("")
}

impl Vmm {
    /// Hands over everything but the trackers.
    pub fn attach(host: &Host) -> Self {
        Self::attach_with(host, Arc::new(Ram::new()), 1)
    }

    /// The same, with this memory, as agent `number` of the VMM.
    pub fn attach_with(host: &Host, ram: Arc<Ram>, number: u64) -> Self {
        let (control, fence) = (host.connect(), Fence::new());
        // The VMM before may not have left yet: its connection has ended, but not its job.
        let (_, pidfd) =
            ask_frame(&control, code::HELLO, &hello(number), &[fence.file.as_fd()]).unwrap();
        assert_eq!(pidfd.len(), 1, "a pidfd");
        fence.admit(number);
        let log = Body::new().u64(PAGE).u64(0);
        control.send(code::SET_LOG_BASE, ASK, &log.0, &[ram.log.as_fd()]);
        let answer = control.receive().unwrap();
        assert_eq!((answer.code, answer.flags, answer.body), (6, ANSWER, log.0));
        let (hooks, agents) = hook_pair();
        // Bit 3 asks for an answer.
        control.send(code::SET_BACKEND_REQ_FD, ASK | 8, &[], &[agents.as_fd()]);
        let answer = control.receive().unwrap();
        assert_eq!((answer.code, answer.flags, answer.body), (21, ANSWER, vec![0; 8]));
        let vmm =
            Self { control, hooks: HookThread::start(hooks, Arc::clone(&ram)), ram, _fence: fence };
        let fds = [vmm.ram.file.as_fd(), vmm.ram.discards.as_fd()];
        let block = bodies::block(1, 0, PAGES, vmm.ram.address(), "ram");
        let answer = vmm.ask(code::ADD_BLOCK, &block, &fds).unwrap();
        // A memfd has pages of 4096 bytes, and this one is sealed.
        assert_eq!(answer, Body::new().u64(4096).u32(1).0);
        vmm
    }

    /// The same, with a guest whose every writer marks the log. Pages 1 to 4 are written.
    pub fn with_guest(host: &Host) -> Self {
        let vmm = Self::attach(host);
        vmm.track(4);
        (1..5).for_each(|page| vmm.ram.write(page, page as u8));
        vmm
    }

    /// Declares trackers that need no descriptor.
    pub fn track(&self, sources: u32) {
        self.does(code::SET_TRACKERS, &Body::new().u32(sources));
    }

    pub fn ask(&self, code: u32, body: &Body, fds: &[BorrowedFd<'_>]) -> Answer {
        ask(&self.control, code, body, fds)
    }

    /// The same, for a request whose answer is the result alone.
    pub fn does(&self, code: u32, body: &Body) {
        assert!(self.ask(code, body, &[]).unwrap().is_empty());
    }

    /// Starts a job. Returns its number, and the address in the answer.
    pub fn start(&self, code: u32, body: &Body, fds: &[BorrowedFd<'_>]) -> (u64, String) {
        // The session comes before the address.
        let at = if code == code::RECOVER { 16 } else { 0 };
        let text = super::bytes::text_at(&body.0, at);
        // To listen at an address of the network needs no grant.
        let needs = code != code::START_INCOMING || !text.starts_with("tcp:");
        if let Some(grant) = needs.then(|| grant_for(&text)).flatten() {
            self.ask(code::GRANT, &Body::new(), &[grant.as_fd()]).unwrap();
        }
        let answer = self.ask(code, body, fds).unwrap();
        (super::bytes::u64_at(&answer, 0), last_text_at(&answer, 8))
    }

    pub fn status(&self) -> Status {
        status(&self.control)
    }

    /// Waits until the last job is in this phase.
    pub fn wait_for_phase(&self, phase: u32) -> Status {
        let found = || Some(self.status()).filter(|status| status.phase == phase);
        wait_for("the phase", SOON, found).unwrap_or_else(|_| panic!("{:?}", self.status()))
    }

    /// Waits until an event on the hook socket has named this phase.
    pub fn wait_for_event(&self, phase: u32) -> Status {
        let found = || self.hooked().events.iter().find(|event| event.phase == phase).cloned();
        wait_for("the event", SOON, found).unwrap()
    }

    /// Waits for the end of the last job.
    pub fn end(&self) -> Status {
        wait_for("the end", SOON, || Some(self.status()).filter(Status::is_final)).unwrap()
    }

    /// Our end of the hook channel, which the thread reads.
    pub fn hook_socket(&self) -> &Frames {
        self.hooks.socket()
    }

    /// What the hooks have done.
    pub fn hooked(&self) -> MutexGuard<'_, Hooked> {
        lock(&self.hooks.hooked)
    }

    /// True while a hook has paused the guest.
    pub fn paused(&self) -> bool {
        self.hooked().paused
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.control.shut_down();
    }
}
