// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection to an agent without the client library.

use super::SOON;
use pageferry_client::JobStatus;
use pageferry_protocol::control::codec::{DecodeError, Decoder};
use pageferry_protocol::control::reply::{Reply, decode_reply};
use pageferry_protocol::control::request::Request;
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

/// A connection to an agent on which a test sends arbitrary bytes. To the agent it is an operator's
/// connection until it hands memory over.
#[derive(Debug)]
pub struct RawClient {
    /// The socket, for bytes that are not a frame.
    pub raw: UnixStream,
    /// The same socket, for frames.
    pub socket: FrameSocket,
}

impl RawClient {
    /// Connects to the agent that listens at `socket`.
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Self { raw: stream.try_clone().unwrap(), socket: FrameSocket::from(OwnedFd::from(stream)) }
    }

    /// The next frame of the agent.
    ///
    /// # Errors
    /// If it is not a frame, or the connection ended.
    pub fn reply(&mut self) -> Result<Frame, SocketError> {
        self.socket.recv(Instant::now() + SOON)
    }

    /// Sends a frame, and returns the body of its reply.
    pub fn ask_raw(&mut self, request: u32, body: Vec<u8>, fds: Vec<OwnedFd>) -> Reply<Vec<u8>> {
        self.socket.send(&Frame { request, flags: 0, body, fds }, Instant::now() + SOON).unwrap();
        let reply = self.reply().unwrap();
        assert!(reply.is_reply());
        assert_eq!(reply.request, request);
        decode_reply(&reply.body, |decoder| Ok::<_, DecodeError>(decoder.remainder().to_vec()))
            .unwrap()
    }

    /// Sends a request, and returns the body of its reply.
    pub fn ask(&mut self, request: &Request, fds: Vec<OwnedFd>) -> Reply<Vec<u8>> {
        self.ask_raw(request.code(), request.encode(), fds)
    }

    /// The status of the last job.
    pub fn status(&mut self) -> JobStatus {
        let body = self.ask(&Request::QueryStatus, Vec::new()).unwrap();
        JobStatus::decode(&mut Decoder::new(&body)).unwrap()
    }
}
