// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Starting an agent as a child process, with one end of a socket pair as its standard input.
//!
//! The socket travels as `stdin` because the standard library duplicates it in the child. So no
//! descriptor of this process is ever inheritable, and the child of another thread cannot inherit
//! one by accident.

use crate::client::Client;
use crate::config::Config;
use crate::control::socket_pair;
use crate::error::Error;
use crate::hooks::HookChannel;
use std::process::{Child, Command, Stdio};

impl Client {
    /// Starts an agent, such as `pageferry agent --stdin`, and connects to it. The standard input
    /// of the command becomes the socket; afterwards it is set to null.
    ///
    /// The caller has to wait for the child. The child exits by itself when the last clone of the
    /// client is dropped.
    ///
    /// # Errors
    /// If the program cannot be started, refuses the handshake or breaks it. The child is then
    /// killed and reaped.
    pub fn spawn(
        command: &mut Command, config: Config,
    ) -> Result<(Self, HookChannel, Child), Error> {
        let (ours, agents) = socket_pair()?;
        let spawned = command.stdin(Stdio::from(agents)).spawn();
        // The command keeps its descriptors. While the agent's end is open in this process, the
        // death of the agent does not close the connection.
        command.stdin(Stdio::null());
        let mut child = spawned
            .map_err(|source| Error::Spawn { program: command.get_program().to_owned(), source })?;
        match Self::from_socket(ours, config) {
            Ok((client, channel)) => Ok((client, channel, child)),
            Err(error) => {
                // Both fail only if the child has exited already.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }
}
