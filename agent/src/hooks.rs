//! What the agent asks of the VMM, each with a deadline.
//!
//! The answers carry the sequence number of their request, so one that comes after its deadline is
//! told from the one that is waited for, and a VMM that was late once is not lost for good.
//!
//! The channel is broken once the two sides may not agree where the next frame begins: after a
//! request that was sent in part, or bytes that are no frame. It is shut down then, and every later
//! hook fails at once with the reason. The VMM sees the end and attaches another agent.

use crate::waiting::may_wait;
use pageferry_protocol::control::codec::DecodeError;
use pageferry_protocol::control::frame::Frame;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::hook_reply::{self, SavedState};
use pageferry_protocol::control::job::JobStatus;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::control::{FrameSocket, SocketError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// Why a hook did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The VMM did not answer in time, or is gone.
    #[error("hook \"{hook}\"")]
    Socket {
        /// What was asked.
        hook: &'static str,
        /// What happened.
        #[source]
        source: SocketError,
    },
    /// The VMM refused.
    #[error("hook \"{hook}\" failed in the VMM: {error}")]
    Refused {
        /// What was asked.
        hook: &'static str,
        /// What the VMM said.
        error: RemoteError,
    },
    /// The VMM's code panicked. Its client caught it.
    #[error("hook \"{hook}\" panicked in the VMM: {message}")]
    Panicked {
        /// What was asked.
        hook: &'static str,
        /// The message of the panic.
        message: String,
    },
    /// The answer is malformed.
    #[error("hook \"{hook}\" was answered wrongly")]
    Malformed {
        /// What was asked.
        hook: &'static str,
        /// What is wrong.
        #[source]
        source: DecodeError,
    },
    /// The answer has another number of descriptors than it should.
    #[error("hook \"{hook}\" was answered with {count} file descriptors, expected is {expected}")]
    Fds {
        /// What was asked.
        hook: &'static str,
        /// How many came.
        count: usize,
        /// How many should have.
        expected: usize,
    },
    /// The file with the VMM's state does not hold all of it.
    #[error(
        "hook \"{hook}\" was answered with pieces of {expected} bytes together, and a file of {length}"
    )]
    ShortState {
        /// What was asked.
        hook: &'static str,
        /// Bytes of the file; 0 if it is none that has a length.
        length: u64,
        /// Bytes of the pieces.
        expected: u64,
    },
    /// The file with the VMM's state cannot be read.
    #[error("hook \"{hook}\" was answered with a file that is not open for reading")]
    UnreadableState {
        /// What was asked.
        hook: &'static str,
    },
    /// The channel broke in an earlier hook.
    #[error("hook \"{hook}\": the socket for hooks is broken since an earlier one: {reason}")]
    Broken {
        /// What was to be asked.
        hook: &'static str,
        /// What broke it.
        reason: String,
    },
    /// The VMM set no socket for hooks.
    #[error("hook \"{hook}\": the VMM has set no socket for hooks (SET_BACKEND_REQ_FD)")]
    None {
        /// What was to be asked.
        hook: &'static str,
    },
}

/// The socket for hooks. Any thread may ask; they take turns.
#[derive(Debug)]
pub struct Hooks {
    /// There is a socket.
    set: bool,
    /// The socket once more, to look at while somebody waits for an answer.
    watched: Option<OwnedFd>,
    /// Held for as long as the VMM takes to answer.
    channel: Mutex<Channel>,
    /// Events that were told while somebody waited for an answer. Whoever gives `channel` back
    /// sends them, so that nobody who tells has to wait.
    untold: Mutex<VecDeque<JobStatus>>,
}

/// Most events that wait; the oldest is dropped for a new one.
const MAX_PENDING: usize = 64;

#[derive(Debug)]
struct Channel {
    socket: Option<FrameSocket>,
    sequence: u64,
    /// Why the socket is of no use any more.
    broken: Option<String>,
    /// The VMM owes the answer to a hook whose deadline is over. It answers in order, so nothing
    /// after that is answered sooner.
    late: bool,
}

