// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Starting an agent as a child process, with one end of a socket pair as its standard input.
//!
//! The socket travels as `stdin` because the standard library duplicates it in the child. So no
//! descriptor of this process is ever inheritable, and the child of another thread cannot inherit
//! one by accident.

use crate::child;
use crate::client::Client;
use crate::config::Config;
use crate::control::socket_pair;
use crate::error::Error;
use crate::hooks::HookChannel;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

impl Client {
    /// Starts an agent, such as `pageferry agent --stdin`, and connects to it. The standard input
    /// of the command becomes the socket; afterwards it is set to null.
    ///
    /// The caller has to wait for the child; a [`Supervisor`](crate::Supervisor) does that, and
    /// starts the next agent when this one is lost. The child exits by itself when the last clone
    /// of the client is dropped.
    ///
    /// # Errors
    /// If the program cannot be started, refuses the handshake or breaks it. The child is then
    /// killed and reaped.
    pub fn spawn(
        command: &mut Command, config: Config,
    ) -> Result<(Self, HookChannel, Child), Error> {
        let ((client, channel), child) =
            start(command, |socket| Self::from_socket(socket, config))?;
        Ok((client, channel, child))
    }

    /// Starts an agent as [`Client::spawn`] does, and attaches it in place of the current one or of
    /// a lost one, as [`Client::reattach_socket`] does.
    ///
    /// # Errors
    /// If the program cannot be started; the current agent then stays. Or as
    /// [`Client::reattach_socket`]; the child is then killed and reaped.
    pub fn respawn(&self, command: &mut Command) -> Result<(HookChannel, Child), Error> {
        start(command, |socket| self.reattach_socket(socket))
    }
}

/// Starts an agent whose standard input is one end of a socket pair, and connects to it at the
/// other end by `connect`.
fn start<T>(
    command: &mut Command, connect: impl FnOnce(OwnedFd) -> Result<T, Error>,
) -> Result<(T, Child), Error> {
    let (ours, agents) = socket_pair()?;
    let spawned = command.stdin(Stdio::from(agents)).spawn();
    // The command keeps its descriptors. While the agent's end is open in this process, the death
    // of the agent does not close the connection.
    command.stdin(Stdio::null());
    let child = spawned
        .map_err(|source| Error::Spawn { program: command.get_program().to_owned(), source })?;
    match connect(ours) {
        Ok(connected) => Ok((connected, child)),
        Err(error) => {
            child::end(child, Duration::ZERO);
            Err(error)
        }
    }
}
