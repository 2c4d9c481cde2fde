// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An agent that is upgraded: its process executes the program at its path again, which may be a
//! newer one by now.
//!
//! The process stays, and with it its id: a service manager sees no end, and a VMM has no second
//! agent beside the first ([`one-owner`](crate::invariants#one-owner)). The control socket stays
//! open, so who connects meanwhile waits in its queue. All else ends as when an agent ends, and
//! begins as when it starts, with the same arguments.
//!
//! The program that is executed finds the socket by a variable, which names the process: a program
//! that inherits the variable has no such socket.
//!
//! - [`last_job`]: how the last job has ended, for operators who ask the next program;
//! - [`program`]: the program that is executed, and whether it may be and can be;
//! - [`wish`]: the request for an upgrade, until the reactor's thread takes it;
//! - this file: the hand-over of the control socket.
#![allow(unsafe_code)]

pub mod last_job;
pub mod program;
pub mod wish;

use crate::image::ImageKey;
use crate::image::seal::handover::{self, KeptKey};
use crate::inherited::duplicate;
use crate::sandbox;
use crate::transport::unix_path::{Inode, UnixPathListener};
use crate::transport::unix_socket::not_listening;
use last_job::LastJob;
use pageferry_protocol::control::job::JobStatus;
use program::Program;
use rustix::io::{FdFlags, fcntl_setfd};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;

/// The variable: the process, the descriptor, and the device and number of the socket's path, or
/// zeroes if the path is somebody else's.
const VARIABLE: &str = "PAGEFERRY_CONTROL_SOCKET";

/// The control socket of an agent that is upgraded.
#[derive(Debug)]
pub struct HandedOver {
    /// The socket. It listens.
    pub socket: OwnedFd,
    /// The file at its path, if this agent has made it and is to remove it.
    pub file: Option<Inode>,
    /// How the last job has ended.
    pub last_job: Option<LastJob>,
    /// The key of images, for the next program.
    pub image_key: Option<KeptKey>,
}

/// What the next program of this process gets.
#[derive(Debug)]
pub struct Upgrade {
    /// The control socket.
    pub control: HandedOver,
    /// The program.
    pub program: Program,
    /// A job runs that the next program continues, as if this process had died. Its threads use
    /// what the server has until the program is executed.
    pub job_continues: bool,
}

/// Why the socket cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// The variable is of another program.
    #[error("{VARIABLE} is {0:?}, expected are four numbers: process:descriptor:device:inode")]
    Malformed(String),
    /// The descriptor is something else.
    #[error("{VARIABLE} names descriptor {number}, which is {found}")]
    NotListening {
        /// The descriptor.
        number: RawFd,
        /// What it is.
        found: String,
    },
}

/// The socket that this process had before it executed this program, if there is one.
///
/// # Errors
/// If the variable is malformed, or its descriptor is no socket that listens.
pub fn handed_over() -> Result<Option<HandedOver>, HandOverError> {
    let Some(value) = std::env::var_os(VARIABLE) else { return Ok(None) };
    let malformed = || HandOverError::Malformed(value.to_string_lossy().into_owned());
    let [process, number, device, inode] =
        value.to_str().and_then(numbers).ok_or_else(malformed)?;
    if process != u64::from(std::process::id()) {
        return Ok(None);
    }
    let number = RawFd::try_from(number).map_err(|_| malformed())?;
    let not_listening_here = |found: String| HandOverError::NotListening { number, found };
    let socket = duplicate(number).map_err(|error| not_listening_here(error.to_string()))?;
    if let Some(found) = not_listening(&socket) {
        return Err(not_listening_here(found.to_owned()));
    }
    let file = (inode != 0).then_some(Inode { device, number: inode });
    Ok(Some(HandedOver { socket, file, last_job: LastJob::handed_over(), image_key: None }))
}

impl HandedOver {
    /// The same, with the last job, if there was one.
    #[must_use]
    pub fn with_last_job(self, status: Option<&JobStatus>) -> Self {
        Self { last_job: status.and_then(LastJob::new), ..self }
    }

    /// The same, with the key of images, if there is one.
    ///
    /// # Errors
    /// If the kernel has no memory for it.
    pub fn with_image_key(self, key: Option<&ImageKey>) -> io::Result<Self> {
        Ok(Self { image_key: key.map(KeptKey::new).transpose()?, ..self })
    }

    /// Removes the path of the socket, if it is this agent's: the agent ends after all.
    pub fn forget(self, path: Option<&Path>) {
        if let Some((path, file)) = path.zip(self.file) {
            drop(UnixPathListener::adopt(self.socket, path, file));
        }
    }

    /// Executes `program` in this process, which gets the socket. If that fails, executes the
    /// program that runs now once more: an agent with a listening socket goes on in any case.
    /// Returns only if that fails, too.
    /// `write_log` waits until the log is written.
    pub fn execute(&self, program: &Program, write_log: impl Fn()) -> io::Error {
        if let Err(errno) = fcntl_setfd(&self.socket, FdFlags::empty()) {
            return errno.into();
        }
        // A handler ends with its program. Another request must not end the process until the next
        // program has its own: what is ignored stays ignored.
        ignore_requests();
        let (device, inode) = self.file.map_or((0, 0), |file| (file.device, file.number));
        let process = std::process::id();
        let value = format!("{process}:{}:{device}:{inode}", self.socket.as_raw_fd());
        let mut variables = match self.inherit() {
            Ok(variables) => variables,
            Err(error) => return error,
        };
        variables.push((VARIABLE, value));
        let removed = [last_job::VARIABLE, handover::VARIABLE];
        write_log();
        let error = program.execute(&variables, &removed);
        log::error!("cannot execute {}: {error}; this version goes on", program.path().display());
        write_log();
        Program::running().execute(&variables, &removed)
    }

    /// Lets the next program have what is not the socket. Returns the variables for it.
    fn inherit(&self) -> io::Result<Vec<(&'static str, String)>> {
        let last_job = self.last_job.as_ref().map(LastJob::inherit).transpose()?;
        let image_key = self.image_key.as_ref().map(KeptKey::inherit).transpose()?;
        Ok([last_job, image_key, sandbox::inherit()?].into_iter().flatten().collect())
    }
}

/// Ignores SIGUSR2 from now on, which would end a process without a handler.
pub fn ignore_requests() {
    // SAFETY: this replaces the handler of the signal by none. No memory is touched.
    unsafe { libc::signal(libc::SIGUSR2, libc::SIG_IGN) };
}

/// From now on these signals end the process at once: its handlers end with its program, and nobody
/// would react to what they note.
pub fn default_signals(signals: &[i32]) {
    for signal in signals {
        // SAFETY: this replaces the handler of the signal by none. No memory is touched.
        unsafe { libc::signal(*signal, libc::SIG_DFL) };
    }
}

/// The four numbers of the variable.
fn numbers(text: &str) -> Option<[u64; 4]> {
    let numbers: Result<Vec<u64>, _> = text.split(':').map(str::parse).collect();
    numbers.ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_numbers_and_nothing_else_are_a_socket() {
        assert_eq!(numbers("42:7:2049:131"), Some([42, 7, 2049, 131]));
        for text in ["", "1:2:3", "1:2:3:4:5", "1:2:3:x", "1:2:3:", "1:-2:3:4", " 1:2:3:4"] {
            assert_eq!(numbers(text), None, "{text:?}");
        }
    }
}
