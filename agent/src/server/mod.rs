//! The sockets that VMMs and operators ask on.
//!
//! - `connection`: one connection, on a thread of its own: requests in, answers and events out;
//! - this file: the reactor's thread.
//!
//! The reactor's thread takes new connections, signals, and the news that a job changed or that
//! the other side of a connection hung up. It never waits for anything else ([`crate::waiting`]).
//! A connection that breaks the framing ends, and nothing else does.
//!
//! There are at most `MAX_CONNECTIONS` connections. When there is no place left for a new one, a
//! connection makes room that has not read its answer for a moment, else the one that has been
//! silent for longest. The new one waits for that, and those behind it wait in the listener's
//! queue. If nobody makes room within a moment, since all keep asking, the oldest connection does.
//! The VMM's connection never makes room. So neither connections that are idle nor those that flood
//! the agent keep out a VMM or an operator for long.

mod connection;

use crate::reactor::Reactor;
use crate::session::shared::SharedSession;
use crate::transport::backoff::{self, Backoff};
use crate::transport::unix_path::UnixPathListener;
use crate::waiting::{NoWait, may_wait};
use connection::{Connection, ConnectionState};
use rustix::process::{Resource, getrlimit};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const LISTENER: u64 = 0;
const NOTIFY: u64 = 1;
const SIGNALS: u64 = 2;
const FIRST_CONNECTION: u64 = 16;
/// Most connections at once.
const MAX_CONNECTIONS: usize = 128;
/// How long the end of the agent waits for the requests that are under way.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection makes room for a new one if it has been silent, or has not read its answer, for
/// this long. A new one waits for such a connection for this long, too.
const MOMENT: Duration = Duration::from_millis(100);
/// Time between two looks for a connection that makes room.
const LOOK: Duration = Duration::from_millis(20);

/// Serves one VM.
#[derive(Debug)]
pub struct Server {
    reactor: Reactor,
    listener: Option<UnixPathListener>,
    backoff: Backoff,
    /// No connection is accepted before this.
    accept_again: Option<Instant>,
    /// A new connection that waits for a place since then.
    waiting: Option<(OwnedFd, Instant)>,
    connections: BTreeMap<u64, (Arc<ConnectionState>, JoinHandle<()>)>,
    next_token: u64,
    hub: Arc<Hub>,
    /// Ends the agent with that connection, which it inherited.
    inherited: Option<u64>,
    signals: Option<OwnedFd>,
    /// A signal came.
    stopping: bool,
}

/// What the connections' threads share with the reactor's.
#[derive(Debug)]
struct Hub {
    session: SharedSession,
    /// Wakes the reactor.
    notify: Arc<OwnedFd>,
    ended: Mutex<Vec<u64>>,
}

