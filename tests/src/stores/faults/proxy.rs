// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The port of the proxy, its connections, and what all of them share.
//!
//! Each connection of a client has a thread. A connection is alive as long as it is in
//! [`State::connections`]: who cuts it takes it out and wakes all waiters, which then give up.

use super::exchange::serve;
use super::http::Head;
use super::{Counts, Fault, Faults, Request};
use crate::Error;
use crate::random::Random;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Result as IoResult};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

#[derive(Debug)]
struct State {
    faults: Faults,
    random: Random,
    requests: Vec<Request>,
    /// Number of requests before the first of `requests`.
    forgotten: usize,
    /// The sockets to the client and to the store, by the number of the connection.
    connections: BTreeMap<u64, Vec<TcpStream>>,
    next_connection: u64,
    /// When the wire to the store, and the wire to the clients, can carry the next byte.
    free: [Instant; 2],
    down: bool,
}

/// A direction of the wire.
#[derive(Debug, Clone, Copy)]
pub(super) enum Direction {
    ToStore,
    ToClient,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) store: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a socket to a connection, which ends with it.
    ///
    /// # Errors
    /// If the connection was cut.
    pub(super) fn add(&self, connection: u64, socket: &TcpStream) -> IoResult<()> {
        let socket = socket.try_clone()?;
        match self.lock().connections.get_mut(&connection) {
            Some(sockets) => sockets.push(socket),
            None => return Err(ErrorKind::ConnectionAborted.into()),
        }
        Ok(())
    }

    /// Remembers a request, and chooses its fault. Returns its number.
    pub(super) fn begin(&self, head: &Head) -> (usize, Option<Fault>) {
        let mut state = self.lock();
        let range = head.header("range").or_else(|| head.header("x-ms-range"));
        state.requests.push(Request {
            method: head.word(0).to_owned(),
            target: head.word(1).to_owned(),
            range: range.map(str::to_owned),
            ..Request::default()
        });
        let State { faults, random, .. } = &mut *state;
        let fault = faults.choose(&head.first, random);
        (state.forgotten + state.requests.len() - 1, fault)
    }

    /// Changes what is remembered of a request.
    pub(super) fn note(&self, number: usize, change: impl FnOnce(&mut Request)) {
        let mut state = self.lock();
        let index = number.checked_sub(state.forgotten);
        if let Some(request) = index.and_then(|index| state.requests.get_mut(index)) {
            change(request);
        }
    }

    /// True if this fault is to be injected now. It then counts.
    pub(super) fn inject(&self, number: usize, fault: Fault) -> bool {
        {
            let mut state = self.lock();
            match &mut state.faults.at_most {
                Some(0) => return false,
                Some(left) => *left -= 1,
                None => {}
            }
        }
        self.note(number, |request| request.fault = Some(fault));
        true
    }

    /// A random number below `limit`.
    pub(super) fn below(&self, limit: u64) -> u64 {
        self.lock().random.below(limit)
    }

    /// How long an answer is late, and how long a stalled one.
    pub(super) fn delays(&self) -> (Duration, Duration) {
        let state = self.lock();
        (state.faults.latency, state.faults.stall)
    }

    /// Waits until the wire has carried this number of bytes.
    ///
    /// # Errors
    /// If the connection is cut meanwhile.
    pub(super) fn carry(
        &self, connection: u64, direction: Direction, bytes: usize,
    ) -> IoResult<()> {
        let until = {
            let mut state = self.lock();
            let Some(bandwidth) = state.faults.bandwidth.filter(|bandwidth| *bandwidth > 0) else {
                return Ok(());
            };
            let free = &mut state.free[direction as usize];
            let time = Duration::from_secs_f64(bytes as f64 / bandwidth as f64);
            *free = (*free).max(Instant::now()) + time;
            *free
        };
        self.pause(connection, until.saturating_duration_since(Instant::now()))
    }

    /// Waits.
    ///
    /// # Errors
    /// If the connection is cut meanwhile.
    pub(super) fn pause(&self, connection: u64, time: Duration) -> IoResult<()> {
        if time.is_zero() {
            return Ok(());
        }
        let alive = |state: &mut State| state.connections.contains_key(&connection);
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), time, alive)
            .unwrap_or_else(PoisonError::into_inner);
        if state.connections.contains_key(&connection) {
            return Ok(());
        }
        Err(ErrorKind::ConnectionAborted.into())
    }

    /// Ends a connection, if it is not cut already.
    pub(super) fn end(&self, connection: u64) {
        let sockets = self.lock().connections.remove(&connection);
        close(sockets.into_iter().flatten());
    }

    fn cut(&self) {
        let connections = std::mem::take(&mut self.lock().connections);
        self.changed.notify_all();
        close(connections.into_values().flatten());
    }
}

