// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Limits for the kernel's queues of a bulk stream in postcopy.
//!
//! In passes a deep queue costs nothing. In postcopy the guest may wait for a page that is queued
//! behind others. The destination must place all of those first: ten megabytes take ten
//! milliseconds, on the same processors that the guest and its urgent pages need. So both sides
//! keep their queues short:
//!
//! - The source limits the bytes that are queued and not sent yet (`TCP_NOTSENT_LOWAT`). This does
//!   not limit the bytes in flight.
//! - The destination limits its receive queue to the bytes that keep the link busy for one round
//!   trip.
//!
//! Only TCP sockets are changed; the queues of other sockets are small. If the kernel refuses a
//! limit, the queue stays as it is, and the log says so at level debug.
//!
//! Numbers and layouts: `linux/tcp.h`; meaning: `tcp(7)`.
#![allow(unsafe_code)]

use crate::opener;
use rustix::net::AddressFamily;
use rustix::net::sockopt::{set_socket_recv_buffer_size, socket_domain};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

/// Most bytes that may be queued and not sent yet.
const NOT_SENT: libc::c_int = 128 << 10;
/// Smallest receive queue of the destination, in bytes.
const LEAST: u64 = 128 << 10;
/// The largest receive queue that a program may request, in bytes. A queue whose size was not
/// requested can grow beyond that.
const LIMIT: &str = "/proc/sys/net/core/rmem_max";
/// Highest expected bandwidth of a link, in bytes per second: no faster than one stream places
/// pages.
const FASTEST: u64 = 1 << 30;

/// Limits the unsent bytes in the queue of a stream that this side sends on.
pub fn limit_send_queue(socket: BorrowedFd<'_>) {
    if is_tcp(socket) {
        let value = NOT_SENT;
        // SAFETY: the option takes an int, which lives until the call returns.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_NOTSENT_LOWAT,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if set != 0 {
            log::debug!("TCP_NOTSENT_LOWAT: {}", std::io::Error::last_os_error());
        }
    }
}

/// Limits the queue of a stream that this side receives on to what its round trip needs.
///
/// A queue for a long round trip is left to the kernel. The largest queue that a program may
/// request would be too small to keep such a link busy, and a fault waits for the round trip longer
/// than for the queue.
pub fn limit_receive_queue(socket: BorrowedFd<'_>) {
    let Some(round_trip) = is_tcp(socket).then(|| round_trip(socket)).flatten() else { return };
    let Some(size) = queue_of(round_trip, limit()) else { return };
    if let Err(errno) = set_socket_recv_buffer_size(socket, size) {
        log::debug!("SO_RCVBUF: {errno}");
    }
}

/// What `LIMIT` says, as of the first call: the threads that need it may open no file.
pub fn limit() -> u64 {
    static FOUND: OnceLock<u64> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let bytes = opener::read(Path::new(LIMIT), 64).unwrap_or_default();
        str::from_utf8(&bytes).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    })
}

/// The bytes that keep a link with this round trip busy; `None` if they are more than `limit`.
fn queue_of(round_trip: Duration, limit: u64) -> Option<usize> {
    let bytes = u128::from(FASTEST) * round_trip.as_micros() / 1_000_000;
    let size = u64::try_from(bytes).unwrap_or(u64::MAX).max(LEAST);
    (size <= limit).then_some(size as usize)
}

fn is_tcp(socket: BorrowedFd<'_>) -> bool {
    matches!(socket_domain(socket), Ok(AddressFamily::INET | AddressFamily::INET6))
}

/// The round trip as the kernel measured it; `None` if the kernel does not say.
fn round_trip(socket: BorrowedFd<'_>) -> Option<Duration> {
    let mut about = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is the size of the struct.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            about.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    // SAFETY: the struct consists of numbers. Zeroes are a valid value of it, and so is everything
    // that the kernel wrote over them.
    let about = unsafe { about.assume_init() };
    // `tcpi_rtt` is in microseconds.
    (got == 0).then(|| Duration::from_micros(u64::from(about.tcpi_rtt.max(1))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn a_queue_follows_the_round_trip_within_limits() {
        assert_eq!(queue_of(Duration::from_micros(20), 208 << 10), Some(128 << 10));
        assert_eq!(queue_of(Duration::from_millis(1), 6 << 20), Some((1 << 30) / 1000));
        assert_eq!(queue_of(Duration::from_millis(1), 208 << 10), None);
        assert_eq!(queue_of(Duration::from_secs(1), 6 << 20), None);
    }

    #[test]
    fn a_connection_has_a_round_trip_and_accepts_both_limits() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sending = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (receiving, _) = listener.accept().unwrap();
        assert!(round_trip(sending.as_fd()).unwrap() < Duration::from_secs(1));
        limit_send_queue(sending.as_fd());
        limit_receive_queue(receiving.as_fd());
    }

    #[test]
    fn other_sockets_are_left_alone() {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let before = rustix::net::sockopt::socket_recv_buffer_size(&b).unwrap();
        limit_send_queue(a.as_fd());
        limit_receive_queue(b.as_fd());
        assert_eq!(rustix::net::sockopt::socket_recv_buffer_size(&b).unwrap(), before);
    }
}
