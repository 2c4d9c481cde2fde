//! An agent as a child process, with one end of a pair of sockets as its standard input.
//!
//! That end travels as `stdin` since the standard library duplicates it in the child: no descriptor
//! has to be inheritable in this process at any time, where another thread's child could inherit
//! it, too.

use crate::client::Client;
use crate::config::Config;
use crate::control::socket_pair;
use crate::error::Error;
use crate::hooks::HookChannel;
use std::process::{Child, Command, Stdio};

impl Client {
    /// Starts an agent, such as `pageferry agent --stdin`, and connects to it. The command's
    /// standard input becomes the socket; it is set to nothing afterwards.
    ///
    /// The child is the caller's to wait for. It ends by itself when the last clone of the client
    /// is dropped.
    ///
    /// # Errors
    /// If the program cannot be started, or refuses or breaks the handshake. The child is killed
    /// and waited for then.
    pub fn spawn(
        command: &mut Command, config: Config,
    ) -> Result<(Self, HookChannel, Child), Error> {
        let (ours, agents) = socket_pair()?;
        let spawned = command.stdin(Stdio::from(agents)).spawn();
        // The command keeps its descriptors. As long as the agent's end is open here, its death
        // would not close the connection.
        command.stdin(Stdio::null());
        let mut child = spawned
            .map_err(|source| Error::Spawn { program: command.get_program().to_owned(), source })?;
        match Self::from_socket(ours, config) {
            Ok((client, channel)) => Ok((client, channel, child)),
            Err(error) => {
                // Both fail only if the child is gone already.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }
}
