// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The fence word alone. A VMM without the client library gives its agent up by the fence word, but
//! cuts no connection and kills no process. So if the agent then does nothing more, the fence word
//! is the only reason.

use pageferry_client::{
    IncomingOptions, JobStatus, Phase, RunState, SnapshotMode, SnapshotOptions, Trackers,
};
use pageferry_protocol::control::frame::FLAG_REPLY;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::hook_reply::{SavedState, encode_hook_reply, encode_state_reply};
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::control::request::{BlockRange, DISCARD_PUNCH, FEATURE_FENCE, Request};
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use pageferry_protocol::memory::{BlockGeometry, PAGE_SIZE};
use pageferry_protocol::shm::fence::FENCE_BYTES;
use pageferry_protocol::shm::{FenceWord, MappedBitmap};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::{wait_for, wait_until};
use pageferry_tests::files::memfd;
use pageferry_tests::scenario::{Listening, Ram, RawClient, Relay, SOON, Side, passes};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

const PAGES: u64 = 200;
/// The fence word for this agent.
const NUMBER: u64 = 7;

fn hello(agent: u64) -> Request {
    Request::Hello {
        version_min: 1,
        version_max: 1,
        features: FEATURE_FENCE,
        agent,
        name: String::new(),
    }
}

#[test]
fn a_hello_without_its_fence_does_not_take_the_memory() {
    let agent = Listening::start();
    let mut stranger = agent.connect();
    let error = stranger.ask(&hello(NUMBER), Vec::new()).unwrap_err();
    assert_eq!(error.code, ErrorCode::Invalid, "{error}");
    // The stranger stays connected, and the VMM can still connect.
    RawVmm::new(&agent, None);
    stranger.status();
}

/// A VMM with one block that sends and receives plain frames.
struct RawVmm {
    control: RawClient,
    word: Arc<FenceWord>,
    log: OwnedFd,
    ram: Ram,
    /// The VMM has answered a resume hook.
    resumed: Arc<AtomicBool>,
    hooks: Option<JoinHandle<()>>,
}

impl RawVmm {
    /// An attached VMM whose hooks succeed. Before it answers one of these hooks, it gives the
    /// agent up.
    fn new(agent: &Listening, given_up_at: Option<u32>) -> Self {
        Self::with_state(agent, given_up_at, 0)
    }

    /// The same, with this many bytes of VMM state.
    fn with_state(agent: &Listening, given_up_at: Option<u32>, state: u64) -> Self {
        let fence = memfd(FENCE_BYTES).unwrap();
        let word = Arc::new(FenceWord::map(fence.as_fd()).unwrap());
        let mut control = agent.connect();
        control.ask(&hello(NUMBER), vec![fence]).unwrap();
        word.admit(NUMBER);
        let log = memfd(PAGE_SIZE).unwrap();
        let body = [PAGE_SIZE.to_le_bytes(), 0u64.to_le_bytes()].concat();
        let set_log = Frame { fds: vec![log.try_clone().unwrap()], ..Frame::request(6, body) };
        control.socket.send(&set_log, Instant::now() + SOON).unwrap();
        control.reply().unwrap();
        let (ours, agents) = UnixStream::pair().unwrap();
        let set_hooks = Frame { fds: vec![agents.into()], ..Frame::request(21, Vec::new()) };
        control.socket.send(&set_hooks, Instant::now() + SOON).unwrap();
        let ram = Ram::odd(PAGES).stamped();
        let geometry = BlockGeometry {
            id: ram.id,
            name: "block3".into(),
            gpa: ram.gpa,
            length: PAGES * PAGE_SIZE,
            granularity: PAGE_SIZE,
        };
        let add =
            Request::AddBlock { geometry, fd_offset: ram.fd_offset, vmm_address: 0, flags: 0 };
        control.ask(&add, vec![ram.fd.try_clone().unwrap(), memfd(64).unwrap()]).unwrap();
        control
            .ask(&Request::SetTrackers { sources: Trackers::LOG_IS_COMPLETE }, Vec::new())
            .unwrap();
        let (given_up, resumed) = (word.clone(), Arc::new(AtomicBool::new(false)));
        let told = resumed.clone();
        let hooks = std::thread::spawn(move || {
            answer_hooks(ours.into(), given_up_at, state, &given_up, &told)
        });
        Self { control, word, log, ram, resumed, hooks: Some(hooks) }
    }

    /// The final status of the job, as an operator of the agent sees it.
    fn ended(agent: &Listening) -> JobStatus {
        let mut operator = agent.connect();
        wait_for("the job's end", SOON, || {
            Some(operator.status()).filter(|status| status.phase.is_final())
        })
        .unwrap()
    }
}

impl Drop for RawVmm {
    fn drop(&mut self) {
        self.control.raw.shutdown(std::net::Shutdown::Both).unwrap();
        if let Some(hooks) = self.hooks.take() {
            hooks.join().unwrap();
        }
    }
}

