// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hooks: the requests of the agent to the VMM, each with a deadline.
//!
//! The agent sends a hook on the hook socket and waits for the answer. Threads that send hooks take
//! turns. Status events go to the VMM on the same socket; the agent never waits for those.
//!
//! Each answer has the sequence number of its request. So an answer that arrives after its deadline
//! is recognized and ignored, and a VMM that was late once can still answer the next hook.
//!
//! The channel breaks when the two sides may not agree where the next frame begins: after a request
//! that was sent in part, or after bytes that are not a frame. Then the socket is shut down, and
//! every later hook fails at once with the reason. The VMM sees the end of the connection and
//! attaches another agent.

mod error;

pub use error::HookError;

use crate::lock::lock;
use crate::waiting::may_wait;
use error::refused;
use pageferry_protocol::control::frame::Frame;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::hook_reply::{self, SavedState};
use pageferry_protocol::control::job::JobStatus;
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::control::{FrameSocket, SocketError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

/// The socket for hooks. All threads may use it; they take turns.
#[derive(Debug)]
pub struct Hooks {
    /// True if there is a socket.
    set: bool,
    /// A duplicate of the socket. It can be polled while another thread waits for an answer.
    watched: Option<OwnedFd>,
    /// Locked from the request to its answer.
    channel: Mutex<Channel>,
    /// Status events that are not sent yet, because another thread has locked `channel`. That
    /// thread sends them when it has released the lock, so [`Hooks::send_status`] never waits.
    pending: Mutex<VecDeque<JobStatus>>,
}

/// Time between two looks at whether a hook's answer is still wanted.
const LOOK: Duration = Duration::from_millis(100);
/// Most pending events. For a further one, the oldest is dropped.
const MAX_PENDING: usize = 64;

/// The connection to the VMM.
#[derive(Debug)]
struct Channel {
    /// `None` if the VMM has set no socket, or the channel is broken.
    socket: Option<FrameSocket>,
    /// Sequence number of the last request.
    sequence: u64,
    /// Why the channel is broken.
    broken: Option<String>,
    /// True while the VMM has not answered the last hook, also after its deadline. The VMM answers
    /// in order, so it will answer that hook before any later one.
    late: bool,
}

impl Hooks {
    /// Sends hooks on `socket`. Without a socket every hook fails.
    pub fn new(socket: Option<OwnedFd>) -> Self {
        // Without a duplicate, the connection cannot be checked, and the VMM counts as gone.
        let watched = socket.as_ref().and_then(|socket| socket.try_clone().ok());
        let (set, socket) = (socket.is_some(), socket.map(FrameSocket::from));
        let channel = Mutex::new(Channel { socket, sequence: 0, broken: None, late: false });
        Self { set, watched, channel, pending: Mutex::default() }
    }

    /// True if the VMM has not closed the connection. Does not wait.
    pub fn are_connected(&self) -> bool {
        let Some(socket) = &self.watched else { return false };
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            match poll(&mut [PollFd::new(socket, PollFlags::RDHUP)], Some(&now)) {
                Ok(ended) => return ended == 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// True if the VMM has set a socket for hooks.
    pub fn are_set(&self) -> bool {
        self.set
    }

    /// Sends a hook and waits for its success.
    ///
    /// # Errors
    /// If the VMM refuses the hook, or does not answer within `timeout`.
    pub fn ask(&self, hook: &Hook, timeout: Duration) -> Result<(), HookError> {
        self.ask_with(hook, &[], timeout)
    }

    /// Sends a hook whose answer may take long, and waits for its success, but not longer than
    /// until `is_over`. A later answer is ignored.
    ///
    /// # Errors
    /// If the VMM refuses the hook, or does not answer within `timeout` or until `is_over`.
    pub fn ask_until(
        &self, hook: &Hook, timeout: Duration, is_over: impl Fn() -> bool,
    ) -> Result<(), HookError> {
        success(hook, self.exchange(hook, &[], timeout, is_over)?)
    }

    /// Sends a hook that undoes an earlier one, and waits for its success.
    ///
    /// If the VMM has not answered the last hook, this sends the hook and does not wait. The VMM
    /// will handle both hooks when it continues, and the job can end without it.
    ///
    /// # Errors
    /// If the VMM refuses the hook, does not answer within `timeout`, or is late already.
    pub fn undo(&self, hook: &Hook, timeout: Duration) -> Result<(), HookError> {
        may_wait("ask the VMM by a hook");
        let late = self.lock().late;
        self.ask(hook, if late { Duration::ZERO } else { timeout })
    }

    /// Sends a hook with descriptors, and waits for its success.
    ///
    /// # Errors
    /// If the VMM refuses the hook, or does not answer within `timeout`.
    pub fn ask_with(
        &self, hook: &Hook, fds: &[BorrowedFd<'_>], timeout: Duration,
    ) -> Result<(), HookError> {
        success(hook, self.exchange(hook, fds, timeout, || false)?)
    }

    /// Asks the VMM to register all mappings for missing pages, and returns the userfaultfd.
    ///
    /// # Errors
    /// If the VMM refuses the hook, or does not answer within `timeout`.
    pub fn register_faults(&self, timeout: Duration) -> Result<OwnedFd, HookError> {
        self.ask_for_fd(&Hook::RegisterFaults, timeout)
    }

    /// Asks the VMM to register all mappings for write protection, and returns the userfaultfd.
    ///
    /// # Errors
    /// If the VMM refuses the hook, or does not answer within `timeout`.
    pub fn watch_writes(&self, timeout: Duration) -> Result<OwnedFd, HookError> {
        self.ask_for_fd(&Hook::WatchWrites, timeout)
    }

    /// Sends a hook whose answer has one descriptor.
    fn ask_for_fd(&self, hook: &Hook, timeout: Duration) -> Result<OwnedFd, HookError> {
        let (name, reply) = (hook.name(), self.exchange(hook, &[], timeout, || false)?);
        match hook_reply::decode_hook_reply(&reply.body) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(refused(name, error)),
            Err(source) => return Err(HookError::Malformed { hook: name, source }),
        }
        let wrong = |fds: Vec<OwnedFd>| HookError::WrongFdCount {
            hook: name,
            count: fds.len(),
            expected: 1,
        };
        let [fd] = <[OwnedFd; 1]>::try_from(reply.fds).map_err(wrong)?;
        // The thread that reads faults must not block in the read. If this fails, the read fails,
        // too.
        if let Err(errno) = rustix::io::ioctl_fionbio(&fd, true) {
            log::debug!("hook {name}: {errno}");
        }
        Ok(fd)
    }

    /// Asks the VMM to save its state. Returns the guest's run state, the names and lengths of the
    /// pieces, and the file that holds the pieces one after another. There may be no file if all
    /// pieces are empty.
    ///
    /// # Errors
    /// If the VMM refuses the hook, does not answer within `timeout`, or the file does not hold the
    /// pieces.
    pub fn save_state(
        &self, timeout: Duration,
    ) -> Result<(SavedState, Option<OwnedFd>), HookError> {
        let hook = Hook::SaveState.name();
        let reply = self.exchange(&Hook::SaveState, &[], timeout, || false)?;
        let saved = match hook_reply::decode_state_reply(&reply.body) {
            Ok(Ok(saved)) => saved,
            Ok(Err(error)) => return Err(refused(hook, error)),
            Err(source) => return Err(HookError::Malformed { hook, source }),
        };
        let count = reply.fds.len();
        let file = reply.fds.into_iter().next();
        let pieces = &saved.pieces;
        let expected = usize::from(pieces.iter().any(|piece| piece.length > 0));
        if count > 1 || count < expected {
            return Err(HookError::WrongFdCount { hook, count, expected });
        }
        // The file is checked now. Otherwise the job would fail only after all memory was sent or
        // saved.
        if file.as_ref().is_some_and(|file| !is_readable(file)) {
            return Err(HookError::StateFileNotReadable { hook });
        }
        let length = file
            .as_ref()
            .and_then(|file| rustix::fs::fstat(file).ok())
            .map_or(0, |stat| stat.st_size as u64);
        let expected = pieces.iter().fold(0u64, |sum, piece| sum.saturating_add(piece.length));
        if length < expected {
            return Err(HookError::StateFileTooShort { hook, length, expected });
        }
        Ok((saved, file))
    }

    /// Sends a status event to the VMM. Does not wait: if the VMM does not read, it misses the
    /// event.
    pub fn send_status(&self, status: &JobStatus) {
        let mut pending = self.pending();
        if pending.len() == MAX_PENDING {
            pending.pop_front();
        }
        pending.push_back(status.clone());
        drop(pending);
        self.send_pending_status();
    }

    /// Sends the pending events, unless another thread has locked the channel: that thread calls
    /// this when it has released the lock.
    fn send_pending_status(&self) {
        // An event that is added after the last check is not lost: the thread that adds it finds
        // the channel free, or locked by a thread that will call this.
        while !self.pending().is_empty() {
            let mut channel = match self.channel.try_lock() {
                Ok(channel) => channel,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            channel.send_pending(self.pending());
        }
    }

    /// Ends the connection and wakes the thread that waits for an answer. For a VMM that is gone.
    /// `socket` is the caller's own descriptor of the socket for hooks.
    pub fn close(&self, socket: BorrowedFd<'_>) {
        // The thread that waits holds the lock of the channel, so the socket in there cannot be
        // used.
        let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
    }

    /// Sends a hook and waits for its answer, then sends the events that became pending meanwhile.
    fn exchange(
        &self, hook: &Hook, fds: &[BorrowedFd<'_>], timeout: Duration, is_over: impl Fn() -> bool,
    ) -> Result<Frame, HookError> {
        may_wait("ask the VMM by a hook");
        let answer = self.exchange_alone(hook, fds, timeout, is_over);
        self.send_pending_status();
        answer
    }

    /// Sends a hook and waits for its answer, with the channel locked.
    fn exchange_alone(
        &self, hook: &Hook, fds: &[BorrowedFd<'_>], timeout: Duration, is_over: impl Fn() -> bool,
    ) -> Result<Frame, HookError> {
        let deadline = Instant::now() + timeout;
        let name = hook.name();
        let channel = &mut *self.lock();
        // Events from before this hook are sent before it.
        channel.send_pending(self.pending());
        channel.sequence += 1;
        let sequence = channel.sequence;
        log::debug!("hook \"{name}\" {sequence}");
        let socket = channel.socket(name)?;
        let sent = socket.send_parts(hook.code(), 0, &hook.encode(sequence), fds, deadline);
        sent.map_err(|source| channel.failed(name, source))?;
        channel.late = true;
        loop {
            // Looks from time to time whether it is over.
            let look = deadline.min(Instant::now() + LOOK);
            let (reply, lost_fds) = match channel.socket(name)?.recv(look) {
                Ok(reply) => (reply, false),
                Err(SocketError::Timeout { .. }) if look < deadline && !is_over() => continue,
                Err(SocketError::LostFds { frame }) => (*frame, true),
                Err(SocketError::Timeout { .. }) => {
                    return Err(HookError::Late { hook: name, waited: timeout });
                }
                Err(source) => return Err(channel.failed(name, source)),
            };
            let answered = hook_reply::reply_sequence(&reply.body);
            let answered =
                answered.map_err(|source| HookError::Malformed { hook: name, source })?;
            if reply.is_reply() && answered == sequence {
                channel.late = false;
                if lost_fds {
                    return Err(
                        channel.failed(name, SocketError::LostFds { frame: Box::new(reply) })
                    );
                }
                return Ok(reply);
            }
            log::info!("the answer to hook {answered} arrived after its deadline");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Channel> {
        lock(&self.channel)
    }

    fn pending(&self) -> MutexGuard<'_, VecDeque<JobStatus>> {
        lock(&self.pending)
    }
}

impl Channel {
    /// The socket. `hook` is for the error if there is none.
    fn socket(&mut self, hook: &'static str) -> Result<&mut FrameSocket, HookError> {
        match (&mut self.socket, &self.broken) {
            (Some(socket), _) => Ok(socket),
            (None, Some(reason)) => Err(HookError::ChannelBroken { hook, reason: reason.clone() }),
            (None, None) => Err(HookError::NoSocket { hook }),
        }
    }

    /// The error of hook `hook`. Breaks the channel if the framing may be lost.
    fn failed(&mut self, hook: &'static str, source: SocketError) -> HookError {
        self.break_after(&source);
        HookError::Socket { hook, source }
    }

    /// Shuts the socket down if the framing may be lost after `error`.
    fn break_after(&mut self, error: &SocketError) {
        if !error.keeps_framing()
            && let Some(socket) = self.socket.take()
        {
            self.broken = Some(crate::error::chain(error));
            socket.shutdown();
        }
    }

    /// Sends the pending events without waiting.
    fn send_pending(&mut self, mut pending: MutexGuard<'_, VecDeque<JobStatus>>) {
        let events = std::mem::take(&mut *pending);
        drop(pending);
        for status in events {
            self.sequence += 1;
            let event = Hook::Event { status: Box::new(status) };
            let body = event.encode(self.sequence);
            let Some(socket) = &self.socket else { continue };
            // An event is small, so it is sent whole or not at all.
            if let Err(error) = socket.send(&Frame::request(event.code(), body), Instant::now()) {
                log::debug!("a status event was not sent: {error}");
                self.break_after(&error);
            }
        }
    }
}

/// True if the file is open for reading, and not with O_PATH or O_WRONLY.
fn is_readable(file: &OwnedFd) -> bool {
    use rustix::fs::OFlags;
    let flags = rustix::fs::fcntl_getfl(file);
    flags.is_ok_and(|flags| {
        !flags.contains(OFlags::PATH) && flags & OFlags::RWMODE != OFlags::WRONLY
    })
}

/// The success or the error in the answer to a hook.
fn success(hook: &Hook, reply: Frame) -> Result<(), HookError> {
    let name = hook.name();
    match hook_reply::decode_hook_reply(&reply.body) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(refused(name, error)),
        Err(source) => Err(HookError::Malformed { hook: name, source }),
    }
}

/// Creates the file that carries the VMM's state to the load hook, and the lengths of its pieces.
///
/// # Errors
/// If the kernel has no memory for the file.
pub fn state_file(
    pieces: &[(String, Vec<u8>)],
) -> Result<(Vec<PieceSize>, OwnedFd), rustix::io::Errno> {
    let file = state_file_of(pieces.iter().map(|(_, bytes)| bytes.as_slice()))?;
    let sizes = pieces
        .iter()
        .map(|(name, bytes)| PieceSize { name: name.clone(), length: bytes.len() as u64 });
    Ok((sizes.collect(), file))
}

/// Creates a file in memory with all of `parts`, one after another.
///
/// # Errors
/// If the kernel has no memory for the file.
pub fn state_file_of<'a>(
    parts: impl IntoIterator<Item = &'a [u8]>,
) -> Result<OwnedFd, rustix::io::Errno> {
    let fd = rustix::fs::memfd_create("pageferry-state", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut offset = 0;
    for part in parts {
        let mut rest = part;
        while !rest.is_empty() {
            let written = rustix::io::pwrite(fd.as_fd(), rest, offset)?;
            rest = &rest[written..];
            offset += written as u64;
        }
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::control::FrameSocket;
    use pageferry_protocol::control::frame::FLAG_REPLY;
    use pageferry_protocol::control::hook_reply::encode_state_reply;
    use pageferry_protocol::control::job::RunState;
    use std::os::unix::net::UnixStream;

    /// Sends the save hook to a VMM that answers with one piece of `length` bytes and with `file`.
    fn saved(length: u64, file: OwnedFd) -> Result<(), String> {
        let far = || Instant::now() + Duration::from_secs(60);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let vmm = std::thread::spawn(move || {
            let mut socket = FrameSocket::from(OwnedFd::from(theirs));
            let frame = socket.recv(far()).unwrap();
            let (sequence, _) = Hook::decode(frame.request, &frame.body).unwrap().unwrap();
            let pieces = vec![PieceSize { name: "cpu".into(), length }];
            let body =
                encode_state_reply(sequence, &Ok(SavedState { guest: RunState::Running, pieces }));
            socket.send_parts(frame.request, FLAG_REPLY, &body, &[file.as_fd()], far()).unwrap();
        });
        let saved = Hooks::new(Some(ours.into())).save_state(Duration::from_secs(60));
        vmm.join().unwrap();
        saved.map(|_| ()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_that_does_not_hold_the_whole_state_is_refused() {
        let five = || state_file_of([&b"12345"[..]]).unwrap();
        assert_eq!(saved(5, five()), Ok(()));
        let error = saved(6, five()).unwrap_err();
        assert_eq!(
            error,
            "the answer to hook \"save state\" has pieces of 6 bytes in total, but a file of 5"
        );
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        std::fs::write(&path, "12345").unwrap();
        for flags in [rustix::fs::OFlags::PATH, rustix::fs::OFlags::WRONLY] {
            let file = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
            let error = saved(5, file).unwrap_err();
            assert_eq!(
                error,
                "the answer to hook \"save state\" has a file that is not open for reading"
            );
        }
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        assert!(saved(6, pipe).unwrap_err().ends_with("a file of 0"));
    }

    #[test]
    fn a_hook_sent_in_part_breaks_the_channel_for_later_hooks() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let hooks = Hooks::new(Some(ours.into()));
        let large = Hook::LoadState {
            pieces: (0..4000)
                .map(|piece| PieceSize { name: format!("{piece:0>200}"), length: 0 })
                .collect(),
        };
        // The VMM does not read, and the hook is too large for the socket.
        let error = hooks.ask(&large, Duration::ZERO).unwrap_err();
        let half =
            matches!(&error, HookError::Socket { source: SocketError::PartlySent { .. }, .. });
        assert!(half, "{}", crate::error::chain(&error));
        for _ in 0..2 {
            let error = hooks.ask(&Hook::Pause, Duration::from_secs(3600)).unwrap_err().to_string();
            assert!(error.contains("broke the socket for hooks: the connection took"), "{error}");
        }
        assert!(!hooks.are_connected());
        // The VMM reads a part of the request, and then the end of the connection.
        let mut vmm = FrameSocket::from(OwnedFd::from(theirs));
        let error = vmm.recv(Instant::now() + Duration::from_secs(60)).unwrap_err();
        assert!(matches!(error, SocketError::ClosedInFrame { .. }), "{error}");
    }

    #[test]
    fn a_hook_without_an_answer_in_time_leaves_the_channel_intact() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let hooks = Hooks::new(Some(ours.into()));
        let error = hooks.ask(&Hook::Pause, Duration::ZERO).unwrap_err();
        assert!(matches!(error, HookError::Late { .. }), "{error}");
        let far = || Instant::now() + Duration::from_secs(60);
        let vmm = std::thread::spawn(move || {
            let mut socket = FrameSocket::from(OwnedFd::from(theirs));
            for _ in 0..2 {
                let frame = socket.recv(far()).unwrap();
                let (sequence, _) = Hook::decode(frame.request, &frame.body).unwrap().unwrap();
                let body = hook_reply::encode_hook_reply(sequence, &Ok(()));
                socket.send_parts(frame.request, FLAG_REPLY, &body, &[], far()).unwrap();
            }
        });
        hooks.ask(&Hook::Pause, Duration::from_secs(60)).unwrap();
        vmm.join().unwrap();
    }
}