impl Hub {
    fn connection_ended(&self, token: u64) {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).push(token);
        // A full eventfd is readable already.
        let _ = rustix::io::write(&self.notify, &1u64.to_ne_bytes());
    }
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
        let session = SharedSession::new(notify.clone())?;
        Ok(Self {
            reactor,
            listener: None,
            backoff: Backoff::default(),
            accept_again: None,
            waiting: None,
            connections: BTreeMap::new(),
            next_token: FIRST_CONNECTION,
            hub: Arc::new(Hub { session, notify, ended: Mutex::default() }),
            inherited: None,
            signals: None,
            stopping: false,
        })
    }

    /// Listens on `path`.
    ///
    /// # Errors
    /// What the kernel said, or what there is at the path; `AddrInUse` if another agent listens
    /// there.
    pub fn listen(&mut self, path: &Path) -> io::Result<()> {
        let listener = UnixPathListener::bind(path)?;
        listener.set_nonblocking()?;
        self.reactor.add(listener.as_fd(), LISTENER)?;
        self.listener = Some(listener);
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

    /// Serves until a signal comes or the inherited connection ends. A job that runs is cancelled
    /// and undone first; a postcopy is finished, if it is not paused.
    ///
    /// # Errors
    /// If the reactor fails.
    pub fn run(&mut self) -> io::Result<()> {
        let outcome = self.serve();
        self.hub.session.wind_down();
        self.end_connections();
        outcome
    }

    fn serve(&mut self) -> io::Result<()> {
        let _no_wait = NoWait::begin();
        loop {
            for token in self.reactor.wait(self.next_due())? {
                match token {
                    LISTENER => self.accept(),
                    NOTIFY => self.announce(),
                    SIGNALS => self.stop(),
                    token => self.hub.session.hung_up(token),
                }
            }
            self.resume_accepting();
            if self.stopping && self.hub.session.lock().is_idle() {
                return Ok(());
            }
            if self.inherited.is_some_and(|token| !self.connections.contains_key(&token)) {
                return Ok(());
            }
        }
    }

    /// A signal came: what runs is ended, and what cannot be is brought to its end. Until then
    /// everybody is answered: a VMM whose guest waits for memory takes an agent that does not
    /// answer for dead.
    fn stop(&mut self) {
        self.stopping = true;
        if let Some(signals) = self.signals.take() {
            self.reactor.remove(signals.as_fd());
        }
        self.hub.session.lock().stop();
    }

    fn next_due(&self) -> Option<Duration> {
        self.accept_again.map(|due| due.saturating_duration_since(Instant::now()))
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let accepted = match listener.accept() {
            Ok(socket) => socket,
            Err(error) if is_momentary(&error) => return,
            Err(error) => return self.pause_accepting(&error),
        };
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
        self.admit(accepted, Instant::now());
    }

    /// Serves a connection that is waiting for a place since then, or lets it wait on.
    fn admit(&mut self, socket: OwnedFd, since: Instant) {
        if !self.make_room(since.elapsed() >= MOMENT) {
            self.waiting = Some((socket, since));
            return self.accept_after(LOOK);
        }
        if let Err(error) = self.add_connection(socket) {
            self.pause_accepting(&error);
        }
    }

    /// The process has no room for another connection: it has some again in a moment, or never.
    fn pause_accepting(&mut self, error: &io::Error) {
        self.backoff.failed(error, Instant::now());
        self.accept_after(backoff::PAUSE);
    }

    /// Leaves new connections in the listener's queue for this long.
    fn accept_after(&mut self, pause: Duration) {
        if let Some(listener) = &self.listener {
            if self.accept_again.is_none() {
                self.reactor.remove(listener.as_fd());
            }
            self.accept_again = Some(Instant::now() + pause);
        }
    }

    fn resume_accepting(&mut self) {
        if self.accept_again.is_none_or(|due| due > Instant::now()) {
            return;
        }
        let due = self.accept_again;
        if let Some((socket, since)) = self.waiting.take() {
            self.admit(socket, since);
            // It waits on, or the process has no room for it.
            if self.accept_again != due {
                return;
            }
        }
        let Some(listener) = &self.listener else { return };
        match self.reactor.add(listener.as_fd(), LISTENER) {
            Ok(()) => self.accept_again = None,
            Err(error) => self.pause_accepting(&error),
        }
    }

    /// Makes sure that there is a place for one more connection; false if there is none now. If
    /// `anyone` may make room, there is one but for the VMM's connection.
    fn make_room(&mut self, anyone: bool) -> bool {
        let open =
            || self.connections.values().map(|(line, _)| line).filter(|line| !line.is_closed());
        if open().count() < max_connections() {
            return true;
        }
        let may_go = |line: &&Arc<ConnectionState>| {
            self.inherited != Some(line.token) && !self.hub.session.is_owner(line.token)
        };
        let now = Instant::now();
        let unread =
            |line: &Arc<ConnectionState>| line.unread_for().filter(|unread| *unread >= MOMENT);
        let silent = |line: &Arc<ConnectionState>| {
            !line.is_busy() && now.saturating_duration_since(line.last_heard()) >= MOMENT
        };
        let unread_longest = open()
            .filter(may_go)
            .filter(|line| unread(line).is_some())
            .max_by_key(|line| unread(line));
        // Who watches a job may have nothing to say for long.
        let silent_longest = || {
            let silent = open().filter(may_go).filter(|line| silent(line));
            silent.min_by_key(|line| (line.is_subscribed(), line.last_heard()))
        };
        let oldest = || {
            open()
                .filter(may_go)
                .filter(|_| anyone)
                .min_by_key(|line| (line.is_subscribed(), line.opened()))
        };
        let (line, why) = if let Some(line) = unread_longest {
            (line, "it does not read its answers")
        } else if let Some(line) = silent_longest() {
            (line, "it is silent for longest")
        } else if let Some(line) = oldest() {
            (line, "it is the oldest")
        } else {
            return false;
        };
        log::warn!(
            "more than {} connections: connection {} ends, {why}",
            max_connections(),
            line.token
        );
        line.close();
        true
    }

    fn add_connection(&mut self, socket: OwnedFd) -> io::Result<u64> {
        let token = self.next_token;
        let line = Arc::new(ConnectionState::new(token, socket));
        self.reactor.add_hangup(line.socket.as_fd(), token)?;
        let connection = Connection::new(self.hub.clone(), line.clone());
        let thread = std::thread::Builder::new().name(format!("connection-{token}"));
        match thread.spawn(move || connection.run()) {
            Ok(thread) => {
                self.next_token += 1;
                self.connections.insert(token, (line, thread));
                Ok(token)
            }
            Err(error) => {
                self.reactor.remove(line.socket.as_fd());
                Err(error)
            }
        }
    }

    /// A job changed, and all subscribers hear of it now; or a connection ended.
    fn announce(&mut self) {
        let mut count = [0; 8];
        // Only resets the descriptor.
        let _ = rustix::io::read(&self.hub.notify, &mut count);
        self.hub.session.lock().job_changed();
        self.forget_ended();
        self.connections.values().for_each(|(line, _)| line.announce());
    }

    fn forget_ended(&mut self) {
        let ended =
            std::mem::take(&mut *self.hub.ended.lock().unwrap_or_else(PoisonError::into_inner));
        for token in ended {
            if let Some((line, _thread)) = self.connections.remove(&token) {
                // The thread is at its end; nobody needs to wait for it.
                self.reactor.remove(line.socket.as_fd());
            }
        }
    }

    /// Lets every connection answer what it was asked, and send the last event.
    fn end_connections(&mut self) {
        may_wait("wait for the requests that are under way");
        let deadline = Instant::now() + END_TIMEOUT;
        self.connections.values().for_each(|(line, _)| line.finish());
        while !self.connections.is_empty() && Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            let waited = pageferry_protocol::control::socket::wait(
                self.hub.notify.as_fd(),
                rustix::event::PollFlags::IN,
                Instant::now() + left,
            );
            if waited.is_err() {
                break;
            }
            let mut count = [0; 8];
            // Only resets the descriptor.
            let _ = rustix::io::read(&self.hub.notify, &mut count);
            self.forget_ended();
        }
        for (token, (line, _)) in &self.connections {
            log::warn!("a request of connection {token} has not ended: the agent does without it");
            line.close();
        }
    }
}

/// Connections leave most of the process's descriptors to the VMM's memory and to jobs.
fn max_connections() -> usize {
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(descriptors / 4).unwrap_or(MAX_CONNECTIONS).clamp(2, MAX_CONNECTIONS)
}

/// The connection is gone again, or there was none.
fn is_momentary(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}
