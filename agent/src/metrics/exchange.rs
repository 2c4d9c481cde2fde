// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One exchange: a request and its answer, on a connection of its own.
//!
//! The socket never blocks: [`Exchange::advance`] does what can be done now. The steps are:
//!
//! 1. The request is received, up to [`MAX_HEAD`] bytes.
//! 2. The answer is sent, with `Connection: close`, and the sending side is shut down.
//! 3. What the client still sends is read and dropped, up to `MAX_REST` bytes. A connection that
//!    is closed while bytes are unread is reset, and the client could lose the answer.
//!
//! After [`DEADLINE`] the connection is closed, wherever the exchange is.

use super::request::{MAX_HEAD, Refusal, Request, parse};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Longest exchange.
pub const DEADLINE: Duration = Duration::from_secs(5);
/// Most bytes that are read and dropped after the answer.
const MAX_REST: usize = 64 << 10;

/// A connection with one request.
#[derive(Debug)]
pub struct Exchange {
    socket: OwnedFd,
    opened: Instant,
    step: Step,
}

#[derive(Debug)]
enum Step {
    Receiving(Vec<u8>),
    Sending { answer: Vec<u8>, sent: usize },
    Draining { dropped: usize },
    Over,
}

impl Exchange {
    /// An exchange on an accepted connection.
    ///
    /// # Errors
    /// If the kernel refuses to make the socket non-blocking.
    pub fn new(socket: OwnedFd, now: Instant) -> std::io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket, opened: now, step: Step::Receiving(Vec::new()) })
    }

    /// When the exchange must be over.
    pub fn deadline(&self) -> Instant {
        self.opened + DEADLINE
    }

    /// True if the connection can be closed.
    pub fn is_over(&self, now: Instant) -> bool {
        matches!(self.step, Step::Over) || now >= self.deadline()
    }

    /// What to wait for before the next [`Exchange::advance`].
    pub fn waits_for(&self) -> PollFlags {
        match self.step {
            Step::Sending { .. } => PollFlags::OUT,
            _ => PollFlags::IN,
        }
    }

    /// Continues as far as that is possible without waiting. `metrics` makes the body of the answer
    /// to a request.
    pub fn advance(&mut self, metrics: impl FnOnce(Request) -> String) {
        if let Step::Receiving(received) = &mut self.step {
            match receive_head(&self.socket, received) {
                Received::Incomplete => return,
                Received::Broken => self.step = Step::Over,
                Received::Head(head) => {
                    let answer = match head {
                        Ok(request) => answer(request, &metrics(request)),
                        Err(refusal) => refuse(refusal),
                    };
                    self.step = Step::Sending { answer, sent: 0 };
                }
            }
        }
        if let Step::Sending { answer, sent } = &mut self.step {
            match send(&self.socket, answer, sent) {
                Ok(false) => return,
                Ok(true) => self.step = Step::Draining { dropped: 0 },
                Err(_) => self.step = Step::Over,
            }
        }
        if let Step::Draining { dropped } = &mut self.step
            && drain(&self.socket, dropped)
        {
            self.step = Step::Over;
        }
    }
}

