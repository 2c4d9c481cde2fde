// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of a device on its way to or from a front-end (SET_DEVICE_STATE_FD,
//! CHECK_DEVICE_STATE): it goes through a pipe, on a thread of its own.

use super::device::Device;
use crate::lock::lock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::VhostTransferStateDirection;

/// The largest state.
const MAX_STATE: usize = 64 << 10;
/// How long a transfer may take: the front-end waits in CHECK_DEVICE_STATE, and its guest is
/// paused.
const LIMIT: Duration = Duration::from_secs(10);
/// How often a transfer looks whether the connection has ended.
const LOOK: Duration = Duration::from_millis(100);
/// Pause after a pipe was not ready although the kernel said so.
const PAUSE: Duration = Duration::from_millis(10);

/// A transfer, or none.
#[derive(Debug)]
pub(super) struct StateTransfer {
    device: Arc<dyn Device>,
    thread: Mutex<Option<JoinHandle<Result<(), String>>>>,
    ending: Arc<AtomicBool>,
}

impl StateTransfer {
    pub(super) fn new(device: Arc<dyn Device>) -> Self {
        Self { device, thread: Mutex::default(), ending: Arc::default() }
    }

    /// Begins to write the state to `file`, or to read it.
    pub(super) fn begin(
        &self, direction: VhostTransferStateDirection, file: File,
    ) -> io::Result<()> {
        let mut thread = lock(&self.thread);
        if thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "the state of the device is on its way already",
            ));
        }
        let device = self.device.clone();
        // What can be read when this looks, somebody else may read first.
        let flags = fcntl_getfl(&file)?;
        fcntl_setfl(&file, flags | OFlags::NONBLOCK)?;
        let mut pipe = Pipe { file, deadline: Instant::now() + LIMIT, ending: self.ending.clone() };
        let transfer = move || match direction {
            VhostTransferStateDirection::SAVE => pipe.write(&device.save()),
            VhostTransferStateDirection::LOAD => device.load(&pipe.read()?),
        };
        *thread = Some(Builder::new().name("device-state".to_owned()).spawn(transfer)?);
        Ok(())
    }

    /// How the transfer has ended. Waits until then.
    pub(super) fn finish(&self) -> io::Result<()> {
        let Some(thread) = lock(&self.thread).take() else {
            return Err(io::Error::other("no state of the device is on its way"));
        };
        let outcome = thread.join().unwrap_or_else(|_| Err("it panicked".to_owned()));
        outcome.map_err(|why| {
            let name = self.device.name();
            log::warn!("{name}: the state of the device did not move: {why}");
            io::Error::other(why)
        })
    }

    /// Ends a transfer: the front-end is gone.
    pub(super) fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }
}

/// The front-end's pipe, which it may leave as it is.
struct Pipe {
    file: File,
    deadline: Instant,
    ending: Arc<AtomicBool>,
}

impl Pipe {
    fn write(&mut self, state: &[u8]) -> Result<(), String> {
        // A pipe that can be written has room for so many bytes at once.
        for part in state.chunks(rustix::pipe::PIPE_BUF) {
            while !self.done("write", |file| file.write_all(part))? {}
        }
        Ok(())
    }

    fn read(&mut self) -> Result<Vec<u8>, String> {
        let (mut state, mut part) = (Vec::new(), [0; 4096]);
        loop {
            let mut length = None;
            let read = |file: &mut File| file.read(&mut part).map(|read| length = Some(read));
            self.done("read", read)?;
            match length {
                Some(0) => return Ok(state),
                Some(length) => state.extend_from_slice(&part[..length]),
                None => {}
            }
            if state.len() > MAX_STATE {
                return Err(format!("it has more than {MAX_STATE} bytes"));
            }
        }
    }

    /// Runs `act` when the pipe is ready for it. False if it was not after all.
    fn done(
        &mut self, what: &str, act: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> Result<bool, String> {
        self.wait(if what == "read" { PollFlags::IN } else { PollFlags::OUT })?;
        match act(&mut self.file) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // A socket can be readable and have less than it gives at once.
                std::thread::sleep(PAUSE);
                Ok(false)
            }
            Err(error) => Err(format!("cannot {what} it: {error}")),
        }
    }

    fn wait(&self, events: PollFlags) -> Result<(), String> {
        let look = Timespec { tv_sec: 0, tv_nsec: LOOK.subsec_nanos().into() };
        loop {
            let mut polled = [PollFd::from_borrowed_fd(self.file.as_fd(), events)];
            match poll(&mut polled, Some(&look)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) if Instant::now() < self.deadline => return Ok(()),
                Ok(_) => {}
                Err(errno) => return Err(errno.to_string()),
            }
            if self.ending.load(Ordering::Relaxed) {
                return Err("the front-end is gone".to_owned());
            }
            if Instant::now() >= self.deadline {
                let seconds = LIMIT.as_secs();
                return Err(format!("the front-end has not moved it within {seconds} s"));
            }
        }
    }
}
