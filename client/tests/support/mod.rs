// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A fake agent: the other end of a client's sockets, played by the test.
#![allow(dead_code, unused_imports, reason = "each test file uses its part")]

mod recorder;

pub(crate) use recorder::{Attached, Vmm, attach_next, connected, queue};

use pageferry_client::{BlockSpec, Client, Config, Error, HookChannel, PageRange};
use pageferry_protocol::control::codec::Encoder;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::hook_reply::{decode_hook_reply, reply_sequence};
use pageferry_protocol::control::reply::{
    AddBlockReply, ErrorCode, HelloReply, JobStarted, RangesReply, RemoteError, Reply, encode_reply,
};
use pageferry_protocol::control::request::{FEATURE_FENCE, FEATURES, MAX_RANGES, Request};
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use pageferry_protocol::shm::FenceView;
use pageferry_protocol::userfault::{Userfaultfd, feature};
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub(crate) const PAGE: u64 = 4096;

/// Timeout for anything that must happen.
pub(crate) const LONG: Duration = Duration::from_secs(10);

pub(crate) fn soon() -> Instant {
    Instant::now() + LONG
}

/// The agent's side of a connection after the handshake.
pub(crate) struct FakeAgent {
    pub(crate) control: FrameSocket,
    pub(crate) hooks: FrameSocket,
    pub(crate) log: OwnedFd,
    pub(crate) fence: FenceView,
    next: u64,
}

/// The answer of an agent of an older version, which knows of no owed pages.
pub(crate) fn hello_reply(max_ranges: usize) -> Vec<u8> {
    let reply = HelloReply {
        version: 1,
        features: FEATURE_FENCE,
        max_body: 1 << 20,
        max_ranges: max_ranges as u32,
        pid: 1,
    };
    encode_reply(&Ok(reply), HelloReply::encode)
}

/// A pidfd of this process, which is also the fake agent's process.
pub(crate) fn own_process() -> OwnedFd {
    pidfd_open(getpid(), PidfdFlags::empty()).unwrap()
}

impl FakeAgent {
    /// Plays the handshake.
    pub(crate) fn shake_hands(socket: OwnedFd, max_ranges: usize) -> Self {
        Self::shake_hands_as(socket, max_ranges, own_process())
    }

    /// Plays the handshake, with `process` as the agent's pidfd.
    pub(crate) fn shake_hands_as(socket: OwnedFd, max_ranges: usize, process: OwnedFd) -> Self {
        let (control, fence) = Self::say_hello(socket, max_ranges, process);
        Self::take_over(control, fence)
    }

    /// Plays the first part of the handshake, after which the agent has nothing but the fence word.
    pub(crate) fn say_hello(
        socket: OwnedFd, max_ranges: usize, process: OwnedFd,
    ) -> (FrameSocket, FenceView) {
        let mut control = FrameSocket::from(socket);
        let hello = control.recv(soon()).unwrap();
        let agent = match Request::decode(hello.request, &hello.body) {
            Some(Ok(Request::Hello {
                version_min: 1,
                version_max: 1,
                features: FEATURES,
                agent,
                ..
            })) => agent,
            other => panic!("{other:?}"),
        };
        let fence = FenceView::map(hello.fds[0].as_fd(), agent).unwrap();
        assert!(fence.check().is_err(), "the agent is not current yet");
        let reply =
            Frame { fds: vec![process], ..Frame::reply(hello.request, hello_reply(max_ranges)) };
        control.send(&reply, soon()).unwrap();
        (control, fence)
    }

    /// Plays the rest of the handshake.
    pub(crate) fn take_over(mut control: FrameSocket, fence: FenceView) -> Self {
        let mut log = control.recv(soon()).unwrap();
        assert_eq!((log.request, log.body.len(), log.fds.len()), (6, 16, 1));
        fence.check().unwrap();
        control.send(&Frame::reply(log.request, log.body.clone()), soon()).unwrap();

        let mut hooks = control.recv(soon()).unwrap();
        assert_eq!((hooks.request, hooks.body.len(), hooks.fds.len()), (21, 0, 1));
        assert!(hooks.needs_reply());
        control.send(&Frame::reply(hooks.request, 0u64.to_le_bytes().to_vec()), soon()).unwrap();
        Self { control, hooks: hooks.fds.remove(0).into(), log: log.fds.remove(0), fence, next: 0 }
    }

    /// The next request and its descriptors. `None` when the client has closed the connection.
    pub(crate) fn request(&mut self) -> Option<(Request, Vec<OwnedFd>)> {
        let frame = match self.control.recv(soon()) {
            Err(SocketError::Closed) => return None,
            received => received.unwrap(),
        };
        let request = Request::decode(frame.request, &frame.body)
            .expect("a known request")
            .expect("well-formed");
        Some((request, frame.fds))
    }

    pub(crate) fn reply<T>(
        &self, request: &Request, reply: &Reply<T>, fields: impl FnOnce(&T, Encoder) -> Encoder,
    ) {
        let frame = Frame::reply(request.code(), encode_reply(reply, fields));
        self.control.send(&frame, soon()).unwrap();
    }

    pub(crate) fn done(&self, request: &Request) {
        self.reply(request, &Ok(()), |(), encoder| encoder);
    }

    pub(crate) fn changed(&self, request: &Request, changed_pages: u64) {
        self.reply(request, &Ok(RangesReply { changed_pages }), RangesReply::encode);
    }