impl Hooks {
    /// Hooks that go to `socket`; every one fails if there is none.
    pub fn new(socket: Option<OwnedFd>) -> Self {
        // Without a duplicate nobody can see that the VMM is there, and it counts as gone.
        let watched = socket.as_ref().and_then(|socket| socket.try_clone().ok());
        let (set, socket) = (socket.is_some(), socket.map(FrameSocket::from));
        let channel = Mutex::new(Channel { socket, sequence: 0, broken: None, late: false });
        Self { set, watched, channel, untold: Mutex::default() }
    }

    /// True if the VMM has not ended the connection, as far as the kernel knows now. Does not wait.
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

    /// True if there is a VMM to ask.
    pub fn are_set(&self) -> bool {
        self.set
    }

    /// Asks, and waits for success.
    ///
    /// # Errors
    /// If there is none within `timeout`.
    pub fn ask(&self, hook: &Hook, timeout: Duration) -> Result<(), HookError> {
        self.ask_with(hook, &[], timeout)
    }

    /// Asks for what undoes an earlier hook, and waits for success. A VMM that is late already is
    /// not waited for once more: it comes to this, too, when it comes to itself, and the job ends
    /// meanwhile.
    ///
    /// # Errors
    /// If there is none within `timeout`, or the VMM is late.
    pub fn undo(&self, hook: &Hook, timeout: Duration) -> Result<(), HookError> {
        may_wait("ask the VMM by a hook");
        let late = self.lock().late;
        self.ask(hook, if late { Duration::ZERO } else { timeout })
    }

    /// Asks with descriptors, and waits for success.
    ///
    /// # Errors
    /// If there is none within `timeout`.
    pub fn ask_with(
        &self, hook: &Hook, fds: &[BorrowedFd<'_>], timeout: Duration,
    ) -> Result<(), HookError> {
        let name = hook.name();
        let reply = self.exchange(hook, fds, timeout)?;
        match hook_reply::decode_hook_reply(&reply.body) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(refused(name, error)),
            Err(source) => Err(HookError::Malformed { hook: name, source }),
        }
    }

    /// Asks for the registration of all mappings for missing pages: the userfaultfd.
    ///
    /// # Errors
    /// If there is none within `timeout`.
    pub fn register_faults(&self, timeout: Duration) -> Result<OwnedFd, HookError> {
        self.ask_for_fd(&Hook::RegisterFaults, timeout)
    }

    /// Asks for the registration of all mappings for write protection: the userfaultfd.
    ///
    /// # Errors
    /// If there is none within `timeout`.
    pub fn watch_writes(&self, timeout: Duration) -> Result<OwnedFd, HookError> {
        self.ask_for_fd(&Hook::WatchWrites, timeout)
    }

