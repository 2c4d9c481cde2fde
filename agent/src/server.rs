//! The sockets that VMMs and operators ask on.
//!
//! One thread, the reactor's, reads all of them and answers in order; jobs run on threads of their own and wake it by an event descriptor. A connection
//! that breaks the framing ends, and nothing else does.

use crate::reactor::Reactor;
use crate::session::standard::Awaited;
use crate::session::{Role, Session};
use crate::transport::address::listen_unix;
use pageferry_protocol::control::codec::Encoder;
use pageferry_protocol::control::frame::Frame;
use pageferry_protocol::control::request::{self, ErrorCode, OWN_REQUESTS, RemoteError, Request};
use pageferry_protocol::control::{FrameSocket, SocketError};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

const LISTENER: u64 = 0;
const NOTIFY: u64 = 1;
const SIGNALS: u64 = 2;
const FIRST_CONNECTION: u64 = 16;
/// How long a client may leave its answers unread.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// Most connections at once.
const MAX_CONNECTIONS: usize = 128;

/// Serves one VM.
#[derive(Debug)]
pub struct Server {
    reactor: Reactor,
    listener: Option<(UnixListener, PathBuf)>,
    connections: BTreeMap<u64, Connection>,
    next_token: u64,
    session: Session,
    /// Token of the connection that owns the session.
    owner: Option<u64>,
    /// Ends the agent with that connection, which it inherited.
    inherited: Option<u64>,
    notify: Arc<OwnedFd>,
    signals: Option<OwnedFd>,
    /// A signal came.
    stopping: bool,
}

#[derive(Debug)]
struct Connection {
    socket: FrameSocket,
    subscription: Option<Subscription>,
}

#[derive(Debug)]
struct Subscription {
    interval: Duration,
    due: Instant,
}

