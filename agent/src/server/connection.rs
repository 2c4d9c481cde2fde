// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One connection, served by its own thread.
//!
//! The thread reads a request, handles it, sends the answer, and only then reads the next request.
//! So the answers have the order of the requests. A slow request, a client that pipelines, or a
//! client that does not read its answers delays only this thread. Between two requests the thread
//! sends the events to which the client has subscribed.
//!
//! A client has `SEND_TIMEOUT` to read an answer, and `FRAME_TIMEOUT` to send a request that has
//! begun, unless it is the VMM. After that, or if the framing is broken, the connection ends.

use super::hub::Hub;
use crate::event::Event;
use crate::sandbox::{ThreadKind, enter_thread};
use crate::session::vhost_user::ExpectedReply;
use crate::upgrade::program::ProgramError;
use pageferry_protocol::control::codec::Encoder;
use pageferry_protocol::control::frame::Frame;
use pageferry_protocol::control::reply::{self, ErrorCode, RemoteError};
use pageferry_protocol::control::request::{self, FIRST_NATIVE_REQUEST, Request};
use pageferry_protocol::control::role::Role;
use pageferry_protocol::control::vhost_user::{FrontendReq, required_role};
use pageferry_protocol::control::{FrameSocket, SocketError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How long a client may leave an answer unread.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest time from the first to the last byte of a request, unless the VMM sends it. The limit is
/// needed because the descriptors of an incomplete request stay open in this process.
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// Value of `sending` while the thread sends no answer.
const NOT_SENDING: u64 = u64::MAX;

/// The state of a connection that its thread shares with the reactor's thread.
#[derive(Debug)]
pub(super) struct ConnectionState {
    pub(super) token: u64,
    pub(super) socket: Arc<OwnedFd>,
    opened: Instant,
    /// When the last request was received, in microseconds from `opened`.
    heard: AtomicU64,
    /// True while a request is handled and its answer is sent.
    busy: AtomicBool,
    /// When the thread began to send the current answer, in microseconds from `opened`;
    /// [`NOT_SENDING`] if it sends none.
    sending: AtomicU64,
    /// True once the connection was asked to end.
    closed: AtomicBool,
    /// Wakes the thread to send an event. Set when the client subscribes to events.
    wake: OnceLock<Event>,
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

    /// When the connection was accepted.
    pub(super) fn opened(&self) -> Instant {
        self.opened
    }

    /// When the last request was received, or the connection was accepted.
    pub(super) fn last_heard(&self) -> Instant {
        self.opened + Duration::from_micros(self.heard.load(Ordering::Relaxed))
    }

    /// True while a request is handled and its answer is sent.
    pub(super) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    /// How long the thread has been sending the current answer; `None` if it sends none. The send
    /// takes long only if the client does not read.
    pub(super) fn unread_for(&self) -> Option<Duration> {
        let since = self.sending.load(Ordering::Relaxed);
        let since = (since != NOT_SENDING).then(|| self.opened + Duration::from_micros(since))?;
        Some(since.elapsed())
    }

    /// Microseconds from `opened` to now.
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

    /// True if the client has subscribed to events.
    pub(super) fn is_subscribed(&self) -> bool {
        self.wake.get().is_some()
    }

    /// True once the connection was asked to end.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Wakes the thread to send an event now, if the client has subscribed to events.
    pub(super) fn announce(&self) {
        if let Some(wake) = self.wake.get() {
            wake.signal();
        }
    }

    /// Ends the connection at once.
    pub(super) fn close(&self) {
        self.shut_down(rustix::net::Shutdown::Both);
    }

    /// Ends the connection after the current request is answered and the last event is sent.
    pub(super) fn finish(&self) {
        self.announce();
        self.shut_down(rustix::net::Shutdown::Read);
    }

    fn shut_down(&self, how: rustix::net::Shutdown) {
        self.closed.store(true, Ordering::Relaxed);
        // Fails only if the socket is not connected any more.
        let _ = rustix::net::shutdown(&self.socket, how);
    }
}

/// A connection as its thread serves it.
#[derive(Debug)]
pub(super) struct Connection {
    hub: Arc<Hub>,
    state: Arc<ConnectionState>,
    socket: FrameSocket,
    subscription: Option<Subscription>,
    /// When the incomplete frame began; `None` if there is none.
    frame_began: Option<Instant>,
    /// The client has asked for an upgrade, which begins when it has its answer.
    wants_upgrade: bool,
}

/// A subscription of the client to events.
#[derive(Debug)]
struct Subscription {
    interval: Duration,
    /// When the next event must be sent.
    due: Instant,
}

impl Connection {
    pub(super) fn new(hub: Arc<Hub>, state: Arc<ConnectionState>) -> Self {
        let socket = FrameSocket::from(state.socket.clone());
        Self { hub, state, socket, subscription: None, frame_began: None, wants_upgrade: false }
    }

    /// Serves until the connection ends.
    pub(super) fn run(mut self) {
        enter_thread(ThreadKind::Control);
        let token = self.state.token;
        // This runs also if a request panics. Then the other connections continue, and the session
        // learns that the VMM's connection has ended.
        let _ended = Ended { hub: &self.hub.clone(), state: &self.state.clone() };
        match self.serve() {
            Ok(()) | Err(SocketError::Closed) => log::debug!("connection {token} closed"),
            Err(_) if self.state.is_closed() => log::debug!("connection {token} closed"),
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

    /// Handles a request and sends its answer.
    fn serve_request(&mut self, frame: Frame) -> Result<(), SocketError> {
        self.state.begin_request();
        let reply = self.answer(frame);
        let sent = self.send_answer(reply);
        if std::mem::take(&mut self.wants_upgrade) {
            self.hub.want_upgrade();
        }
        sent
    }

    /// Answers a request whose descriptors did not arrive.
    fn refuse_request(&mut self, error: SocketError) -> Result<(), SocketError> {
        let sentence = error.to_string();
        let SocketError::LostFds { frame } = error else { return Err(error) };
        if frame.is_reply() {
            log::warn!("{sentence}");
            return Ok(());
        }
        self.state.begin_request();
        let error = RemoteError::new(ErrorCode::System, sentence);
        let reply = if frame.request >= FIRST_NATIVE_REQUEST {
            log::warn!("request {:#x} refused: {error}", frame.request);
            Some(refused(frame.request, error))
        } else {
            ExpectedReply::to_request(frame.request, frame.needs_reply(), true)
                .refusal_reply(frame.request, &error)
        };
        self.send_answer(reply)
    }

    /// Sends the answer, if there is one, and ends the request.
    fn send_answer(&mut self, reply: Option<Frame>) -> Result<(), SocketError> {
        let Some(reply) = reply else {
            self.state.end_request();
            return Ok(());
        };
        self.state.begin_answer();
        let sent = self.socket.send(&reply, Instant::now() + SEND_TIMEOUT);
        self.state.end_request();
        sent
    }

    /// Handles a request. Returns the answer; `None` if the request has none.
    fn answer(&mut self, frame: Frame) -> Option<Frame> {
        if frame.is_reply() {
            log::warn!("an answer ({:#x}) without a request is ignored", frame.request);
            return None;
        }
        if frame.request >= FIRST_NATIVE_REQUEST {
            Some(self.answer_native(frame))
        } else {
            self.answer_vhost_user(frame)
        }
    }

    fn answer_native(&mut self, frame: Frame) -> Frame {
        let Frame { request: code, body, fds, .. } = frame;
        let request = Request::decode(code, &body);
        // A subscription that comes with descriptors is refused below.
        if let Some(Ok(Request::Subscribe { interval })) = &request
            && fds.is_empty()
            && let Err(error) = self.subscribe(*interval)
        {
            return refused_subscription(code, &error);
        }
        if let Some(Ok(Request::Upgrade { program })) = &request
            && fds.is_empty()
        {
            if let Err(error) = self.hub.upgrade.check(program) {
                return refused(code, refused_program(&error));
            }
            self.wants_upgrade = true;
        }
        // A hello that lacks the fence word is refused, and must not take the memory from the VMM.
        let claims = match &request {
            Some(Ok(Request::Hello { .. })) if fds.is_empty() => false,
            Some(Ok(request)) => request.claims_memory(),
            _ => false,
        };
        self.claiming(claims, |role| self.hub.session.handle_native(role, code, request, fds))
    }

    fn answer_vhost_user(&self, frame: Frame) -> Option<Frame> {
        // An unknown number is refused by its own error.
        let required = FrontendReq::try_from(frame.request).map_or(Role::Operator, required_role);
        self.claiming(required == Role::Vmm, |role| {
            if role < required {
                let sentence = "another connection owns the memory";
                let denied = RemoteError::new(ErrorCode::Denied, sentence);
                return ExpectedReply::of(&frame).refusal_reply(frame.request, &denied);
            }
            self.hub.session.handle_vhost_user(frame)
        })
    }

    /// Handles a request with the role of this connection. If no connection owns the memory yet,
    /// one that `claims` it becomes the VMM, unless the request is refused.
    fn claiming<T>(&self, claims: bool, handle: impl FnOnce(Role) -> T) -> T {
        let (session, token) = (&self.hub.session, self.state.token);
        let is_new = claims && !session.is_owner(token);
        let answer = handle(session.role(token, &self.state.socket, claims));
        if is_new {
            session.release_if_empty(token);
        }
        answer
    }

    /// Subscribes the client to events. The first event is due at once.
    fn subscribe(&mut self, interval: Duration) -> std::io::Result<()> {
        if !self.state.is_subscribed() {
            // Cannot fail: only this thread sets it.
            let _ = self.state.wake.set(Event::new()?);
        }
        self.subscription = Some(Subscription { interval, due: Instant::now() });
        Ok(())
    }

    /// Waits until bytes of a request arrive, an event is due, or the time for a request that has
    /// begun is over.
    fn wait(&mut self) -> Result<(), SocketError> {
        let ends = self.end_of_frame()?;
        let due = self.subscription.as_ref().map(|one| one.due).into_iter().chain(ends).min();
        let due = due.map(|due| due.saturating_duration_since(Instant::now()));
        let timeout = due.and_then(|due| Timespec::try_from(due).ok());
        let mut polled = vec![PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN)];
        polled.extend(self.state.wake.get().map(|wake| PollFd::new(wake, PollFlags::IN)));
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if polled.get(1).is_some_and(|wake| !wake.revents().is_empty()) {
            self.take_wake();
        }
        Ok(())
    }

    /// The deadline for a frame that has begun; `None` if there is none.
    ///
    /// # Errors
    /// If the deadline has passed.
    fn end_of_frame(&mut self) -> Result<Option<Instant>, SocketError> {
        if !self.socket.is_inside_frame() {
            return Ok(None);
        }
        let now = Instant::now();
        let began = *self.frame_began.get_or_insert(now);
        if self.hub.session.is_owner(self.state.token) {
            return Ok(None);
        }
        if now < began + FRAME_TIMEOUT {
            return Ok(Some(began + FRAME_TIMEOUT));
        }
        Err(SocketError::Timeout { what: "end of a request that had begun", waited: now - began })
    }

    /// Resets the event descriptor. If it was set, a job has changed, and the event is due now.
    fn take_wake(&mut self) {
        let (Some(wake), Some(subscription)) = (self.state.wake.get(), &mut self.subscription)
        else {
            return;
        };
        if wake.reset() {
            subscription.due = Instant::now();
        }
    }

    fn send_event_if_due(&mut self) -> Result<(), SocketError> {
        let now = Instant::now();
        let Some(subscription) = self.subscription.as_mut().filter(|one| one.due <= now) else {
            return Ok(());
        };
        subscription.due = now + subscription.interval;
        let status = self.hub.session.lock().reported_status();
        let event = Frame::request(request::code::EVENT, status.encode(Encoder::new()).finish());
        match self.socket.send(&event, now) {
            // A client that does not read misses this event. An event is small, so it is sent whole
            // or not at all.
            Ok(()) | Err(SocketError::Timeout { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Reports on drop that the thread has ended, also after a panic.
struct Ended<'a> {
    hub: &'a Hub,
    state: &'a ConnectionState,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            log::error!("a request of connection {} panicked", self.state.token);
        }
        self.state.close();
        self.hub.session.connection_ended(self.state.token);
        self.hub.connection_ended(self.state.token);
    }
}

/// The answer to a subscription that failed.
fn refused_subscription(request: u32, error: &std::io::Error) -> Frame {
    refused(
        request,
        RemoteError::new(ErrorCode::System, format!("cannot create an event descriptor: {error}")),
    )
}

/// Why there is no upgrade to this program.
fn refused_program(error: &ProgramError) -> RemoteError {
    let code = match error {
        ProgramError::NotUpgradable => ErrorCode::State,
        ProgramError::UnderWay(_) => ErrorCode::Busy,
        _ => ErrorCode::Invalid,
    };
    RemoteError::new(code, crate::error::chain(error))
}

/// The answer to a native request that is refused.
fn refused(request: u32, error: RemoteError) -> Frame {
    Frame::reply(request, reply::encode_reply::<()>(&Err(error), |(), encoder| encoder))
}
