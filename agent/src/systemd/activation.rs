// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Socket activation: the listening control socket that systemd hands over, as described in
//! `sd_listen_fds(3)`.
//!
//! `LISTEN_FDS` is the number of descriptors, from 3 on, and `LISTEN_PID` the process for which
//! they are. A program that a service starts inherits the variables of the service. So they count
//! only for the process that they name.

use crate::inherited::duplicate;
use crate::transport::unix_socket::not_listening;
use std::env::VarError;
use std::os::fd::{OwnedFd, RawFd};

/// The first descriptor that systemd hands over.
const FIRST: RawFd = 3;

/// Why what was handed over cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// A variable is no number.
    #[error("{variable} is {value:?}, expected is a number")]
    NoNumber {
        /// The name of the variable.
        variable: &'static str,
        /// Its value.
        value: String,
    },
    /// There is more than one socket.
    #[error("LISTEN_FDS is {0}: an agent has one control socket, so one ListenStream")]
    TooMany(u32),
    /// Descriptor 3 is something else.
    #[error(
        "LISTEN_FDS is 1, and descriptor 3 is {0}, expected is a UNIX stream socket that listens"
    )]
    NotListening(&'static str),
    /// Descriptor 3 cannot be used.
    #[error("LISTEN_FDS is 1, and descriptor 3 cannot be used")]
    Descriptor(#[source] std::io::Error),
}

/// The listening socket that this process inherited, if there is one.
///
/// # Errors
/// If what was handed over is not one UNIX socket that listens.
pub fn inherited_listener() -> Result<Option<OwnedFd>, ActivationError> {
    let variable = |name| match std::env::var(name) {
        Ok(value) => Some(value),
        Err(VarError::NotPresent) => None,
        Err(VarError::NotUnicode(value)) => Some(value.to_string_lossy().into_owned()),
    };
    let count = count(variable("LISTEN_PID"), variable("LISTEN_FDS"), std::process::id())?;
    match count {
        0 => Ok(None),
        1 => {
            let socket = duplicate(FIRST).map_err(ActivationError::Descriptor)?;
            match not_listening(&socket) {
                Some(found) => Err(ActivationError::NotListening(found)),
                None => Ok(Some(socket)),
            }
        }
        more => Err(ActivationError::TooMany(more)),
    }
}

/// The number of descriptors that are for the process `own`.
fn count(pid: Option<String>, fds: Option<String>, own: u32) -> Result<u32, ActivationError> {
    let (Some(pid), Some(fds)) = (pid, fds) else { return Ok(0) };
    let number = |variable, value: String| match value.parse::<u32>() {
        Ok(number) => Ok(number),
        Err(_) => Err(ActivationError::NoNumber { variable, value }),
    };
    if number("LISTEN_PID", pid)? != own {
        return Ok(0);
    }
    number("LISTEN_FDS", fds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_count_only_for_the_process_that_is_named() {
        let text = |text: &str| Some(text.to_owned());
        let counted = |pid, fds| count(pid, fds, 42).map_err(|error| error.to_string());
        assert_eq!(counted(None, None), Ok(0));
        assert_eq!(counted(text("42"), None), Ok(0));
        assert_eq!(counted(None, text("1")), Ok(0));
        assert_eq!(counted(text("41"), text("1")), Ok(0));
        assert_eq!(counted(text("41"), text("x")), Ok(0), "it is for another process");
        assert_eq!(counted(text("42"), text("2")), Ok(2));
        let error = "LISTEN_PID is \"\", expected is a number".to_owned();
        assert_eq!(counted(text(""), text("1")), Err(error));
        let error = "LISTEN_FDS is \"-1\", expected is a number".to_owned();
        assert_eq!(counted(text("42"), text("-1")), Err(error));
    }
}
