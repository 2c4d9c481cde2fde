// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of a device on its way to or from a front-end (SET_DEVICE_STATE_FD,
//! CHECK_DEVICE_STATE): it goes through a pipe, on a thread of its own.

use super::device::Device;
use crate::lock::lock;
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use vhost::vhost_user::message::VhostTransferStateDirection;

/// The largest state.
const MAX_STATE: u64 = 64 << 10;

/// A transfer, or none.
#[derive(Debug)]
pub(super) struct StateTransfer {
    device: Arc<dyn Device>,
    thread: Mutex<Option<JoinHandle<Result<(), String>>>>,
}

impl StateTransfer {
    pub(super) fn new(device: Arc<dyn Device>) -> Self {
        Self { device, thread: Mutex::default() }
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
        let transfer = move || match direction {
            VhostTransferStateDirection::SAVE => save(&*device, file),
            VhostTransferStateDirection::LOAD => load(&*device, file),
        };
        *thread = Some(Builder::new().name("device-state".to_owned()).spawn(transfer)?);
        Ok(())
    }

    /// How the transfer has ended. The front-end has closed its end of the pipe.
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
}

fn save(device: &dyn Device, mut file: File) -> Result<(), String> {
    file.write_all(&device.save()).map_err(|error| format!("cannot write it: {error}"))
}

fn load(device: &dyn Device, file: File) -> Result<(), String> {
    let mut state = Vec::new();
    let read = file.take(MAX_STATE + 1).read_to_end(&mut state);
    read.map_err(|error| format!("cannot read it: {error}"))?;
    if state.len() as u64 > MAX_STATE {
        return Err(format!("it has more than {MAX_STATE} bytes"));
    }
    device.load(&state)
}
