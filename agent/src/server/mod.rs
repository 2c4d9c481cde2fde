// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket of the agent: it accepts the connections of a VMM and of operators.
//!
//! - `connection`: one connection, served by its own thread: requests in, answers and events out;
//! - `listener`: the control socket, bound here or inherited;
//! - `hub`: what the threads of the connections share with the reactor's thread;
//! - this file: the reactor's thread.
//!
//! The reactor's thread accepts connections. It also reacts to signals, to changes of a job, and to
//! clients that close their connection. It never waits for anything else ([`crate::waiting`]). If a
//! client breaks the framing, only its own connection ends.
//!
//! There are at most `MAX_CONNECTIONS` connections. When a new connection arrives and the limit is
//! reached, the server closes another connection, chosen in this order:
//!
//! 1. a connection that has not read an answer for `GRACE`: the one that waits for longest;
//! 2. a connection that has sent no request for `GRACE` and has all its answers: the one that is
//!    silent for longest;
//! 3. after the new connection has waited for `GRACE`, because all others keep sending requests:
//!    the oldest connection.
//!
//! Connections that have subscribed to events are the last choice in 2 and 3. The VMM's connection
//! is never closed. While the new connection waits, further ones stay in the listener's queue. So
//! idle connections, and connections that flood the agent, do not keep a VMM or an operator out for
//! long.

mod connection;
mod hub;
mod listener;

use crate::devices::registry::NewDevice;
use crate::metrics::MetricsServer;
use crate::reactor::Reactor;
use crate::session::shared::SharedSession;
use crate::systemd::Notifier;
use crate::transport::Listener;
use crate::transport::backoff::{self, Backoff, is_momentary};
use crate::transport::unix_path::UnixPathListener;
use crate::transport::unix_socket::check_peer;
use crate::trust::Trust;
use crate::upgrade::HandedOver;
use crate::upgrade::last_job::LastJob;
use crate::upgrade::program::{Program, ProgramError};
use crate::vm_name::VmName;
use crate::waiting::{NoWait, may_wait};
use connection::{Connection, ConnectionState};
use hub::{Hub, HubMemory};
use listener::ControlListener;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, getrlimit};
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Token of the listener in the reactor.
const LISTENER: u64 = 0;
/// Token of [`Hub::notify`].
const NOTIFY: u64 = 1;
/// Token of the signal descriptor.
const SIGNALS: u64 = 2;
/// Token of the socket that tells of a request for an upgrade.
const UPGRADE: u64 = 3;
/// Token of the first connection; the others follow.
const FIRST_CONNECTION: u64 = 16;
/// Most connections at once.
const MAX_CONNECTIONS: usize = 128;
/// How long the agent waits at its end for requests that are not answered yet.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection may be closed for a new one if it has been silent, or has not read its answer, for
/// this long. After a new connection has waited for this long, any connection may be closed.
const GRACE: Duration = Duration::from_millis(100);
/// Time between two attempts to find a connection that can be closed.
const ROOM_RETRY: Duration = Duration::from_millis(20);

/// Serves one VM.
#[derive(Debug)]
pub struct Server {
    reactor: Reactor,
    listener: Option<ControlListener>,
    backoff: Backoff,
    /// The time before which no connection is accepted; `None` while connections are accepted.
    accept_again: Option<Instant>,
    /// An accepted connection that waits for a place, and when it began to wait.
    waiting: Option<(OwnedFd, Instant)>,
    connections: BTreeMap<u64, (Arc<ConnectionState>, JoinHandle<()>)>,
    next_token: u64,
    hub: Arc<Hub>,
    /// Token of the connection that this process inherited. The agent ends with it.
    inherited: Option<u64>,
    signals: Option<OwnedFd>,
    /// True once a signal was received, or the inherited connection has ended.
    stopping: bool,
    /// Readable when the agent is to be upgraded.
    upgrades: Option<UnixStream>,
    /// True once the agent is to be upgraded.
    upgrading: bool,
    /// Answers scrapes of the metrics, on a thread of its own.
    metrics: Option<MetricsServer>,
    /// Tells the service manager what this process does.
    notifier: Option<Notifier>,
}

