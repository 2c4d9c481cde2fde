// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A crowd of strangers at a migration port: thousands of connections that are not a source's.

use crate::Error;
use crate::deadline::wait_until;
use crate::random::Random;
use crate::vmm::PATIENCE;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What a stranger sends.
#[derive(Debug, Clone)]
pub enum Stranger {
    /// Nothing.
    Silent,
    /// These bytes at once, and then nothing.
    Says(Vec<u8>),
    /// Random bytes.
    Garbage,
    /// One of these bytes a second.
    Slow(Vec<u8>),
    /// Nothing: it closes at once.
    Gone,
}

/// Strangers, each of which connects again when it is dropped. They go on until this is dropped.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    connected: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

/// One thread's share of the strangers.
struct Crowd {
    from: Ipv4Addr,
    address: SocketAddr,
    kinds: Vec<Stranger>,
    connections: Vec<Option<(TcpStream, usize)>>,
    random: Random,
}

/// Connects from an address of this host.
fn connect(from: Ipv4Addr, to: SocketAddr) -> rustix::io::Result<TcpStream> {
    let (family, flags) = (AddressFamily::INET, SocketFlags::CLOEXEC);
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(Duration::from_millis(200)))?;
    rustix::net::bind(&socket, &SocketAddr::from((from, 0)))?;
    rustix::net::connect(&socket, &to)?;
    Ok(socket.into())
}

impl Crowd {
    /// Connects who is not connected, and has each do what it does. Returns how many connected.
    fn go_on(&mut self, drips: bool) -> u64 {
        let mut connected = 0;
        for index in 0..self.connections.len() {
            let kind = &self.kinds[index % self.kinds.len()];
            if let Some((stream, sent)) = &mut self.connections[index] {
                let is_gone = match stream.read(&mut [0; 512]) {
                    Ok(0) => true,
                    Ok(_) => false,
                    Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
                };
                if let Stranger::Slow(bytes) = kind
                    && drips
                    && let Some(byte) = bytes.get(*sent)
                {
                    *sent += 1;
                    let _ = stream.write_all(&[*byte]);
                }
                if !is_gone {
                    continue;
                }
            }
            self.connections[index] = None;
            let Ok(mut stream) = connect(self.from, self.address) else { continue };
            connected += 1;
            // The other end may have closed the connection already.
            let _ = match kind {
                Stranger::Silent => Ok(()),
                Stranger::Says(bytes) => stream.write_all(bytes),
                Stranger::Slow(bytes) => stream.write_all(&bytes[..1]),
                Stranger::Garbage => {
                    let mut bytes = vec![0; 1 + self.random.below(600) as usize];
                    self.random.fill(&mut bytes);
                    stream.write_all(&bytes)
                }
                Stranger::Gone => stream.shutdown(Shutdown::Both),
            };
            if !matches!(kind, Stranger::Gone) && stream.set_nonblocking(true).is_ok() {
                self.connections[index] = Some((stream, 1));
            }
        }
        connected
    }
}

impl Flood {
    /// Starts `count` strangers of these kinds, in turn, on this number of threads. They connect to
    /// `address` from the address `from` of this host.
    ///
    /// # Errors
    /// If a thread cannot be started, or the strangers do not get through.
    pub fn start(
        from: Ipv4Addr, address: SocketAddr, count: usize, kinds: &[Stranger], threads: usize,
    ) -> Result<Self, Error> {
        let (stop, connected): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let mut flood = Self { stop, connected, threads: Vec::new() };
        for thread in 0..threads {
            let mut connections = Vec::new();
            connections.resize_with(count / threads, || None);
            let random = Random::new(thread as u64);
            let mut crowd = Crowd { from, address, kinds: kinds.to_vec(), connections, random };
            let (stop, connected) = (flood.stop.clone(), flood.connected.clone());
            let run = move || {
                let mut dripped = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    let drips = dripped.elapsed() >= Duration::from_secs(1);
                    if drips {
                        dripped = Instant::now();
                    }
                    connected.fetch_add(crowd.go_on(drips), Ordering::Relaxed);
                }
            };
            let started = std::thread::Builder::new().name("strangers".into()).spawn(run);
            flood.threads.push(started.map_err(Error::io("start strangers"))?);
        }
        let all = count as u64;
        wait_until("the strangers to connect", PATIENCE, || flood.connected() >= all)?;
        Ok(flood)
    }

    /// How many connections there were until now.
    pub fn connected(&self) -> u64 {
        self.connected.load(Ordering::Relaxed)
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A stranger that panicked has said so.
            let _ = thread.join();
        }
    }
}
