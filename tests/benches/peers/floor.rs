// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The simplest program that does the work: it reads, sends, receives and writes, without zero
//! pages, checksums, records or passes.

use super::image::Image;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const BUFFER: usize = 256 << 10;

/// Copies all of `source` over `sockets` TCP connections. Each one carries its own part.
pub fn copy(source: &Image, destination: &Image, sockets: u64) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let share = source.size / sockets;
    let started = Instant::now();
    std::thread::scope(|scope| {
        for index in 0..sockets {
            let mut sending = TcpStream::connect(address).unwrap();
            let mut receiving = listener.accept().unwrap().0;
            let parts = move || (index * share..(index + 1) * share).step_by(BUFFER);
            scope.spawn(move || {
                let mut buffer = vec![0u8; BUFFER];
                for at in parts() {
                    receiving.read_exact(&mut buffer).unwrap();
                    destination.file.write_all_at(&buffer, at).unwrap();
                }
            });
            scope.spawn(move || {
                let mut buffer = vec![0u8; BUFFER];
                for at in parts() {
                    source.file.read_exact_at(&mut buffer, at).unwrap();
                    sending.write_all(&buffer).unwrap();
                }
            });
        }
    });
    started.elapsed()
}