fn close(sockets: impl Iterator<Item = TcpStream>) {
    for socket in sockets {
        // A peer may have closed it already.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

/// Passes requests on to a store. Dropping it cuts all connections.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// The port and its thread, while the proxy is not taken down.
    port: Option<(TcpListener, JoinHandle<()>)>,
}

impl FaultProxy {
    /// A proxy to the store at `store`, on a free port of the loopback interface. All random
    /// choices follow from `seed`.
    ///
    /// # Errors
    /// If no port or thread is available.
    pub fn to(store: SocketAddr, seed: u64) -> Result<Self, Error> {
        let state = Mutex::new(State {
            faults: Faults::default(),
            random: Random::new(seed),
            requests: Vec::new(),
            forgotten: 0,
            connections: BTreeMap::new(),
            next_connection: 0,
            free: [Instant::now(); 2],
            down: true,
        });
        let shared = Arc::new(Shared { store, state, changed: Condvar::new() });
        let mut proxy = Self { address: ([127, 0, 0, 1], 0).into(), shared, port: None };
        proxy.bring_up()?;
        Ok(proxy)
    }

    /// Where clients connect to. It stays the same.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the faults of all requests that come from now on, and latency and bandwidth of all.
    pub fn set(&self, faults: Faults) {
        self.shared.lock().faults = faults;
    }

    /// What passed since the start or the last [`FaultProxy::forget`].
    pub fn counts(&self) -> Counts {
        Counts::of(&self.shared.lock().requests)
    }

    /// The requests since the start or the last [`FaultProxy::forget`], in the order in which they
    /// came.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.lock().requests.clone()
    }

    /// Forgets all requests.
    pub fn forget(&self) {
        let mut state = self.shared.lock();
        state.forgotten += state.requests.len();
        state.requests.clear();
    }

    /// Closes all connections. New ones are accepted.
    pub fn cut(&self) {
        self.shared.cut();
    }

    /// Closes all connections, and refuses new ones.
    pub fn take_down(&mut self) {
        self.shared.lock().down = true;
        if let Some((listener, thread)) = self.port.take() {
            // This wakes the thread. It fails only if the port is closed already.
            let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        self.shared.cut();
    }

    /// Accepts connections again, at the same address.
    ///
    /// # Errors
    /// If the port was taken meanwhile, or no thread is available.
    pub fn bring_up(&mut self) -> Result<(), Error> {
        if self.port.is_some() {
            return Ok(());
        }
        let listen = || {
            let listener = TcpListener::bind(self.address)?;
            Ok((listener.local_addr()?, listener.try_clone()?, listener))
        };
        let (address, accepting, listener) = listen().map_err(Error::io("listen"))?;
        self.address = address;
        self.shared.lock().down = false;
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new()
            .name("fault proxy".into())
            .spawn(move || accept(&accepting, &shared))
            .map_err(Error::io("start a fault proxy"))?;
        self.port = Some((listener, thread));
        Ok(())
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.take_down();
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while let Ok((client, _)) = listener.accept() {
        if let Err(error) = start(client, shared) {
            // Dropping the connection closes it, and the client sees that.
            log::debug!("fault proxy: {error}");
        }
    }
}

/// Starts the thread of a connection.
fn start(client: TcpStream, shared: &Arc<Shared>) -> IoResult<()> {
    client.set_nodelay(true)?;
    let connection = {
        let mut state = shared.lock();
        if state.down {
            return Ok(());
        }
        let connection = state.next_connection;
        state.next_connection += 1;
        state.connections.insert(connection, vec![client.try_clone()?]);
        connection
    };
    let theirs = shared.clone();
    let run = move || {
        if let Err(error) = serve(&theirs, connection, &client) {
            log::debug!("fault proxy: {error}");
        }
        theirs.end(connection);
    };
    let started = std::thread::Builder::new().name("fault proxy".into()).spawn(run);
    if started.is_err() {
        shared.end(connection);
    }
    started.map(drop)
}