/// What the next program of this process gets.
#[derive(Debug)]
pub struct Upgrade {
    /// The control socket.
    pub control: HandedOver,
    /// The program.
    pub program: Program,
    /// A job runs that the next program continues, as if this process had died. Its threads use
    /// what the server has until the program is executed.
    pub job_continues: bool,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Their threads have the hub for a moment now and then, and could not wait for themselves.
        self.hub.session.devices().stop();
    }
}

impl Server {
    /// A server that does not listen yet, and serves the VM of this name.
    ///
    /// # Errors
    /// If the kernel refuses a descriptor.
    pub fn new(vm_name: VmName) -> io::Result<Self> {
        let mut reactor = Reactor::new()?;
        let notify = crate::job::notifier()?;
        reactor.add(notify.as_fd(), NOTIFY)?;
        let session = SharedSession::new(notify.clone(), vm_name)?;
        let hub = Arc::new(Hub::new(session, notify));
        let memory = Arc::new(HubMemory(Arc::downgrade(&hub)));
        hub.session.devices().set_session(memory);
        Ok(Self {
            reactor,
            listener: None,
            backoff: Backoff::default(),
            accept_again: None,
            waiting: None,
            connections: BTreeMap::new(),
            next_token: FIRST_CONNECTION,
            hub,
            inherited: None,
            signals: None,
            stopping: false,
            upgrades: None,
            upgrading: false,
            metrics: None,
            notifier: None,
        })
    }

    /// Listens on `path`.
    ///
    /// # Errors
    /// If the path cannot be bound; `AddrInUse` if another process listens there.
    pub fn listen(&mut self, path: &Path) -> io::Result<()> {
        self.listen_on(ControlListener::Bound(UnixPathListener::bind(path)?))
    }

