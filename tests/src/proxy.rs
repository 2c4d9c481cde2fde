// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A wire that can be cut: stands between two agents, copies bytes, and closes connections when it
//! is told to.

use crate::Error;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// A connection of the source, and the one to the destination that goes with it.
#[derive(Debug)]
struct Link {
    source: TcpStream,
    destination: TcpStream,
}

impl Link {
    fn close(&self) {
        for end in [&self.source, &self.destination] {
            // Either may be closed already.
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

#[derive(Debug, Default)]
struct State {
    links: Vec<Link>,
    /// Pieces of what the source says that were passed on since the last limit.
    passed: u64,
    /// Connections are taken, and nothing is passed on.
    held: bool,
    /// How many more connections are passed on; the others are closed at once.
    left: Option<u64>,
    ended: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Passes connections on to a destination. Dropping it cuts them and ends its threads.
#[derive(Debug)]
pub struct Proxy {
    address: String,
    listener: TcpListener,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Proxy {
    /// To an agent that listens at `destination`, which is `tcp:HOST:PORT`.
    ///
    /// # Errors
    /// If it is another kind of address, or there is no port or thread to be had.
    pub fn to(destination: &str) -> Result<Self, Error> {
        let Some(destination) = destination.strip_prefix("tcp:").map(str::to_owned) else {
            return Err(Error::Argument(format!("{destination} is not of TCP")));
        };
        let listener = TcpListener::bind("127.0.0.1:0").map_err(Error::io("listen"))?;
        let port = listener.local_addr().map_err(Error::io("listen"))?.port();
        let shared = Arc::new(Shared::default());
        let (theirs, ours) = (shared.clone(), listener.try_clone().map_err(Error::io("listen"))?);
        let run = move || accept(&ours, &destination, &theirs);
        let thread = std::thread::Builder::new().name("proxy".into()).spawn(run);
        let accepting = Some(thread.map_err(Error::io("start a proxy"))?);
        Ok(Self { address: format!("tcp:127.0.0.1:{port}"), listener, shared, accepting })
    }

    /// Where the source connects to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Connections that are open, as far as nobody has closed them.
    pub fn links(&self) -> usize {
        self.shared.lock().links.len()
    }

    /// Pieces of what the source says that were passed on since the last [`Proxy::limit`]: at least
    /// one of each connection that said something.
    pub fn passed(&self) -> u64 {
        self.shared.lock().passed
    }

    /// Closes all connections.
    pub fn cut(&self) {
        self.shared.lock().links.drain(..).for_each(|link| link.close());
    }

    /// Closes one connection, that of this number modulo how many there are. False if there is
    /// none.
    pub fn cut_one(&self, number: u64) -> bool {
        let mut state = self.shared.lock();
        let count = state.links.len() as u64;
        if count > 0 {
            state.links.swap_remove((number % count) as usize).close();
        }
        count > 0
    }

    /// So many more connections are passed on, and those after them are closed at once; `None` is
    /// no limit.
    pub fn limit(&self, connections: Option<u64>) {
        let mut state = self.shared.lock();
        state.left = connections;
        state.passed = 0;
    }

    /// From now on new connections are taken, and nothing is passed on before it is let go again.
    pub fn hold(&self, held: bool) {
        self.shared.lock().held = held;
        self.shared.changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        // Whoever accepts is told that there is nobody any more.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.accepting.take() {
            let _ = thread.join();
        }
        self.cut();
    }
}

fn accept(listener: &TcpListener, destination: &str, shared: &Arc<Shared>) {
    while let Ok((source, _)) = listener.accept() {
        let waits = |state: &mut State| state.held && !state.ended;
        let mut state =
            shared.changed.wait_while(shared.lock(), waits).unwrap_or_else(PoisonError::into_inner);
        if state.ended {
            return;
        }
        let passed = state.left.is_none_or(|left| left > 0);
        state.left = state.left.map(|left| left.saturating_sub(1));
        drop(state);
        if !passed {
            continue;
        }
        if let Err(error) = TcpStream::connect(destination)
            .and_then(|destination| join(source, destination, shared))
        {
            // The source sees its connection end.
            log::debug!("proxy: {error}");
        }
    }
}

/// Copies between the two from now on, on two threads that end with the connection.
fn join(source: TcpStream, destination: TcpStream, shared: &Arc<Shared>) -> std::io::Result<()> {
    for end in [&source, &destination] {
        end.set_nodelay(true)?;
    }
    for (from, to, counts) in [(&source, &destination, true), (&destination, &source, false)] {
        let (from, to, shared) = (from.try_clone()?, to.try_clone()?, shared.clone());
        let passed = move || shared.lock().passed += u64::from(counts);
        std::thread::Builder::new().name("proxy".into()).spawn(move || copy(&from, &to, passed))?;
    }
    shared.lock().links.push(Link { source, destination });
    Ok(())
}

fn copy(mut from: &TcpStream, mut to: &TcpStream, passed: impl Fn()) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(count) if count > 0 && to.write_all(&buffer[..count]).is_ok() => passed(),
            _ => break,
        }
    }
    // What one side said last still arrives at the other.
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