fn answer_hooks(
    socket: OwnedFd, given_up_at: Option<u32>, state: u64, word: &FenceWord, resumed: &AtomicBool,
) {
    let file = memfd(state).unwrap();
    let mut socket = FrameSocket::from(socket);
    loop {
        let frame = match socket.recv(Instant::now() + 3 * SOON) {
            Ok(frame) => frame,
            Err(SocketError::Closed) => return,
            Err(error) => panic!("{error}"),
        };
        if given_up_at == Some(frame.request) {
            word.revoke(NUMBER);
        }
        let (sequence, hook) = Hook::decode(frame.request, &frame.body).unwrap().unwrap();
        let (body, fds) = match hook {
            Hook::Event { .. } => continue,
            Hook::SaveState => {
                let pieces = if state == 0 {
                    vec![]
                } else {
                    vec![PieceSize { name: "cpu".into(), length: state }]
                };
                let fds = if state == 0 { vec![] } else { vec![file.as_fd()] };
                (
                    encode_state_reply(
                        sequence,
                        &Ok(SavedState { guest: RunState::Running, pieces }),
                    ),
                    fds,
                )
            }
            _ => (encode_hook_reply(sequence, &Ok(())), vec![]),
        };
        socket.send_parts(frame.request, FLAG_REPLY, &body, &fds, Instant::now() + SOON).unwrap();
        resumed.fetch_or(matches!(hook, Hook::Resume { .. }), Ordering::SeqCst);
    }
}

#[track_caller]
fn assert_replaced(status: &JobStatus) {
    assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
    let said =
        format!("this agent was replaced: it is number {NUMBER} of its VMM, which has given it up");
    assert!(status.error_text().contains(&said), "{}", status.error_text());
}

/// An agent that is given up during a migration: its next step fails, and it sends no commit.
#[test]
fn a_fenced_migration_fails_and_takes_no_mark_from_the_log() {
    use pageferry_protocol::control::hook::code;
    for given_up_at in [code::PAUSE, code::SAVE_STATE, code::RELINQUISH] {
        let agent = Listening::start();
        let mut vmm = RawVmm::new(&agent, Some(given_up_at));
        let (destination, mut relay) = (Side::new(Ram::odd(PAGES)), Relay::unix());
        let incoming = relay.listen(&destination.client, &IncomingOptions::default());
        let start = Request::StartOutgoing { target: relay.address(), options: passes(1) };
        vmm.control.ask(&start, Vec::new()).unwrap();
        // Marks from here on belong to the next agent.
        let bits = MappedBitmap::shared(vmm.log.as_fd(), 8 * PAGE_SIZE).unwrap();
        let mut marked = false;
        let over = || destination.client.status().unwrap().phase.is_final();
        relay.pump("the end", || {
            if vmm.word.current() == 0 && !marked {
                bits.set(bits.all());
                marked = true;
            }
            over()
        });
        assert!(marked);
        assert_replaced(&RawVmm::ended(&agent));
        assert_eq!(bits.count(bits.all()), bits.pages(), "the old agent took marks");
        assert!(relay.seen.iter().all(|record| record.kind != Kind::Commit), "a commit was sent");
        assert_eq!(destination.wait(incoming).phase, Phase::Failed);
        assert_eq!(destination.vmm.resumes(), 0);
        drop(vmm);
    }
}