impl AsFd for Exchange {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

enum Received {
    /// There is more to come.
    Incomplete,
    /// The client has gone, or has ended the connection before its request.
    Broken,
    /// A request, or a refusal of what came.
    Head(Result<Request, Refusal>),
}

/// Reads what is there into `received`.
fn receive_head(socket: &OwnedFd, received: &mut Vec<u8>) -> Received {
    let mut buffer = [0; MAX_HEAD];
    loop {
        let room = MAX_HEAD - received.len();
        match receive(socket, &mut buffer[..room]) {
            // A client that has shut down its side may still wait for an answer, but has sent no
            // request.
            Ok(0) => return Received::Broken,
            Ok(count) => received.extend_from_slice(&buffer[..count]),
            Err(Errno::AGAIN) => return Received::Incomplete,
            Err(_) => return Received::Broken,
        }
        // Never `None` when there is no room any more.
        if let Some(head) = parse(received) {
            return Received::Head(head);
        }
    }
}

/// Sends the rest of `answer`. Returns whether it is sent, and the sending side shut down.
fn send(socket: &OwnedFd, answer: &[u8], sent: &mut usize) -> Result<bool, Errno> {
    while *sent < answer.len() {
        match rustix::net::send(socket, &answer[*sent..], SendFlags::NOSIGNAL) {
            Ok(count) => *sent += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(false),
            Err(errno) => return Err(errno),
        }
    }
    rustix::net::shutdown(socket, Shutdown::Write)?;
    Ok(true)
}

/// Reads and drops what is there. Returns true if the connection can be closed: the client has
/// closed its side, or sends too much.
fn drain(socket: &OwnedFd, dropped: &mut usize) -> bool {
    let mut buffer = [0; MAX_HEAD];
    while *dropped < MAX_REST {
        match receive(socket, &mut buffer) {
            Ok(0) => return true,
            Ok(count) => *dropped += count,
            Err(errno) => return errno != Errno::AGAIN,
        }
    }
    true
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    loop {
        match rustix::net::recv(socket, &mut *buffer, RecvFlags::empty()) {
            Err(Errno::INTR) => {}
            received => return received.map(|(count, _)| count),
        }
    }
}

fn answer(request: Request, body: &str) -> Vec<u8> {
    let content_type = request.format.content_type();
    let sent = if request.head_only { "" } else { body };
    message("200 OK", "", content_type, body.len(), sent)
}

fn refuse(refusal: Refusal) -> Vec<u8> {
    let more = match refusal {
        Refusal::Method => "Allow: GET, HEAD\r\n",
        _ => "",
    };
    let body = format!("{refusal}\n");
    message(refusal.status(), more, "text/plain; charset=utf-8", body.len(), &body)
}

fn message(status: &str, more: &str, content_type: &str, length: usize, body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 {status}\r\n{more}Content-Type: {content_type}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Exchange, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Exchange::new(ours.into(), Instant::now()).unwrap(), theirs)
    }

    fn read_all(mut client: &UnixStream) -> String {
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_request_in_pieces_is_answered_once_it_is_whole() {
        let (mut exchange, mut client) = pair();
        let mut asked = 0;
        for piece in ["GET /met", "rics HTTP/1.1\r\n", "Host: x\r\n\r\n"] {
            assert_eq!(asked, 0);
            client.write_all(piece.as_bytes()).unwrap();
            exchange.advance(|_| {
                asked += 1;
                "the metrics".to_owned()
            });
        }
        assert_eq!(asked, 1);
        let text = read_all(&client);
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\nthe metrics"));
        assert!(text.contains("Content-Length: 11\r\nConnection: close\r\n"), "{text}");
        assert!(!exchange.is_over(Instant::now()), "the client has not closed its side");
        drop(client);
        exchange.advance(|_| String::new());
        assert!(exchange.is_over(Instant::now()));
    }

    #[test]
    fn a_client_that_reads_slowly_gets_the_whole_answer() {
        let (mut exchange, mut client) = pair();
        let body = "x".repeat(4 << 20);
        client.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        exchange.advance(|_| body.clone());
        assert_eq!(exchange.waits_for(), PollFlags::OUT);
        let reader = std::thread::spawn(move || read_all(&client));
        while !exchange.is_over(Instant::now()) {
            exchange.advance(|_| String::new());
            std::thread::yield_now();
        }
        assert!(reader.join().unwrap().ends_with(&body));
    }

    #[test]
    fn a_refusal_and_a_head_have_their_lines() {
        for (request, expected) in [
            (
                "PUT /metrics HTTP/1.1\r\n\r\n",
                "HTTP/1.1 405 Method Not Allowed\r\nAllow: GET, HEAD",
            ),
            ("GET /x HTTP/1.1\r\n\r\n", "HTTP/1.1 404 Not Found\r\nContent-Type: text/plain"),
            ("\x01", "HTTP/1.1 400 Bad Request\r\n"),
        ] {
            let (mut exchange, mut client) = pair();
            client.write_all(request.as_bytes()).unwrap();
            exchange.advance(|_| panic!("{request}"));
            let text = read_all(&client);
            assert!(text.starts_with(expected) && text.ends_with('\n'), "{text}");
        }
        let (mut exchange, mut client) = pair();
        client.write_all(b"HEAD /metrics HTTP/1.1\r\n\r\n").unwrap();
        exchange.advance(|_| "12345".to_owned());
        let text = read_all(&client);
        assert!(text.contains("Content-Length: 5\r\n") && text.ends_with("\r\n\r\n"), "{text}");
    }

    #[test]
    fn a_client_that_sends_without_end_is_closed() {
        let (mut exchange, mut client) = pair();
        client.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        exchange.advance(|_| String::new());
        let mut sent = 0;
        while !exchange.is_over(Instant::now()) {
            assert!(sent <= 2 * MAX_REST);
            sent += client.write(&[b'x'; 1000]).unwrap();
            exchange.advance(|_| panic!("one request"));
        }
    }

    #[test]
    fn an_exchange_is_over_at_its_deadline_and_without_a_request() {
        let (mut exchange, client) = pair();
        exchange.advance(|_| panic!("nothing came"));
        assert!(!exchange.is_over(exchange.deadline() - Duration::from_nanos(1)));
        assert!(exchange.is_over(exchange.deadline()));
        drop(client);
        exchange.advance(|_| panic!("nothing came"));
        assert!(exchange.is_over(Instant::now()));
    }
}