impl Server {
    /// A server without a socket.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn new() -> io::Result<Self> {
        let mut reactor = Reactor::new()?;
        let notify = crate::job::notifier()?;
        reactor.add(notify.as_fd(), NOTIFY)?;
        Ok(Self {
            reactor,
            listener: None,
            connections: BTreeMap::new(),
            next_token: FIRST_CONNECTION,
            session: Session::new(notify.clone()),
            owner: None,
            inherited: None,
            notify,
            signals: None,
            stopping: false,
        })
    }

    /// Listens on `path`.
    ///
    /// # Errors
    /// What the kernel said; `AddrInUse` if another agent listens there.
    pub fn listen(&mut self, path: &Path) -> io::Result<()> {
        let listener = listen_unix(path)?;
        listener.set_nonblocking(true)?;
        self.reactor.add(listener.as_fd(), LISTENER)?;
        self.listener = Some((listener, path.to_owned()));
        Ok(())
    }

    /// Serves a connection that the VMM which started this process left to it, and ends with it.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn inherit(&mut self, socket: OwnedFd) -> io::Result<()> {
        self.inherited = Some(self.add_connection(socket)?);
        Ok(())
    }

    /// Stops when `signals` becomes readable.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn stop_on(&mut self, signals: OwnedFd) -> io::Result<()> {
        self.reactor.add(signals.as_fd(), SIGNALS)?;
        self.signals = Some(signals);
        Ok(())
    }

    /// Serves until a signal comes or the inherited connection ends. A job that runs is cancelled and undone first; a postcopy is finished, if it is not paused.
    ///
    /// # Errors
    /// If the reactor fails.
    pub fn run(&mut self) -> io::Result<()> {
        let outcome = self.serve();
        self.session.wind_down();
        outcome
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            for token in self.reactor.wait(self.next_due())? {
                match token {
                    LISTENER => self.accept(),
                    NOTIFY => self.announce(),
                    SIGNALS => self.stop(),
                    token => self.serve_connection(token),
                }
            }
            self.send_due();
            if self.stopping && self.session.is_idle() {
                return Ok(());
            }
            if self.inherited.is_some_and(|token| !self.connections.contains_key(&token)) {
                return Ok(());
            }
        }
    }

    /// A signal came: what runs is ended, and what cannot be is brought to its end. Until then everybody is answered: a VMM whose guest waits for memory takes
    /// an agent that does not answer for dead.
    fn stop(&mut self) {
        self.stopping = true;
        if let Some(signals) = self.signals.take() {
            self.reactor.remove(signals.as_fd());
        }
        self.session.stop();
    }

    fn accept(&mut self) {
        let Some((listener, _)) = &self.listener else { return };
        let accepted = match listener.accept() {
            Ok((stream, _)) => OwnedFd::from(stream),
            Err(error) => {
                log::warn!("cannot accept a connection: {error}");
                return;
            }
        };
        if self.connections.len() >= MAX_CONNECTIONS {
            log::warn!("more than {MAX_CONNECTIONS} connections: one is refused");
            return;
        }
        match rustix::net::sockopt::socket_peercred(&accepted) {
            Ok(peer) if peer.uid == rustix::process::geteuid() || peer.uid.is_root() => {}
            Ok(peer) => {
                log::warn!("a connection by user {} is refused", peer.uid.as_raw());
                return;
            }
            Err(errno) => {
                log::warn!("a connection is refused, its user is not known: {errno}");
                return;
            }
        }
        if let Err(error) = self.add_connection(accepted) {
            log::warn!("cannot serve a connection: {error}");
        }
    }

    fn add_connection(&mut self, socket: OwnedFd) -> io::Result<u64> {
        let token = self.next_token;
        self.reactor.add(socket.as_fd(), token)?;
        self.next_token += 1;
        self.connections.insert(token, Connection { socket: socket.into(), subscription: None });
        Ok(token)
    }

    fn serve_connection(&mut self, token: u64) {
        loop {
            let Some(connection) = self.connections.get_mut(&token) else { return };
            let frame = match connection.socket.try_recv() {
                Ok(Some(frame)) => frame,
                Ok(None) => return,
                Err(error) => return self.drop_connection(token, &error),
            };
            if let Some(reply) = self.answer(token, frame) {
                let Some(connection) = self.connections.get(&token) else { return };
                if let Err(error) = connection.socket.send(&reply, Instant::now() + SEND_TIMEOUT) {
                    return self.drop_connection(token, &error);
                }
            }
        }
    }

    fn answer(&mut self, token: u64, frame: Frame) -> Option<Frame> {
        if frame.is_reply() {
            log::warn!("an answer ({:#x}) that nobody asked for is ignored", frame.request);
            return None;
        }
        let takes_memory = takes_memory(frame.request);
        if takes_memory && self.owner.is_none() {
            self.owner = Some(token);
        }
        let role = if self.owner == Some(token) { Role::Vmm } else { Role::Operator };
        if frame.request >= OWN_REQUESTS {
            self.subscribe(token, &frame);
            return Some(self.session.handle_own(role, frame));
        }
        if role == Role::Operator && takes_memory {
            let denied = RemoteError::new(ErrorCode::Denied, "another connection owns the memory");
            return Awaited::of(&frame).refusal(frame.request, &denied);
        }
        self.session.handle_standard(frame)
    }

    fn subscribe(&mut self, token: u64, frame: &Frame) {
        if let Some(Ok(Request::Subscribe { interval })) = Request::decode(frame.request, &frame.body)
            && let Some(connection) = self.connections.get_mut(&token)
        {
            connection.subscription = Some(Subscription { interval, due: Instant::now() });
        }
    }

    fn drop_connection(&mut self, token: u64, error: &SocketError) {
        match error {
            SocketError::Closed => log::debug!("connection {token} closed"),
            error => log::warn!("connection {token} dropped: {}", crate::error::chain(error)),
        }
        if let Some(connection) = self.connections.remove(&token) {
            self.reactor.remove(connection.socket.as_fd());
        }
        if self.owner == Some(token) {
            log::info!("the VMM is gone");
            self.owner = None;
            // Its job ends on its own thread, with the memory it started with.
            self.session.end();
            self.session = self.session.successor();
        }
    }

    /// A job changed: all subscribers hear of it now.
    fn announce(&mut self) {
        let mut count = [0; 8];
        // Only resets the descriptor.
        let _ = rustix::io::read(&self.notify, &mut count);
        self.session.job_changed();
        let now = Instant::now();
        for connection in self.connections.values_mut() {
            if let Some(subscription) = &mut connection.subscription {
                subscription.due = now;
            }
        }
    }

    fn next_due(&self) -> Option<Duration> {
        let due =
            self.connections.values().filter_map(|connection| connection.subscription.as_ref()).map(|one| one.due);
        due.min().map(|due| due.saturating_duration_since(Instant::now()))
    }

    fn send_due(&mut self) {
        let now = Instant::now();
        let mut body = None;
        let mut broken = Vec::new();
        for (token, connection) in &mut self.connections {
            let Some(subscription) = &mut connection.subscription else { continue };
            if subscription.due > now {
                continue;
            }
            subscription.due = now + subscription.interval;
            let body = body.get_or_insert_with(|| self.session.report().encode(Encoder::new()).finish());
            let event = Frame::request(request::code::EVENT, body.clone());
            match connection.socket.send(&event, now) {
                // A watcher that does not read misses events; they are small, so none is sent in part.
                Ok(()) | Err(SocketError::Timeout { .. }) => {}
                Err(error) => broken.push((*token, error)),
            }
        }
        for (token, error) in broken {
            self.drop_connection(token, &error);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some((_, path)) = &self.listener {
            // Someone else may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// True for requests that hand over memory, or what belongs to it: whoever sends one first is the VMM.
fn takes_memory(code: u32) -> bool {
    use pageferry_protocol::control::standard::FrontendReq;
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
    OWN.contains(&code) || STANDARD.iter().any(|standard| *standard as u32 == code)
}
