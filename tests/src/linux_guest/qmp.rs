// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client of QEMU's monitor (QMP), enough for tests.

use super::console::PATIENCE;
use crate::Error;
use crate::deadline::wait_for;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A connection to a monitor, after the handshake.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// A line whose end has not come yet.
    partial: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to the socket of a QEMU that is about to create it.
    ///
    /// # Errors
    /// If nobody listens there in time, or it is no QMP.
    pub fn connect(socket: &Path) -> Result<Self, Error> {
        let what = format!("a connection to {}", socket.display());
        let stream = wait_for(&what, PATIENCE, || UnixStream::connect(socket).ok())?;
        let stream = BufReader::new(stream);
        let mut qmp = Self { stream, partial: Vec::new(), events: VecDeque::new() };
        qmp.receive("the greeting", Instant::now() + PATIENCE)?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Executes a command. Returns its `return`.
    ///
    /// # Errors
    /// If QEMU refuses it or does not answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let request = json!({ "execute": command, "arguments": arguments });
        let sent = self.stream.get_mut().write_all(format!("{request}\n").as_bytes());
        sent.map_err(Error::io(format!("send {command} to QEMU")))?;
        let end = Instant::now() + PATIENCE;
        loop {
            let mut message = self.receive(command, end)?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else {
                return Err(Error::Mismatch(format!("QEMU's {command}: {message}")));
            }
        }
    }

    /// Executes a command of the human monitor.
    ///
    /// # Errors
    /// As for [`Qmp::execute`].
    pub fn human(&mut self, command: &str) -> Result<String, Error> {
        let said = self.execute("human-monitor-command", json!({ "command-line": command }))?;
        Ok(said.as_str().unwrap_or_default().to_owned())
    }

    /// Waits for an event with this name. Events before it are dropped.
    ///
    /// # Errors
    /// If it did not come in time.
    pub fn wait_for_event(&mut self, name: &str) -> Result<Value, Error> {
        let end = Instant::now() + PATIENCE;
        loop {
            let message = match self.events.pop_front() {
                Some(event) => event,
                None => self.receive(name, end)?,
            };
            if message["event"] == name {
                return Ok(message);
            }
        }
    }

    /// Sets the balloon so that the guest keeps `size` bytes. This takes time: see
    /// [`Qmp::wait_for_balloon`].
    ///
    /// # Errors
    /// If QEMU refuses.
    pub fn balloon(&mut self, size: u64) -> Result<(), Error> {
        self.execute("balloon", json!({ "value": size })).map(drop)
    }

    /// Waits until the balloon leaves the guest exactly `size` bytes.
    ///
    /// # Errors
    /// If it does not in time, or QEMU refuses.
    pub fn wait_for_balloon(&mut self, size: u64) -> Result<(), Error> {
        let end = Instant::now() + PATIENCE;
        loop {
            let said = self.execute("query-balloon", json!({}))?;
            if said["actual"].as_u64() == Some(size) {
                return Ok(());
            }
            if Instant::now() >= end {
                let what = format!("a balloon that leaves {size} bytes, instead of {said},");
                return Err(Error::Deadline { what, timeout: PATIENCE });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The next message. What has arrived of a line stays for the next call if its end is late.
    fn receive(&mut self, what: &str, end: Instant) -> Result<Value, Error> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let what = format!("QEMU's answer: {what}");
                return Err(Error::Deadline { what, timeout: PATIENCE });
            }
            let set = self.stream.get_ref().set_read_timeout(Some(left));
            set.map_err(Error::io("set a timeout"))?;
            match self.stream.read_until(b'\n', &mut self.partial) {
                Ok(_) if self.partial.ends_with(b"\n") => break,
                Ok(_) => return Err(Error::Mismatch(format!("QEMU ended before {what}"))),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock) => {}
                Err(source) => {
                    return Err(Error::Io { what: format!("read {what} from QEMU"), source });
                }
            }
        }
        let line = std::mem::take(&mut self.partial);
        serde_json::from_slice(&line).map_err(|error| {
            Error::Mismatch(format!("QEMU said {:?}: {error}", String::from_utf8_lossy(&line)))
        })
    }
}
