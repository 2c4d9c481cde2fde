//! One connection, on a thread of its own.
//!
//! The thread reads a request, answers it, sends the answer, and only then reads the next: so the
//! answers keep the order of the requests. A slow request, a client that pipelines and one that
//! does not read its answers take time from this thread alone. Between two requests the thread
//! sends the events that the other side subscribed to.

use super::Hub;
use crate::session::Role;
use crate::session::vhost_user::Awaited;
use pageferry_protocol::control::codec::Encoder;
use pageferry_protocol::control::frame::Frame;
use pageferry_protocol::control::reply::{self, ErrorCode, RemoteError};
use pageferry_protocol::control::request::{self, FIRST_NATIVE_REQUEST, Request};
use pageferry_protocol::control::{FrameSocket, SocketError};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How long a client may leave its answers unread.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a request may take to come, from its first byte to its last, unless the VMM sends it.
/// The descriptors of a request that is not complete are open in this process.
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// There is no answer under way.
const NOT_SENDING: u64 = u64::MAX;

/// What the reactor knows of a connection.
#[derive(Debug)]
pub(super) struct ConnectionState {
    pub(super) token: u64,
    pub(super) socket: Arc<OwnedFd>,
    opened: Instant,
    /// Microseconds from `opened` to the last request.
    heard: AtomicU64,
    /// A request is being answered.
    busy: AtomicBool,
    /// Microseconds from `opened` to when the thread began to send the answer that it is sending;
    /// [`NOT_SENDING`] if it sends none.
    sending: AtomicU64,
    /// It was told to end.
    closed: AtomicBool,
    /// Wakes the thread for an event; there is one only once it was subscribed to events.
    wake: OnceLock<OwnedFd>,
}

impl ConnectionState {
    pub(super) fn new(token: u64, socket: OwnedFd) -> Self {
        Self {
            token,
            socket: Arc::new(socket),
            opened: Instant::now(),
            heard: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            sending: AtomicU64::new(NOT_SENDING),
            closed: AtomicBool::new(false),
            wake: OnceLock::new(),
        }
    }

    /// When the connection was made.
    pub(super) fn opened(&self) -> Instant {
        self.opened
    }

    /// When the last request came, or the connection.
    pub(super) fn last_heard(&self) -> Instant {
        self.opened + Duration::from_micros(self.heard.load(Ordering::Relaxed))
    }

    pub(super) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    /// How long the answer that is being sent has been waiting for the other side to read.
    pub(super) fn unread_for(&self) -> Option<Duration> {
        let since = self.sending.load(Ordering::Relaxed);
        let since = (since != NOT_SENDING).then(|| self.opened + Duration::from_micros(since))?;
        Some(since.elapsed())
    }

    fn age(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(NOT_SENDING - 1)
    }

    fn begin_request(&self) {
        self.busy.store(true, Ordering::Relaxed);
        self.heard.store(self.age(), Ordering::Relaxed);
    }

    fn begin_answer(&self) {
        self.sending.store(self.age(), Ordering::Relaxed);
    }

    fn end_request(&self) {
        self.sending.store(NOT_SENDING, Ordering::Relaxed);
        self.busy.store(false, Ordering::Relaxed);
    }

    pub(super) fn is_subscribed(&self) -> bool {
        self.wake.get().is_some()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Has the thread send an event now, if the other side subscribed to events.
    pub(super) fn announce(&self) {
        if let Some(wake) = self.wake.get() {
            // A full eventfd is readable already.
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
        }
    }

    /// Ends the connection at once.
    pub(super) fn close(&self) {
        self.shut(rustix::net::Shutdown::Both);
    }

    /// Ends the connection once the request that is under way is answered and the last event sent.
    pub(super) fn finish(&self) {
        self.announce();
        self.shut(rustix::net::Shutdown::Read);
    }

    fn shut(&self, how: rustix::net::Shutdown) {
        self.closed.store(true, Ordering::Relaxed);
        // Fails only if it is not connected any more.
        let _ = rustix::net::shutdown(&self.socket, how);
    }
}

/// The thread's own part.
#[derive(Debug)]
pub(super) struct Connection {
    hub: Arc<Hub>,
    line: Arc<ConnectionState>,
    socket: FrameSocket,
    subscription: Option<Subscription>,
    /// When the frame began that is not complete.
    frame_began: Option<Instant>,
}

#[derive(Debug)]
struct Subscription {
    interval: Duration,
    due: Instant,
}

impl Connection {
    pub(super) fn new(hub: Arc<Hub>, line: Arc<ConnectionState>) -> Self {
        let socket = FrameSocket::from(line.socket.clone());
        Self { hub, line, socket, subscription: None, frame_began: None }
    }

