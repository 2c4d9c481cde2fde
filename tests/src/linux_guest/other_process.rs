// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A process that need not be a child of the test: QEMU and the agent belong to the side-car.

use super::console::PATIENCE;
use crate::Error;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open, pidfd_send_signal,
};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// A process. Its id cannot become that of another process.
#[derive(Debug)]
pub struct OtherProcess {
    pid: u32,
    fd: OwnedFd,
}

impl OtherProcess {
    /// The process with this id.
    ///
    /// # Errors
    /// If there is none.
    pub fn open(pid: u32) -> Result<Self, Error> {
        let id = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let id = id.ok_or_else(|| Error::Argument(format!("{pid} is no process")))?;
        let fd = pidfd_open(id, PidfdFlags::empty()).map_err(Error::kernel("open a process"))?;
        Ok(Self { pid, fd })
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        pidfd_send_signal(&self.fd, signal).map_err(Error::kernel("send a signal"))
    }

    /// Ends all connections to the UNIX socket at `path`, at which it listens.
    ///
    /// # Errors
    /// If there is none, or the kernel refuses a copy of its descriptors.
    pub fn end_connections_of(&self, path: &str) -> Result<(), Error> {
        let failed = Error::io;
        let sockets = std::fs::read_to_string("/proc/net/unix").map_err(failed("list sockets"))?;
        // A socket that was accepted has the path of the one that listens. State 3: connected.
        let connected: Vec<String> = sockets
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|words| words.len() == 8 && words[5] == "03" && words[7] == path)
            .map(|words| format!("socket:[{}]", words[6]))
            .collect();
        let mut ended = 0;
        let folder = format!("/proc/{}/fd", self.pid);
        for entry in std::fs::read_dir(folder).map_err(failed("list descriptors"))? {
            let entry = entry.map_err(failed("list descriptors"))?;
            let link = std::fs::read_link(entry.path()).unwrap_or_default();
            if !connected.iter().any(|socket| link.as_os_str() == socket.as_str()) {
                continue;
            }
            let number = entry.file_name().to_string_lossy().parse().unwrap_or(-1);
            let copy = pidfd_getfd(&self.fd, number, PidfdGetfdFlags::empty());
            let copy = copy.map_err(Error::kernel("copy a descriptor"))?;
            shutdown(&copy, Shutdown::Both).map_err(Error::kernel("end a connection"))?;
            ended += 1;
        }
        match ended {
            0 => Err(Error::Argument(format!("nobody is connected to {path}"))),
            _ => Ok(()),
        }
    }

    /// Kills it, and waits until it is gone.
    ///
    /// # Errors
    /// If it had ended before.
    pub fn kill(&self) -> Result<(), Error> {
        self.signal(Signal::KILL)?;
        self.wait_for_end()
    }

    /// Waits until it has ended. It may still be a zombie.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn wait_for_end(&self) -> Result<(), Error> {
        if self.ends_within(PATIENCE) {
            return Ok(());
        }
        Err(Error::Deadline { what: format!("the end of process {}", self.pid), timeout: PATIENCE })
    }

    /// True if it has ended.
    pub fn has_ended(&self) -> bool {
        self.ends_within(Duration::ZERO)
    }

    fn ends_within(&self, time: Duration) -> bool {
        let timeout = Timespec::try_from(time).ok();
        let mut polled = [PollFd::new(&self.fd, PollFlags::IN)];
        poll(&mut polled, timeout.as_ref()).is_ok_and(|ready| ready > 0)
    }
}
