//! Agents that listen, for a VMM and its operator.

use super::SOON;
use pageferry_client::JobStatus;
use pageferry_protocol::control::codec::{DecodeError, Decoder};
use pageferry_protocol::control::reply::{Reply, decode_reply};
use pageferry_protocol::control::request::Request;
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use pageferry_tests::deadline::wait_for;
use pageferry_tests::process::{AgentProcess, Process};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Instant;

/// An agent or a VMM as a process of its own.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_pageferry-test-process");

/// An agent on a thread of this process that listens, until it is dropped.
pub struct Listening {
    pub path: PathBuf,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Listening {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let mut server = pageferry_agent::server::Server::new().unwrap();
        server.listen(&path).unwrap();
        let (stopped, stop) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        server.stop_on(stopped).unwrap();
        let thread = std::thread::spawn(move || server.run().unwrap());
        Self { path, stop, thread: Some(thread), _folder: folder }
    }

    pub fn connect(&self) -> Peer {
        Peer::connect(&self.path)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        rustix::io::write(&self.stop, &[1]).unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// An agent that ends in good order, or is killed.
pub enum Agent {
    Stopped(Listening),
    Killed(AgentProcess, tempfile::TempDir),
}

impl Agent {
    pub fn spawn() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::Killed(AgentProcess::spawn(PROGRAM.as_ref(), folder.path(), "agent").unwrap(), folder)
    }

    pub fn socket(&self) -> &Path {
        match self {
            Self::Stopped(agent) => &agent.path,
            Self::Killed(agent, _) => agent.socket(),
        }
    }

    fn process(&mut self) -> &mut Process {
        match self {
            Self::Stopped(_) => panic!("not a process"),
            Self::Killed(agent, _) => agent.process(),
        }
    }

    /// Its process id. An agent that is no process has none.
    pub fn id(&mut self) -> u32 {
        self.process().id()
    }

    /// How its last job ended, as an operator sees it.
    pub fn ended(&self) -> JobStatus {
        let mut operator = Peer::connect(self.socket());
        wait_for("the job's end", SOON, || {
            Some(operator.status()).filter(|status| status.phase.is_final())
        })
        .unwrap()
    }

    /// The process hangs from now on. An agent that is none cannot.
    pub fn freeze(&mut self) {
        self.process().freeze().unwrap();
    }

    /// The process goes on after [`Agent::freeze`].
    pub fn thaw(&mut self) {
        self.process().thaw().unwrap();
    }

    /// Asks the process to end in good order.
    pub fn terminate(&mut self) {
        self.process().terminate().unwrap();
    }

    /// Waits until the process ended; true if it did so well.
    pub fn ends_well(&mut self) -> bool {
        self.process().wait(SOON).unwrap().success()
    }

    /// Kills the process. An agent that is none cannot be.
    pub fn kill(&mut self) {
        self.process().kill().unwrap();
    }

    /// Ends it as its kind does.
    pub fn end(mut self) {
        if matches!(self, Self::Killed(..)) {
            self.kill();
        }
    }
}

/// A connection to an agent, that of an operator if it does nothing to become more.
pub struct Peer {
    pub raw: UnixStream,
    pub socket: FrameSocket,
}

impl Peer {
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Self { raw: stream.try_clone().unwrap(), socket: FrameSocket::from(OwnedFd::from(stream)) }
    }

    pub fn reply(&mut self) -> Result<Frame, SocketError> {
        self.socket.recv(Instant::now() + SOON)
    }

    pub fn ask_raw(&mut self, request: u32, body: Vec<u8>, fds: Vec<OwnedFd>) -> Reply<Vec<u8>> {
        self.socket.send(&Frame { request, flags: 0, body, fds }, Instant::now() + SOON).unwrap();
        let reply = self.reply().unwrap();
        assert!(reply.is_reply());
        assert_eq!(reply.request, request);
        decode_reply(&reply.body, |decoder| Ok::<_, DecodeError>(decoder.remainder().to_vec()))
            .unwrap()
    }

    pub fn ask(&mut self, request: &Request, fds: Vec<OwnedFd>) -> Reply<Vec<u8>> {
        self.ask_raw(request.code(), request.encode(), fds)
    }

    pub fn status(&mut self) -> JobStatus {
        let body = self.ask(&Request::QueryStatus, Vec::new()).unwrap();
        JobStatus::decode(&mut Decoder::new(&body)).unwrap()
    }
}
