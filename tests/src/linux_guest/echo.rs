// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The other end of the guest's network: returns each datagram to its sender.

use crate::Error;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// An echo server on UDP. The guest reaches it as 10.0.2.2, which QEMU's user network maps to this
/// host. It ends when it is dropped.
#[derive(Debug)]
pub struct Echo {
    port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// Starts it on a free port.
    ///
    /// # Errors
    /// If there is none.
    pub fn start() -> Result<Self, Error> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
        let socket = socket.map_err(Error::io("open a UDP socket"))?;
        let port = socket.local_addr().map_err(Error::io("read a port"))?.port();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut datagram = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                // An error is about one datagram, for example if its sender has ended.
                if let Ok((length, from)) = socket.recv_from(&mut datagram) {
                    let _ = socket.send_to(&datagram[..length], from);
                }
            }
        });
        Ok(Self { port, stop, thread: Some(thread) })
    }

    /// The argument of the guest's command `net`.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the thread. The other datagrams that it waits for may never come.
        let waker = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
        let woken = waker.and_then(|socket| socket.send_to(&[0], (Ipv4Addr::LOCALHOST, self.port)));
        if woken.is_ok() {
            let _ = self.thread.take().map(JoinHandle::join);
        }
    }
}