#[test]
fn a_snapshot_of_an_agent_that_was_given_up_leaves_no_image() {
    use pageferry_protocol::control::hook::code;
    let cases = [
        (SnapshotMode::Stopped, code::SAVE_STATE),
        (SnapshotMode::Paused, code::SAVE_STATE),
        // All memory is read by then.
        (SnapshotMode::Paused, code::RESUME),
    ];
    for (mode, given_up_at) in cases {
        let agent = Listening::start();
        let mut vmm = RawVmm::new(&agent, Some(given_up_at));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image").to_str().unwrap().to_owned();
        let options = SnapshotOptions { mode, ..SnapshotOptions::default() };
        vmm.control.ask(&Request::StartSnapshot { path, options }, Vec::new()).unwrap();
        assert_replaced(&RawVmm::ended(&agent));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

/// Bytes of the image that the agent in this process writes to this folder. `None` if it writes
/// none. The image has no name yet.
fn written_in(folder: &Path) -> Option<u64> {
    let descriptors =
        std::fs::read_dir("/proc/self/fd").unwrap().flatten().map(|entry| entry.path());
    let is_there = |fd: &PathBuf| {
        std::fs::read_link(fd).is_ok_and(|file| file.starts_with(folder) && file != folder)
    };
    // The file may be closed meanwhile.
    descriptors.filter(is_there).find_map(|fd| std::fs::metadata(fd).ok()).map(|file| file.len())
}

/// A snapshot that is under way in `folder`, of a VMM with this much state.
fn saving(agent: &Listening, folder: &Path, given_up_at: Option<u32>, state: u64) -> RawVmm {
    let mut vmm = RawVmm::with_state(agent, given_up_at, state);
    let path = folder.join("image").to_str().unwrap().to_owned();
    let options = SnapshotOptions { mode: SnapshotMode::Paused, ..SnapshotOptions::default() };
    vmm.control.ask(&Request::StartSnapshot { path, options }, Vec::new()).unwrap();
    vmm
}

/// The agent checks the fence word when all memory is read. Without that check it would continue
/// with the image, and would be the current agent again when it names the image.
#[test]
fn an_image_fenced_before_its_last_page_is_not_completed() {
    let agent = Listening::start();
    let folder = tempfile::tempdir().unwrap();
    // The guest keeps running after its resume.
    let resume = pageferry_protocol::control::hook::code::RESUME;
    let vmm = saving(&agent, folder.path(), Some(resume), 16 << 20);
    wait_until("the agent to be given up", SOON, || vmm.word.current() == 0).unwrap();
    let (before, mut operator) = (written_in(folder.path()), agent.connect());
    wait_until("the job's end", SOON, || {
        if written_in(folder.path()) != before {
            vmm.word.admit(NUMBER);
        }
        operator.status().phase.is_final()
    })
    .unwrap();
    assert_replaced(&RawVmm::ended(&agent));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// The agent checks the fence word again right before it names the image. Here it is given up while
/// it writes the part after the last page.
#[test]
fn an_image_fenced_after_its_last_page_gets_no_name() {
    // More state gives more time to give the agent up.
    for state in [64 << 20, 256 << 20, 768 << 20] {
        let agent = Listening::start();
        let folder = tempfile::tempdir().unwrap();
        let vmm = saving(&agent, folder.path(), None, state);
        let wait_for_resume = || vmm.resumed.load(Ordering::SeqCst);
        wait_until("the guest to run", SOON, wait_for_resume).unwrap();
        let before = written_in(folder.path());
        let written = || written_in(folder.path()) > before;
        while !written() && !agent.connect().status().phase.is_final() {
            std::thread::yield_now();
        }
        vmm.word.revoke(NUMBER);
        let status = RawVmm::ended(&agent);
        if status.phase == Phase::Completed {
            eprintln!("it was given up too late, with {state:#x} bytes of state");
            continue;
        }
        assert_replaced(&status);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        return;
    }
    panic!("the agent was given up too late with every size of state");
}

#[test]
fn requests_from_before_the_fence_are_not_done_after() {
    let agent = Listening::start();
    let mut vmm = RawVmm::new(&agent, None);
    let ranges = vec![BlockRange { block: vmm.ram.id, offset: 0, length: PAGE_SIZE }];
    let discard = Request::Discard { flags: DISCARD_PUNCH, ranges: ranges.clone() };
    vmm.word.revoke(NUMBER);
    for request in
        [discard.clone(), Request::Populate { ranges }, Request::RemoveBlock { id: vmm.ram.id }]
    {
        let error = vmm.control.ask(&request, Vec::new()).unwrap_err();
        assert_eq!(error.code, ErrorCode::State);
        assert!(error.sentence.contains("this agent was replaced"), "{error}");
    }
    assert_eq!(vmm.ram.stamp(0), 1000, "the old agent freed the page");
    vmm.word.admit(NUMBER);
    vmm.control.ask(&discard, Vec::new()).unwrap();
    assert!(vmm.ram.is_hole(0));
}

#[test]
fn a_fence_word_that_is_none_is_refused_by_name() {
    let agent = Listening::start();
    let mut vmm = RawVmm::new(&agent, None);
    let refused = |peer: &mut RawClient, request: &Request, fds, words: &[&str]| {
        let error = peer.ask(request, fds).unwrap_err();
        assert!(words.iter().all(|word| error.sentence.contains(word)), "{error}");
        error.code
    };
    // The connection of another VMM, and a second time.
    let mut other = agent.connect();
    let code = refused(
        &mut other,
        &hello(1),
        vec![memfd(FENCE_BYTES).unwrap()],
        &["start another agent", "another connection"],
    );
    assert_eq!(code, ErrorCode::Denied);
    let again = vec![memfd(FENCE_BYTES).unwrap()];
    assert_eq!(
        refused(&mut vmm.control, &hello(8), again, &["an earlier hello"]),
        ErrorCode::State
    );
    drop(vmm);
    let free = || {
        let mut peer = agent.connect();
        peer.ask(&Request::Resume { force: false }, Vec::new()).unwrap_err();
        peer
    };
    wait_until("the agent to be free", SOON, || {
        let error = free().ask(&hello(1), vec![memfd(7).unwrap()]).unwrap_err();
        error.sentence.contains("fence: file of 0x7 bytes is shorter")
    })
    .unwrap();
    let mut peer = free();
    assert_eq!(
        refused(&mut peer, &hello(1), Vec::new(), &["hello", "0 file descriptors"]),
        ErrorCode::Invalid
    );
    let mut body = hello(1).encode();
    body[16..24].fill(0);
    let error = peer.ask_raw(hello(1).code(), body, vec![memfd(FENCE_BYTES).unwrap()]).unwrap_err();
    assert!(error.sentence.contains("agent is 0x0, allowed: from 1"), "{error}");
}