    pub(crate) fn started(&self, request: &Request) {
        self.reply(request, &Ok(JobStarted { job: 1, address: "here".into() }), JobStarted::encode);
    }

    pub(crate) fn refuse(&self, request: &Request, code: ErrorCode, sentence: &str) {
        self.reply(request, &Err::<(), _>(RemoteError::new(code, sentence)), |(), encoder| encoder);
    }

    /// Accepts the next block. Returns the request and its descriptors.
    pub(crate) fn accept_block(&mut self) -> (Request, Vec<OwnedFd>) {
        let (request, fds) = self.request().expect("add block");
        assert!(matches!(request, Request::AddBlock { .. }), "{request:?}");
        assert_eq!(fds.len(), 2);
        self.reply(
            &request,
            &Ok(AddBlockReply { host_page_size: 4096, sealed: 1 }),
            AddBlockReply::encode,
        );
        (request, fds)
    }

    /// Sends a hook. Returns its sequence number.
    pub(crate) fn send_hook(&mut self, hook: &Hook, fds: Vec<OwnedFd>) -> u64 {
        self.next += 1;
        let frame = Frame { fds, ..Frame::request(hook.code(), hook.encode(self.next)) };
        self.hooks.send(&frame, soon()).unwrap();
        self.next
    }

    /// Sends a hook and waits for its reply.
    pub(crate) fn hook_frame(&mut self, hook: &Hook, fds: Vec<OwnedFd>) -> Frame {
        let sequence = self.send_hook(hook, fds);
        let answer = self.hooks.recv(soon()).unwrap();
        assert_eq!((answer.request, answer.is_reply()), (hook.code(), true));
        assert_eq!(reply_sequence(&answer.body), Ok(sequence));
        answer
    }

    /// Sends a hook and waits for its result.
    pub(crate) fn hook(&mut self, hook: &Hook) -> Reply<()> {
        decode_hook_reply(&self.hook_frame(hook, Vec::new()).body).unwrap()
    }
}

/// A client with a fake agent. After the handshake the agent runs `script` on its own thread.
pub(crate) fn client_with<T: Send + 'static>(
    config: Config, max_ranges: usize, script: impl FnOnce(FakeAgent) -> T + Send + 'static,
) -> (Client, HookChannel, JoinHandle<T>) {
    let (ours, agents) = UnixStream::pair().unwrap();
    let agent =
        std::thread::spawn(move || script(FakeAgent::shake_hands(agents.into(), max_ranges)));
    let (client, channel) = Client::from_socket(ours.into(), config).unwrap();
    (client, channel, agent)
}

pub(crate) fn client<T: Send + 'static>(
    script: impl FnOnce(FakeAgent) -> T + Send + 'static,
) -> (Client, HookChannel, JoinHandle<T>) {
    client_with(quiet(), MAX_RANGES, script)
}

/// A configuration without heartbeats, so that all requests come from the test.
pub(crate) fn quiet() -> Config {
    Config { heartbeat: Duration::from_secs(3600), ..Config::default() }
}

/// A configuration for agents that are too slow. The timeout is long enough for a handshake on a
/// busy machine.
pub(crate) fn impatient() -> Config {
    Config { request_timeout: Duration::from_millis(500), ..quiet() }
}

/// A memfd of this many pages. All of them are written.
pub(crate) fn written(pages: u64) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, pages * PAGE).unwrap();
    assert_eq!(
        rustix::io::pwrite(&fd, &vec![0x5a; (pages * PAGE) as usize], 0),
        Ok((pages * PAGE) as usize)
    );
    fd
}

pub(crate) fn allocated_pages(fd: &OwnedFd) -> u64 {
    fstat(fd).unwrap().st_blocks as u64 * 512 / PAGE
}

pub(crate) fn spec(id: u32, gpa: u64, memory: &OwnedFd) -> BlockSpec<'_> {
    let length = fstat(memory).unwrap().st_size as u64;
    let memory = memory.as_fd();
    let name = ["zero", "one", "two", "three"][id as usize];
    BlockSpec {
        id,
        name,
        gpa,
        length,
        memory,
        fd_offset: 0,
        vmm_address: 0,
        granularity: PAGE,
        discarded: false,
    }
}

/// A userfaultfd for write protection. If there is none, prints the reason and returns `None`.
pub(crate) fn uffd() -> Option<Userfaultfd> {
    match Userfaultfd::open(feature::WP_HUGETLBFS_SHMEM) {
        Ok(uffd) => Some(uffd),
        Err(error) => {
            let required = std::env::var("PAGEFERRY_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|name| name.trim() == "uffd"),
                "PAGEFERRY_REQUIRE names uffd: {error}"
            );
            eprintln!("skipped: uffd: {error}");
            None
        }
    }
}

/// The discarded pages of a block.
pub(crate) fn discarded(client: &Client, id: u32) -> Vec<u64> {
    let bitmap = client.discarded(id).unwrap();
    bitmap.runs(bitmap.all()).flat_map(|run| run.first..run.end()).collect()
}

/// The guest pages that are marked in the log.
pub(crate) fn logged(client: &Client) -> Vec<u64> {
    let bits = client.log().bits();
    bits.runs(PageRange::new(0, 1 << 20)).flat_map(|run| run.first..run.end()).collect()
}

pub(crate) fn assert_lost<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert!(matches!(result, Err(Error::AgentLost { .. })), "{result:?}");
}