    /// Serves until the connection ends.
    pub(super) fn run(mut self) {
        let token = self.line.token;
        // Also if a request panics: the others go on, and a VMM that is gone is known to be.
        let _ended = Ended { hub: &self.hub.clone(), line: &self.line.clone() };
        match self.serve() {
            Ok(()) | Err(SocketError::Closed) => log::debug!("connection {token} closed"),
            Err(_) if self.line.is_closed() => log::debug!("connection {token} closed"),
            Err(error) => log::warn!("connection {token} dropped: {}", crate::error::chain(&error)),
        }
    }

    fn serve(&mut self) -> Result<(), SocketError> {
        loop {
            let received = self.socket.try_recv();
            if matches!(received, Err(SocketError::Closed)) {
                self.take_wake();
            }
            self.send_event_if_due()?;
            if !matches!(received, Ok(None)) {
                self.frame_began = None;
            }
            match received {
                Ok(Some(frame)) => self.serve_request(frame)?,
                Ok(None) => self.wait()?,
                Err(error @ SocketError::LostFds { .. }) => self.refuse_request(error)?,
                Err(error) => return Err(error),
            }
        }
    }

    fn serve_request(&mut self, frame: Frame) -> Result<(), SocketError> {
        self.line.begin_request();
        let reply = self.answer(frame);
        self.send_answer(reply)
    }

    /// Answers a request whose descriptors did not arrive.
    fn refuse_request(&mut self, error: SocketError) -> Result<(), SocketError> {
        let sentence = error.to_string();
        let SocketError::LostFds { frame } = error else { return Err(error) };
        if frame.is_reply() {
            log::warn!("{sentence}");
            return Ok(());
        }
        self.line.begin_request();
        let error = RemoteError::new(ErrorCode::System, sentence);
        let reply = if frame.request >= FIRST_NATIVE_REQUEST {
            log::warn!("request {:#x} refused: {error}", frame.request);
            Some(refused(frame.request, error))
        } else {
            Awaited::after(frame.request, frame.needs_reply(), true).refusal(frame.request, &error)
        };
        self.send_answer(reply)
    }

    fn send_answer(&mut self, reply: Option<Frame>) -> Result<(), SocketError> {
        let Some(reply) = reply else {
            self.line.end_request();
            return Ok(());
        };
        self.line.begin_answer();
        let sent = self.socket.send(&reply, Instant::now() + SEND_TIMEOUT);
        self.line.end_request();
        sent
    }

    fn answer(&mut self, frame: Frame) -> Option<Frame> {
        if frame.is_reply() {
            log::warn!("an answer ({:#x}) that nobody asked for is ignored", frame.request);
            return None;
        }
        let session = &self.hub.session;
        let takes_memory = takes_memory(&frame);
        let role = session.role(self.line.token, &self.line.socket, takes_memory);
        if frame.request >= FIRST_NATIVE_REQUEST {
            let interval = match Request::decode(frame.request, &frame.body) {
                Some(Ok(Request::Subscribe { interval })) => Some(interval),
                _ => None,
            };
            return match interval.map(|interval| self.subscribe(interval)) {
                Some(Err(errno)) => Some(refused_subscription(frame.request, errno)),
                _ => Some(self.hub.session.handle_native(role, frame)),
            };
        }
        if role == Role::Operator && takes_memory {
            let denied = RemoteError::new(ErrorCode::Denied, "another connection owns the memory");
            return Awaited::of(&frame).refusal(frame.request, &denied);
        }
        session.handle_vhost_user(frame)
    }

    fn subscribe(&mut self, interval: Duration) -> Result<(), Errno> {
        if !self.line.is_subscribed() {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            // Nobody else sets it.
            let _ = self.line.wake.set(rustix::event::eventfd(0, flags)?);
        }
        self.subscription = Some(Subscription { interval, due: Instant::now() });
        Ok(())
    }

