// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Somebody between two agents who sees every record of TLS, and disturbs one of them.

use pageferry_tests::random::Random;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;

/// What happens to a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// It comes a little later. This is no attack.
    Delay,
    /// It does not come.
    Drop,
    /// It comes twice.
    Repeat,
    /// It comes after the next one.
    Swap,
    /// One bit of it is another one.
    Change,
    /// The connection ends in its middle.
    Cut,
}

pub const DEEDS: [Deed; 6] =
    [Deed::Delay, Deed::Drop, Deed::Repeat, Deed::Swap, Deed::Change, Deed::Cut];

/// A deed, and the record to which it happens.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub deed: Deed,
    /// Number of the connection.
    pub connection: usize,
    /// From the source to the destination.
    pub forward: bool,
    /// Number of the record in this direction.
    pub record: u64,
}

impl Plan {
    /// A deed at any moment of a migration with two connections, more often at its beginning.
    pub fn at_any_moment(deed: Deed, random: &mut Random) -> Self {
        let connection = random.below(2) as usize;
        let forward = random.below(3) > 0;
        let most = if forward { 7 } else { 3 };
        let bits = random.below(most);
        let record = random.below(1 << bits);
        Self { deed, connection, forward, record }
    }
}

#[derive(Default)]
struct Shared {
    plan: Mutex<Option<Plan>>,
    done: AtomicBool,
    ended: AtomicBool,
    links: Mutex<Vec<[TcpStream; 2]>>,
    /// What the source has sent on each connection.
    heard: Mutex<Vec<Vec<u8>>>,
}

/// Passes connections on to a destination, and does what the plan says, once.
pub struct Middle {
    pub port: u16,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Middle {
    pub fn before(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = listener.local_addr().unwrap().port();
        let shared = Arc::<Shared>::default();
        let theirs = shared.clone();
        let accepting = spawn(move || {
            while let Ok((source, _)) = listener.accept() {
                if theirs.ended.load(Ordering::Relaxed) {
                    return;
                }
                // Nobody listens there any more.
                let Ok(destination) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                join(source, destination, &theirs);
            }
        });
        Self { port: ours, shared, accepting: Some(accepting) }
    }

    /// From the next connection on, which is connection 0, does this.
    pub fn plans(&self, plan: Option<Plan>) {
        self.shared.heard.lock().unwrap().clear();
        self.shared.done.store(false, Ordering::Relaxed);
        *self.shared.plan.lock().unwrap() = plan;
    }

    /// True if the record of the plan came by.
    pub fn has_acted(&self) -> bool {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// What the source has sent on each connection since the plan.
    pub fn heard(&self) -> Vec<Vec<u8>> {
        self.shared.heard.lock().unwrap().clone()
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        self.shared.links.lock().unwrap().drain(..).flatten().for_each(|end| close(&end));
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the thread.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        if let Some(thread) = self.accepting.take() {
            thread.join().unwrap();
        }
        self.cut();
    }
}

fn close(end: &TcpStream) {
    // The other end may be closed already.
    let _ = end.shutdown(Shutdown::Both);
}

fn join(source: TcpStream, destination: TcpStream, shared: &Arc<Shared>) {
    let connection = {
        let mut heard = shared.heard.lock().unwrap();
        heard.push(Vec::new());
        heard.len() - 1
    };
    for end in [&source, &destination] {
        end.set_nodelay(true).unwrap();
    }
    for forward in [true, false] {
        let (from, to) = if forward { (&source, &destination) } else { (&destination, &source) };
        let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        let shared = shared.clone();
        // It ends with the connection.
        spawn(move || pass(from, to, connection, forward, &shared));
    }
    shared.links.lock().unwrap().push([source, destination]);
}

/// The next record with its header. `None` at the end.
fn record(mut from: &TcpStream) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 5];
    from.read_exact(&mut bytes).ok()?;
    bytes.resize(5 + usize::from(u16::from_be_bytes([bytes[3], bytes[4]])), 0);
    from.read_exact(&mut bytes[5..]).ok()?;
    Some(bytes)
}

fn pass(from: TcpStream, mut to: TcpStream, connection: usize, forward: bool, shared: &Shared) {
    let is_due = |number: u64| {
        let plan = (*shared.plan.lock().unwrap())?;
        let is_it = (plan.connection, plan.forward, plan.record) == (connection, forward, number);
        (is_it && !shared.done.swap(true, Ordering::Relaxed)).then_some(plan.deed)
    };
    for number in 0.. {
        let Some(mut bytes) = record(&from) else { break };
        if forward && let Some(heard) = shared.heard.lock().unwrap().get_mut(connection) {
            heard.extend_from_slice(&bytes);
        }
        let sent = match is_due(number) {
            None => to.write_all(&bytes),
            Some(Deed::Delay) => {
                sleep(Duration::from_millis(50));
                to.write_all(&bytes)
            }
            Some(Deed::Drop) => Ok(()),
            Some(Deed::Repeat) => to.write_all(&bytes).and_then(|()| to.write_all(&bytes)),
            Some(Deed::Swap) => match record(&from) {
                Some(next) => to.write_all(&next).and_then(|()| to.write_all(&bytes)),
                None => break,
            },
            Some(Deed::Change) => {
                let at = 5 + (bytes.len() - 5) / 2;
                bytes[at] ^= 1;
                to.write_all(&bytes)
            }
            Some(Deed::Cut) => {
                let half = to.write_all(&bytes[..bytes.len() / 2]);
                close(&from);
                half.and(Err(std::io::ErrorKind::BrokenPipe.into()))
            }
        };
        if sent.is_err() {
            break;
        }
    }
    // What was sent before still arrives.
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
