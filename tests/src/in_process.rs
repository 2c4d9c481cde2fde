// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An agent on a thread of this process, for tests that start hundreds of them.

use pageferry_agent::server::Server;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

/// An agent that serves one connection, and ends with it.
#[derive(Debug)]
pub struct InProcessAgent {
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl InProcessAgent {
    /// Starts an agent; returns the VMM's end of its connection.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn start() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut server = Server::new()?;
        server.inherit(theirs.into())?;
        let thread =
            std::thread::Builder::new().name("agent".into()).spawn(move || server.run())?;
        Ok((Self { thread: Some(thread) }, ours.into()))
    }
}

impl Drop for InProcessAgent {
    fn drop(&mut self) {
        // Its connection was closed by then, or the test hangs here, and says where.
        if let Some(thread) = self.thread.take() {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => log::error!("the agent failed: {error}"),
                Err(_) => log::error!("the agent panicked"),
            }
        }
    }
}