    fn ask_for_fd(&self, hook: &Hook, timeout: Duration) -> Result<OwnedFd, HookError> {
        let (name, reply) = (hook.name(), self.exchange(hook, &[], timeout)?);
        match hook_reply::decode_hook_reply(&reply.body) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(refused(name, error)),
            Err(source) => return Err(HookError::Malformed { hook: name, source }),
        }
        let wrong =
            |fds: Vec<OwnedFd>| HookError::Fds { hook: name, count: fds.len(), expected: 1 };
        let [fd] = <[OwnedFd; 1]>::try_from(reply.fds).map_err(wrong)?;
        // Whoever reads it must not wait there. If this fails so does the reading.
        if let Err(errno) = rustix::io::ioctl_fionbio(&fd, true) {
            log::debug!("hook {name}: {errno}");
        }
        Ok(fd)
    }

    /// Asks for the VMM's state: the guest's run state and the pieces, and the file they lie in one
    /// after another. The file is empty if there are none.
    ///
    /// # Errors
    /// If there is none within `timeout`.
    pub fn save_state(
        &self, timeout: Duration,
    ) -> Result<(SavedState, Option<OwnedFd>), HookError> {
        let hook = Hook::SaveState.name();
        let reply = self.exchange(&Hook::SaveState, &[], timeout)?;
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
            return Err(HookError::Fds { hook, count, expected });
        }
        // Now, and not when all memory was sent or saved.
        if file.as_ref().is_some_and(|file| !is_readable(file)) {
            return Err(HookError::UnreadableState { hook });
        }
        let length = file
            .as_ref()
            .and_then(|file| rustix::fs::fstat(file).ok())
            .map_or(0, |stat| stat.st_size as u64);
        let expected = pieces.iter().fold(0u64, |sum, piece| sum.saturating_add(piece.length));
        if length < expected {
            return Err(HookError::ShortState { hook, length, expected });
        }
        Ok((saved, file))
    }

    /// Tells, without waiting: if the VMM does not listen, it misses this one.
    pub fn send_status(&self, status: &JobStatus) {
        let mut untold = self.pending();
        if untold.len() == MAX_PENDING {
            untold.pop_front();
        }
        untold.push_back(status.clone());
        drop(untold);
        self.send_pending_status();
    }

    /// Sends the events that wait, unless another thread has the socket: that one calls this when
    /// it has given the socket back.
    fn send_pending_status(&self) {
        // An event that comes after the last look finds the socket free, or another holder.
        while !self.pending().is_empty() {
            let mut channel = match self.channel.try_lock() {
                Ok(channel) => channel,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            channel.send_pending(self.pending());
        }
    }

    /// Ends the connection and wakes whoever waits for an answer. For a VMM that is gone.
    pub fn close(&self, socket: BorrowedFd<'_>) {
        // The lock may be held by whoever waits, so this goes by a descriptor of the caller's own.
        let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
    }

    fn exchange(
        &self, hook: &Hook, fds: &[BorrowedFd<'_>], timeout: Duration,
    ) -> Result<Frame, HookError> {
        may_wait("ask the VMM by a hook");
        let answer = self.exchange_alone(hook, fds, timeout);
        self.send_pending_status();
        answer
    }

    fn exchange_alone(
        &self, hook: &Hook, fds: &[BorrowedFd<'_>], timeout: Duration,
    ) -> Result<Frame, HookError> {
        let deadline = Instant::now() + timeout;
        let name = hook.name();
        let channel = &mut *self.lock();
        // What was told before this comes before it.
        channel.send_pending(self.pending());
        channel.sequence += 1;
        let sequence = channel.sequence;
        log::debug!("hook \"{name}\" {sequence}");
        let socket = channel.socket(name)?;
        let sent = socket.send_parts(hook.code(), 0, &hook.encode(sequence), fds, deadline);
        sent.map_err(|source| channel.failed(name, source))?;
        channel.late = true;
        loop {
            let (reply, lost_fds) = match channel.socket(name)?.recv(deadline) {
                Ok(reply) => (reply, false),
                Err(SocketError::LostFds { frame }) => (*frame, true),
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
            log::info!("an answer to hook {answered} came after its deadline");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Channel> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pending(&self) -> MutexGuard<'_, VecDeque<JobStatus>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Channel {
    /// The socket, for the hook `hook`.
    fn socket(&mut self, hook: &'static str) -> Result<&mut FrameSocket, HookError> {
        match (&mut self.socket, &self.broken) {
            (Some(socket), _) => Ok(socket),
            (None, Some(reason)) => Err(HookError::Broken { hook, reason: reason.clone() }),
            (None, None) => Err(HookError::None { hook }),
        }
    }

    /// What the hook `hook` fails with. If the socket is not in step any more, it ends here.
    fn failed(&mut self, hook: &'static str, source: SocketError) -> HookError {
        self.break_after(&source);
        HookError::Socket { hook, source }
    }

    fn break_after(&mut self, error: &SocketError) {
        if !error.keeps_framing()
            && let Some(socket) = self.socket.take()
        {
            self.broken = Some(crate::error::chain(error));
            socket.shutdown();
        }
    }

    fn send_pending(&mut self, mut untold: MutexGuard<'_, VecDeque<JobStatus>>) {
        let events = std::mem::take(&mut *untold);
        drop(untold);
        for status in events {
            self.sequence += 1;
            let event = Hook::Event { status: Box::new(status) };
            let body = event.encode(self.sequence);
            let Some(socket) = &self.socket else { continue };
            // A message this small is sent whole or not at all.
            if let Err(error) = socket.send(&Frame::request(event.code(), body), Instant::now()) {
                log::debug!("event not sent: {error}");
                self.break_after(&error);
            }
        }
    }
}

/// True if the file is open for reading, which one with O_PATH or O_WRONLY is not.
fn is_readable(file: &OwnedFd) -> bool {
    use rustix::fs::OFlags;
    let flags = rustix::fs::fcntl_getfl(file);
    flags.is_ok_and(|flags| {
        !flags.contains(OFlags::PATH) && flags & OFlags::RWMODE != OFlags::WRONLY
    })
}

fn refused(hook: &'static str, error: RemoteError) -> HookError {
    match error.code {
        ErrorCode::Panicked => HookError::Panicked { hook, message: error.sentence },
        _ => HookError::Refused { hook, error },
    }
}

/// Creates the file that carries the VMM's state to the load hook.
///
/// # Errors
/// What the kernel said.
pub fn state_file(
    pieces: &[(String, Vec<u8>)],
) -> Result<(Vec<PieceSize>, OwnedFd), rustix::io::Errno> {
    let file = state_file_of(pieces.iter().map(|(_, bytes)| bytes.as_slice()))?;
    let sizes = pieces
        .iter()
        .map(|(name, bytes)| PieceSize { name: name.clone(), length: bytes.len() as u64 });
    Ok((sizes.collect(), file))
}

/// The same of these bytes, one after another.
///
/// # Errors
/// What the kernel said.
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

    /// What comes of a state of one piece of `length` bytes, in `file`.
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
    fn a_file_that_does_not_hold_all_of_the_state_is_refused_at_once() {
        let five = || state_file_of([&b"12345"[..]]).unwrap();
        assert_eq!(saved(5, five()), Ok(()));
        let error = saved(6, five()).unwrap_err();
        assert_eq!(
            error,
            "hook \"save state\" was answered with pieces of 6 bytes together, and a file of 5"
        );
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        std::fs::write(&path, "12345").unwrap();
        for flags in [rustix::fs::OFlags::PATH, rustix::fs::OFlags::WRONLY] {
            let file = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
            let error = saved(5, file).unwrap_err();
            assert_eq!(
                error,
                "hook \"save state\" was answered with a file that is not open for reading"
            );
        }
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        assert!(saved(6, pipe).unwrap_err().ends_with("a file of 0"));
    }

    #[test]
    fn a_hook_that_is_sent_in_part_ends_the_channel_and_every_later_hook_says_why() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let hooks = Hooks::new(Some(ours.into()));
        let large = Hook::LoadState {
            pieces: (0..4000)
                .map(|piece| PieceSize { name: format!("{piece:0>200}"), length: 0 })
                .collect(),
        };
        // Nobody reads it.
        let error = hooks.ask(&large, Duration::ZERO).unwrap_err();
        let half = matches!(&error, HookError::Socket { source: SocketError::HalfSent { .. }, .. });
        assert!(half, "{}", crate::error::chain(&error));
        for _ in 0..2 {
            let error = hooks.ask(&Hook::Pause, Duration::from_secs(3600)).unwrap_err().to_string();
            assert!(error.contains("broken since an earlier one: the connection took"), "{error}");
        }
        assert!(!hooks.are_connected());
        // What the VMM reads is part of the request, and then the end.
        let mut vmm = FrameSocket::from(OwnedFd::from(theirs));
        let error = vmm.recv(Instant::now() + Duration::from_secs(60)).unwrap_err();
        assert!(matches!(error, SocketError::Cut { .. }), "{error}");
    }

    #[test]
    fn a_hook_that_is_not_answered_in_time_leaves_the_channel_as_it_is() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let hooks = Hooks::new(Some(ours.into()));
        let error = hooks.ask(&Hook::Pause, Duration::ZERO).unwrap_err();
        assert!(matches!(error, HookError::Socket { source: SocketError::Timeout { .. }, .. }));
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
