// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket of the agent: it accepts the connections of a VMM and of operators.
//!
//! - `admission`: who is let in, and who has to leave for that;
//! - `connection`: one connection, served by its own thread: requests in, answers and events out;
//! - `listener`: the control socket, bound here or inherited;
//! - `hub`: what the threads of the connections share with the reactor's thread;
//! - `upgrading`: the server ends for the next program of this process;
//! - this file: the reactor's thread.
//!
//! The reactor's thread accepts connections. It also reacts to signals, to changes of a job, and to
//! clients that close their connection. It never waits for anything else ([`crate::waiting`]). If a
//! client breaks the framing, only its own connection ends.

mod admission;
mod connection;
mod hub;
mod listener;
mod upgrading;

use crate::devices::registry::NewDevice;
use crate::image::ImageKey;
use crate::metrics::MetricsServer;
use crate::opener;
use crate::reactor::Reactor;
use crate::sandbox::Refusals;
use crate::session::shared::SharedSession;
use crate::systemd::Notifier;
use crate::transport::backoff::Backoff;
use crate::transport::unix_path::UnixPathListener;
use crate::transport::{Listener, PlainNetworks};
use crate::trust::Trust;
use crate::upgrade::Upgrade;
use crate::vm_name::VmName;
use crate::waiting::{NoWait, may_wait};
use connection::{Connection, ConnectionState};
use hub::{Hub, HubMemory};
use listener::ControlListener;
use rustix::event::PollFlags;
use std::collections::BTreeMap;
use std::io;
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
/// Token of what the sandbox refuses.
const REFUSALS: u64 = 4;
/// Token of the first connection; the others follow.
const FIRST_CONNECTION: u64 = 16;
/// How long the agent waits at its end for requests that are not answered yet.
const END_TIMEOUT: Duration = Duration::from_secs(10);

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
    /// What the sandbox refuses.
    refusals: Option<Refusals>,
    /// Answers scrapes of the metrics, on a thread of its own.
    metrics: Option<MetricsServer>,
    /// Tells the service manager what this process does.
    notifier: Option<Notifier>,
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
            refusals: None,
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

    /// From now on plain TCP may go there.
    pub fn plain_networks(&self, plain: PlainNetworks) {
        self.hub.session.lock().plain = plain;
    }

    /// From now on jobs trust these on a network.
    pub fn trust(&self, trust: Trust) {
        self.hub.session.lock().trust = trust;
    }

    /// Logs what the sandbox refuses.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn log_refusals(&mut self, refusals: Refusals) -> io::Result<()> {
        self.reactor.add(refusals.fd().as_fd(), REFUSALS)?;
        self.refusals = Some(refusals);
        Ok(())
    }

    /// From now on images are sealed with this key, and only such are restored.
    pub fn seal_images_with(&self, key: ImageKey) {
        self.hub.session.lock().image_key = Some(key);
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
                    REFUSALS => self.refusals.iter().for_each(Refusals::log),
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
        opener::hurry();
        if let Some(signals) = self.signals.take() {
            self.reactor.remove(signals.as_fd());
        }
        self.hub.session.lock().stop();
        if let Some(notifier) = &self.notifier {
            notifier.stopping();
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