    /// Waits for the next request, or for the time of an event.
    fn wait(&mut self) -> Result<(), SocketError> {
        let ends = self.end_of_frame()?;
        let due = self.subscription.as_ref().map(|one| one.due).into_iter().chain(ends).min();
        let due = due.map(|due| due.saturating_duration_since(Instant::now()));
        let timeout = due.and_then(|due| Timespec::try_from(due).ok());
        let mut polled = vec![PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN)];
        polled.extend(self.line.wake.get().map(|wake| PollFd::new(wake, PollFlags::IN)));
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if polled.get(1).is_some_and(|wake| !wake.revents().is_empty()) {
            self.take_wake();
        }
        Ok(())
    }

    /// When the frame has to be complete that has begun.
    fn end_of_frame(&mut self) -> Result<Option<Instant>, SocketError> {
        if !self.socket.is_inside_frame() {
            return Ok(None);
        }
        let now = Instant::now();
        let began = *self.frame_began.get_or_insert(now);
        if self.hub.session.is_owner(self.line.token) {
            return Ok(None);
        }
        if now < began + FRAME_TIMEOUT {
            return Ok(Some(began + FRAME_TIMEOUT));
        }
        Err(SocketError::Timeout { what: "end of a request that had begun", waited: now - began })
    }

    /// A job changed: the event is due now.
    fn take_wake(&mut self) {
        let (Some(wake), Some(subscription)) = (self.line.wake.get(), &mut self.subscription)
        else {
            return;
        };
        let mut count = [0; 8];
        if rustix::io::read(wake, &mut count).is_ok() {
            subscription.due = Instant::now();
        }
    }

    fn send_event_if_due(&mut self) -> Result<(), SocketError> {
        let now = Instant::now();
        let Some(subscription) = self.subscription.as_mut().filter(|one| one.due <= now) else {
            return Ok(());
        };
        subscription.due = now + subscription.interval;
        let status = self.hub.session.lock().report();
        let event = Frame::request(request::code::EVENT, status.encode(Encoder::new()).finish());
        match self.socket.send(&event, now) {
            // A watcher that does not read misses events; they are small, so none is sent in part.
            Ok(()) | Err(SocketError::Timeout { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The thread is at its end.
struct Ended<'a> {
    hub: &'a Hub,
    line: &'a ConnectionState,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            log::error!("a request of connection {} panicked", self.line.token);
        }
        self.line.close();
        self.hub.session.release(self.line.token);
        self.hub.connection_ended(self.line.token);
    }
}

fn refused_subscription(request: u32, errno: Errno) -> Frame {
    refused(
        request,
        RemoteError::new(ErrorCode::System, format!("cannot make an event descriptor: {errno}")),
    )
}

fn refused(request: u32, error: RemoteError) -> Frame {
    Frame::reply(request, reply::encode_reply::<()>(&Err(error), |(), encoder| encoder))
}

/// True for requests that hand over memory, or what belongs to it: whoever sends one first is the
/// VMM. A hello does if it brings the fence word, which only a VMM has.
fn takes_memory(frame: &Frame) -> bool {
    use pageferry_protocol::control::vhost_user::FrontendReq;
    const STANDARD: [FrontendReq; 7] = [
        FrontendReq::SET_OWNER,
        FrontendReq::SET_MEM_TABLE,
        FrontendReq::ADD_MEM_REG,
        FrontendReq::REM_MEM_REG,
        FrontendReq::SET_LOG_BASE,
        FrontendReq::SET_LOG_FD,
        FrontendReq::SET_BACKEND_REQ_FD,
    ];
    const OWN: [u32; 7] = [
        request::code::ADD_BLOCK,
        request::code::REMOVE_BLOCK,
        request::code::DISCARD,
        request::code::FREE,
        request::code::POPULATE,
        request::code::SET_TRACKERS,
        request::code::START_INCOMING,
    ];
    let code = frame.request;
    let fence = code == request::code::HELLO && !frame.fds.is_empty();
    fence || OWN.contains(&code) || STANDARD.iter().any(|standard| *standard as u32 == code)
}
