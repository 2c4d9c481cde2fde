// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An agent on a thread of this process, for tests that start hundreds of them.

use pageferry_agent::server::Server;
use pageferry_agent::vm_name::VmName;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

/// An agent that serves one connection and ends with it.
#[derive(Debug)]
pub struct InProcessAgent {
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl InProcessAgent {
    /// Starts an agent. Returns the VMM's end of its connection.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn start() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut server = Server::new(VmName::default())?;
        server.inherit(theirs.into())?;
        let thread = std::thread::Builder::new()
            .name("agent".into())
            .spawn(move || server.run().map(drop))?;
        Ok((Self { thread: Some(thread) }, ours.into()))
    }
}

impl Drop for InProcessAgent {
    fn drop(&mut self) {
        // The connection must be closed before this. Otherwise the test hangs here.
        if let Some(thread) = self.thread.take() {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => log::error!("the agent failed: {error}"),
                Err(_) => log::error!("the agent panicked"),
            }
        }
    }
}
