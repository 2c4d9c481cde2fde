//! How much of a bulk stream lies in the kernel's queues while a guest waits for pages.
//!
//! In passes a deep queue costs nothing. In postcopy all that was queued before a page has to be
//! placed before it, at the destination's pace: ten megabytes are ten milliseconds, and the
//! processors that place them are those that the guest and its urgent pages need. So the source
//! keeps little that is not sent yet (`TCP_NOTSENT_LOWAT`, which leaves alone what is in flight),
//! and the destination takes no more than the round trip needs to keep the link busy. On other
//! sockets than TCP the queues are small.
//!
//! Numbers and layouts: `linux/tcp.h`; meaning: `tcp(7)`.
#![allow(unsafe_code)]

use rustix::net::AddressFamily;
use rustix::net::sockopt::{set_socket_recv_buffer_size, socket_domain};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Bytes that may wait to be sent.
const NOT_SENT: libc::c_int = 128 << 10;
/// Least that the destination takes into its queue, in bytes.
const LEAST: u64 = 128 << 10;
/// Where the kernel says how large a queue it lets a program have. Left alone, queues grow beyond
/// that.
const LIMIT: &str = "/proc/sys/net/core/rmem_max";
/// Bytes per second that a link is expected to carry at most: what one stream of ours places.
const FASTEST: u64 = 1 << 30;

/// Keeps little unsent in the queue of a stream that this side sends on.
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

/// Takes no more into the queue of a stream that this side receives on than its round trip needs. A
/// long one is left to the kernel: the link would starve under what a program may ask for, and a
/// fault waits for the round trip more than for the queue.
pub fn limit_receive_queue(socket: BorrowedFd<'_>) {
    let Some(round_trip) = is_tcp(socket).then(|| round_trip(socket)).flatten() else { return };
    let limit =
        std::fs::read_to_string(LIMIT).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let Some(size) = queue_of(round_trip, limit) else { return };
    if let Err(errno) = set_socket_recv_buffer_size(socket, size) {
        log::debug!("SO_RCVBUF: {errno}");
    }
}

/// Bytes that keep a link with this round trip busy, if that is no more than `limit`.
fn queue_of(round_trip: Duration, limit: u64) -> Option<usize> {
    let bytes = u128::from(FASTEST) * round_trip.as_micros() / 1_000_000;
    let size = u64::try_from(bytes).unwrap_or(u64::MAX).max(LEAST);
    (size <= limit).then_some(size as usize)
}

fn is_tcp(socket: BorrowedFd<'_>) -> bool {
    matches!(socket_domain(socket), Ok(AddressFamily::INET | AddressFamily::INET6))
}

/// What the kernel measured; `None` if it does not tell.
fn round_trip(socket: BorrowedFd<'_>) -> Option<Duration> {
    let mut about = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, all of which are there.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            about.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    // SAFETY: zeroes are a valid value of this struct of numbers, and so is whatever the kernel
    // wrote over them.
    let about = unsafe { about.assume_init() };
    // The receiver's own estimate, where it has one, is that of the direction that counts.
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
    fn the_kernel_tells_the_round_trip_of_a_connection_and_takes_both_limits() {
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