    /// Listens on a socket that this process inherited from a service manager. Its path stays when
    /// the server ends.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn listen_on_inherited(&mut self, socket: OwnedFd) -> io::Result<()> {
        self.listen_on(ControlListener::Inherited(socket))
    }

    fn listen_on(&mut self, listener: ControlListener) -> io::Result<()> {
        listener.set_nonblocking()?;
        self.reactor.add(listener.as_fd(), LISTENER)?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Listens on the socket that this process had before it was upgraded. It has listened on
    /// `path`, if that is the agent's own.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn listen_again(&mut self, handed_over: HandedOver, path: Option<&Path>) -> io::Result<()> {
        let HandedOver { socket, file, last_job } = handed_over;
        if let Some(status) = last_job.and_then(LastJob::read) {
            self.hub.session.lock().remember_job(status);
        }
        self.listen_on(match path.zip(file) {
            Some((path, file)) => {
                ControlListener::Bound(UnixPathListener::adopt(socket, path, file))
            }
            None => ControlListener::Inherited(socket),
        })
    }

    /// Tells the service manager by `notifier` what this process does, from now on.
    pub fn report_to(&mut self, notifier: Notifier) {
        self.notifier = Some(notifier);
        self.report();
    }

    /// Answers scrapes of the metrics on `listener`, until the server ends.
    ///
    /// # Errors
    /// If the kernel refuses a thread or a descriptor.
    pub fn serve_metrics(&mut self, listener: Listener) -> io::Result<()> {
        let hub = self.hub.clone();
        self.metrics = Some(MetricsServer::start(listener, move || hub.sample())?);
        Ok(())
    }

    /// From now on jobs trust these on a network.
    pub fn trust(&self, trust: Trust) {
        self.hub.session.lock().trust = trust;
    }

    /// Makes a device for the guest, whose front-ends connect to `path`.
    ///
    /// # Errors
    /// If the path cannot be bound, or the kernel refuses a thread.
    pub fn serve_device(&self, device: NewDevice, path: &Path) -> io::Result<()> {
        self.hub.session.devices().listen(device, path)
    }

    /// Serves a connection that this process inherited from the VMM that started it. The server
    /// ends when this connection ends.
    ///
    /// # Errors
    /// If the kernel refuses a thread or a descriptor.
    pub fn inherit(&mut self, socket: OwnedFd) -> io::Result<()> {
        self.inherited = Some(self.add_connection(socket)?);
        Ok(())
    }

    /// Stops when `signals` becomes readable.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn stop_on(&mut self, signals: OwnedFd) -> io::Result<()> {
        self.reactor.add(signals.as_fd(), SIGNALS)?;
        self.signals = Some(signals);
        Ok(())
    }

    /// Ends for an upgrade when `upgrades` becomes readable or an operator asks for it, and no job
    /// runs that the next program could not continue. For a server that listens. `program` is the
    /// one that runs.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn upgrade_on(&mut self, upgrades: UnixStream, program: Program) -> io::Result<()> {
        self.hub.upgrade.allow(program);
        upgrades.set_nonblocking(true)?;
        self.reactor.add(upgrades.as_fd(), UPGRADE)?;
        self.upgrades = Some(upgrades);
        Ok(())
    }

    /// Serves until a signal is received or the inherited connection ends. Before this returns, a
    /// running job is cancelled and undone. A postcopy is completed instead, unless it is paused.
    ///
    /// Ends also for an upgrade, and then returns what the next program gets.
    ///
    /// # Errors
    /// If the reactor fails.
    pub fn run(&mut self) -> io::Result<Option<Upgrade>> {
        let outcome = self.serve();
        let job_continues = self.upgrading && !self.stopping && !self.hub.session.lock().is_idle();
        if outcome.is_ok() && job_continues {
            // Nothing is undone, since the guest needs what the job does.
            self.fall_silent();
            return self.hand_over(job_continues);
        }
        self.hub.session.stop_and_join();
        self.hub.session.devices().stop();
        self.metrics = None;
        self.end_connections();
        outcome?;
        self.hand_over(job_continues)
    }

    /// Ends all connections before this program is replaced in the middle of a job. From here on
    /// the job may fail, since the kernel refuses threads to a process that executes a program
    /// (EAGAIN). Nobody may hear of that: its VMM would give the memory up.
    fn fall_silent(&self) {
        // Locked, so that nobody asks for the status in between.
        let session = self.hub.session.lock();
        session.close_hooks();
        self.connections.values().for_each(|(connection, _)| connection.close());
    }

    /// What the next program gets, if this server ends for an upgrade.
    fn hand_over(&mut self, job_continues: bool) -> io::Result<Option<Upgrade>> {
        if !self.upgrading || self.stopping {
            return Ok(None);
        }
        let (listener, program) = (self.listener.take(), self.hub.upgrade.wanted());
        let Some((listener, program)) = listener.zip(program) else { return Ok(None) };
        let last_job = self.hub.session.lock().ended_job();
        let control = listener.hand_over()?.with_last_job(last_job.as_ref());
        Ok(Some(Upgrade { control, program, job_continues }))
    }

    /// True if a signal has asked this server to end that it has not reacted to.
    pub fn was_asked_to_end(&self) -> bool {
        let waits = |signals| {
            let mut polled = [PollFd::new(signals, PollFlags::IN)];
            poll(&mut polled, Some(&Timespec::default())).is_ok_and(|count| count > 0)
        };
        self.signals.as_ref().is_some_and(waits)
    }

    /// The loop of the reactor's thread.
    fn serve(&mut self) -> io::Result<()> {
        let _no_wait = NoWait::begin();
        loop {
            for token in self.reactor.wait(self.next_due())? {
                match token {
                    LISTENER => self.accept(),
                    NOTIFY => self.announce(),
                    SIGNALS => self.stop(),
                    UPGRADE => self.check_upgrade(),
                    token => self.hub.session.connection_hung_up(token),
                }
            }
            self.resume_accepting();
            self.sign_of_life();
            // A postcopy whose VMM is gone continues. Until it has ended, operators are answered.
            let is_left =
                self.inherited.is_some_and(|token| !self.connections.contains_key(&token));
            if is_left && !self.stopping {
                self.stop();
            }
            let ends = match (self.stopping, self.upgrading) {
                (true, _) => self.hub.session.lock().is_idle(),
                (_, true) => self.hub.session.lock().survives_agent(),
                (false, false) => false,
            };
            if ends {
                return Ok(());
            }
        }
    }

    /// Reacts to a signal, or to the end of the inherited connection: the session cancels its job,
    /// or completes it if it cannot be cancelled.
    /// Until then the agent still answers all connections. A VMM whose guest waits for memory would
    /// take an agent that does not answer for dead.
    fn stop(&mut self) {
        self.stopping = true;
        if let Some(signals) = self.signals.take() {
            self.reactor.remove(signals.as_fd());
        }
        self.hub.session.lock().stop();
        if let Some(notifier) = &self.notifier {
            notifier.stopping();
        }
    }

    /// Reacts to a signal that asks for an upgrade: a thread checks the program. If it is good, the
    /// upgrade is prepared.
    fn check_upgrade(&mut self) {
        // However many requests there were.
        if let Some(upgrades) = &mut self.upgrades {
            while upgrades.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
        }
        let hub = self.hub.clone();
        let check = move || match hub.upgrade.check("") {
            Ok(()) => hub.want_upgrade(),
            Err(ProgramError::UnderWay(_)) => {}
            Err(error) => log::error!("the agent is not upgraded: {}", crate::error::chain(&error)),
        };
        let thread = std::thread::Builder::new().name("upgrade".into());
        if let Err(error) = thread.spawn(check) {
            log::error!("the agent is not upgraded: cannot start a thread: {error}");
        }
    }

    /// Prepares an upgrade. A job that runs goes on, and no other is started: one whose guest needs
    /// memory would end with this program, and the next one continues it.
    fn prepare_upgrade(&mut self) {
        if !std::mem::replace(&mut self.upgrading, true) {
            let mut session = self.hub.session.lock();
            session.prepare_upgrade();
            let waits = if session.survives_agent() { "" } else { " when its job has ended" };
            log::info!("the agent is upgraded{waits}");
        }
    }

    /// Tells the service manager that this process works, if that is due: this thread runs, and
    /// the session's lock is free, so requests are answered.
    fn sign_of_life(&mut self) {
        if let Some(notifier) = &mut self.notifier
            && notifier.sign_of_life_due() == Some(Duration::ZERO)
        {
            drop(self.hub.session.lock());
            notifier.sign_of_life();
        }
    }

    /// Tells the service manager the job and its phase.
    fn report(&mut self) {
        if let Some(notifier) = &mut self.notifier {
            notifier.status(&self.hub.session.lock().describe_job());
        }
    }

    /// How long the reactor may wait; `None` for no limit.
    fn next_due(&self) -> Option<Duration> {
        let accept = self.accept_again.map(|due| due.saturating_duration_since(Instant::now()));
        let sign_of_life = self.notifier.as_ref().and_then(Notifier::sign_of_life_due);
        accept.into_iter().chain(sign_of_life).min()
    }

    /// Accepts a connection. Only the user of this process and root may connect.
    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let accepted = match listener.accept() {
            Ok(socket) => socket,
            Err(error) if is_momentary(&error) => return,
            Err(error) => return self.pause_accepting(&error),
        };
        if let Err(error) = check_peer(&accepted) {
            log::warn!("{}", crate::error::chain(&error));
            return;
        }
        self.admit(accepted, Instant::now());
    }

    /// Serves a new connection that has waited for a place since `since`. If there is still no
    /// place, the connection waits on.
    fn admit(&mut self, socket: OwnedFd, since: Instant) {
        if !self.make_room(since.elapsed() >= GRACE) {
            self.waiting = Some((socket, since));
            return self.accept_after(ROOM_RETRY);
        }
        if let Err(error) = self.add_connection(socket) {
            self.pause_accepting(&error);
        }
    }

    /// Accepts no connection for [`backoff::PAUSE`], because the process has no descriptor or
    /// memory for one. That may end soon, or never.
    fn pause_accepting(&mut self, error: &io::Error) {
        self.backoff.failed(error, Instant::now());
        self.accept_after(backoff::PAUSE);
    }

    /// Leaves new connections in the listener's queue for the time `pause`.
    fn accept_after(&mut self, pause: Duration) {
        if let Some(listener) = &self.listener {
            if self.accept_again.is_none() {
                self.reactor.remove(listener.as_fd());
            }
            self.accept_again = Some(Instant::now() + pause);
        }
    }

    /// Accepts connections again once the pause is over. The connection that waits comes first.
    fn resume_accepting(&mut self) {
        if self.accept_again.is_none_or(|due| due > Instant::now()) {
            return;
        }
        let due = self.accept_again;
        if let Some((socket, since)) = self.waiting.take() {
            self.admit(socket, since);
            // There is still no place, or the process has no resources for the connection.
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

    /// Makes sure that there is a place for one more connection. If necessary, closes one as the
    /// header of this file describes. Returns false if no connection may be closed now. With
    /// `close_any`, even a busy connection may be closed; the VMM's never is.
    fn make_room(&mut self, close_any: bool) -> bool {
        let open = || {
            self.connections
                .values()
                .map(|(connection, _)| connection)
                .filter(|connection| !connection.is_closed())
        };
        if open().count() < max_connections() {
            return true;
        }
        let may_close = |connection: &&Arc<ConnectionState>| {
            self.inherited != Some(connection.token) && !self.hub.session.is_owner(connection.token)
        };
        let now = Instant::now();
        let unread = |connection: &Arc<ConnectionState>| {
            connection.unread_for().filter(|unread| *unread >= GRACE)
        };
        let silent = |connection: &Arc<ConnectionState>| {
            !connection.is_busy() && now.saturating_duration_since(connection.last_heard()) >= GRACE
        };
        let unread_longest = open()
            .filter(may_close)
            .filter(|connection| unread(connection).is_some())
            .max_by_key(|connection| unread(connection));
        // A client that only watches a job may send nothing for a long time.
        let silent_longest = || {
            let silent = open().filter(may_close).filter(|connection| silent(connection));
            silent.min_by_key(|connection| (connection.is_subscribed(), connection.last_heard()))
        };
        let oldest = || {
            open()
                .filter(may_close)
                .filter(|_| close_any)
                .min_by_key(|connection| (connection.is_subscribed(), connection.opened()))
        };
        let (connection, why) = if let Some(connection) = unread_longest {
            (connection, "because it does not read its answers")
        } else if let Some(connection) = silent_longest() {
            (connection, "because it has been silent for longest")
        } else if let Some(connection) = oldest() {
            (connection, "because it is the oldest")
        } else {
            return false;
        };
        log::warn!(
            "more than {} connections: connection {} is closed {why}",
            max_connections(),
            connection.token
        );
        connection.close();
        true
    }

    /// Starts the thread of a connection. Returns its token.
    fn add_connection(&mut self, socket: OwnedFd) -> io::Result<u64> {
        let token = self.next_token;
        let state = Arc::new(ConnectionState::new(token, socket));
        self.reactor.add_hangup(state.socket.as_fd(), token)?;
        let connection = Connection::new(self.hub.clone(), state.clone());
        let thread = std::thread::Builder::new().name(format!("connection-{token}"));
        match thread.spawn(move || connection.run()) {
            Ok(thread) => {
                self.next_token += 1;
                self.connections.insert(token, (state, thread));
                self.hub.set_connections(self.connections.len());
                Ok(token)
            }
            Err(error) => {
                self.reactor.remove(state.socket.as_fd());
                Err(error)
            }
        }
    }

    /// Reacts to [`Hub::notify`]: a job has changed, or a connection has ended. Wakes the threads
    /// of all subscribed connections to send an event.
    fn announce(&mut self) {
        self.hub.notify.reset();
        if self.hub.upgrade.wanted().is_some() {
            self.prepare_upgrade();
        }
        self.hub.session.lock().job_changed();
        self.hub.session.devices().wake();
        self.report();
        self.forget_ended();
        self.connections.values().for_each(|(connection, _)| connection.announce());
    }

    /// Removes the connections whose threads have ended.
    fn forget_ended(&mut self) {
        let ended = self.hub.take_ended();
        for token in ended {
            if let Some((connection, _thread)) = self.connections.remove(&token) {
                // The thread is about to return. It need not be joined.
                self.reactor.remove(connection.socket.as_fd());
            }
        }
        self.hub.set_connections(self.connections.len());
    }

    /// Ends all connections: each answers its current request and sends the last event. After
    /// [`END_TIMEOUT`] the rest is closed.
    fn end_connections(&mut self) {
        may_wait("wait for requests that are not answered yet");
        let deadline = Instant::now() + END_TIMEOUT;
        self.connections.values().for_each(|(connection, _)| connection.finish());
        while !self.connections.is_empty() && Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            let waited = pageferry_protocol::control::socket::wait(
                self.hub.notify.as_fd(),
                PollFlags::IN,
                Instant::now() + left,
            );
            if waited.is_err() {
                break;
            }
            self.hub.notify.reset();
            self.forget_ended();
        }
        for (token, (connection, _)) in &self.connections {
            log::warn!(
                "a request of connection {token} has not ended: the agent ends without its answer"
            );
            connection.close();
        }
    }
}

/// The limit of connections. They use at most a quarter of the descriptors of the process; the rest
/// is for the VMM's memory and for jobs.
fn max_connections() -> usize {
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(descriptors / 4).unwrap_or(MAX_CONNECTIONS).clamp(2, MAX_CONNECTIONS)
}
