// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A TCP proxy between two agents. It copies bytes, and closes connections when the test asks for
//! it.

use crate::Error;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// A connection of the source, and the matching connection to the destination.
#[derive(Debug)]
struct Link {
    source: TcpStream,
    destination: TcpStream,
}

impl Link {
    fn close(&self) {
        for end in [&self.source, &self.destination] {
            // Either side may be closed already.
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

#[derive(Debug, Default)]
struct State {
    links: Vec<Link>,
    /// Number of reads from the source that were passed on since the last limit.
    passed: u64,
    /// If true, connections are accepted, and nothing is passed on.
    held: bool,
    /// Number of connections that are still passed on. Later ones are closed at once.
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
    /// A proxy to the agent that listens at `destination`, which is `tcp:HOST:PORT`.
    ///
    /// # Errors
    /// If the address is of another kind, or no port or thread is available.
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

    /// Number of connections that neither the test nor a peer has closed.
    pub fn links(&self) -> usize {
        self.shared.lock().links.len()
    }

    /// Number of reads from the source that were passed on since the last [`Proxy::limit`]. It is
    /// at least one for each connection on which the source sent something.
    pub fn passed(&self) -> u64 {
        self.shared.lock().passed
    }

    /// Closes all connections.
    pub fn cut(&self) {
        self.shared.lock().links.drain(..).for_each(|link| link.close());
    }

    /// Closes the connection with this number modulo the number of connections. False if there is
    /// none.
    pub fn cut_one(&self, number: u64) -> bool {
        let mut state = self.shared.lock();
        let count = state.links.len() as u64;
        if count > 0 {
            state.links.swap_remove((number % count) as usize).close();
        }
        count > 0
    }

    /// Passes on only this many further connections, and closes later ones at once. `None` is no
    /// limit.
    pub fn limit(&self, connections: Option<u64>) {
        let mut state = self.shared.lock();
        state.left = connections;
        state.passed = 0;
    }

    /// If true, new connections are accepted, but nothing is passed on until this is set to false.
    pub fn hold(&self, held: bool) {
        self.shared.lock().held = held;
        self.shared.changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        // The connection wakes the accepting thread, which then sees the end.
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
            // Dropping the connection closes it, and the source sees that.
            log::debug!("proxy: {error}");
        }
    }
}

/// Starts to copy in both directions, on two threads that end with the connection.
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
    // The last bytes of one side still arrive at the other.
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
