// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The serial line to the program in the guest. `tests/guests/workload.rs` has the protocol.
//!
//! A thread reads all lines as they come, so that a slow test never blocks the guest. Answers are
//! found by the number of their command: an answer to an earlier connection, or half a line that
//! was lost while QEMU had no connection, disturbs nobody.

use crate::Error;
use crate::deadline::{wait_for, wait_until};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time for an answer, and for what a guest does soon. A guest under TCG on a busy machine is slow.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Time for a boot.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(180);

/// Numbers of commands. All consoles of a process share them, since the answer to a command that
/// was sent to one QEMU may come from the QEMU to which the guest has moved.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A connection to the program in a guest.
#[derive(Debug)]
pub struct Console {
    stream: UnixStream,
    lines: Arc<Mutex<Lines>>,
}

#[derive(Debug, Default)]
struct Lines {
    /// All lines that begin with `@`, with the time of their arrival.
    said: Vec<(Instant, String)>,
    ended: bool,
}

impl Console {
    /// Connects to the socket of a QEMU that is about to create it.
    ///
    /// # Errors
    /// If nobody listens there in time.
    pub fn connect(socket: &Path) -> Result<Self, Error> {
        let what = format!("a connection to {}", socket.display());
        let stream = wait_for(&what, PATIENCE, || UnixStream::connect(socket).ok())?;
        let input = stream.try_clone().map_err(Error::io("share a socket"))?;
        let lines = Arc::<Mutex<Lines>>::default();
        let shared = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in BufReader::new(input).split(b'\n') {
                let Ok(line) = line else { break };
                let line = String::from_utf8_lossy(&line);
                // What comes before the mark is the rest of a lost line.
                let Some(start) = line.find('@') else { continue };
                let line = line[start..].trim_end().to_owned();
                lock(&shared).said.push((Instant::now(), line));
            }
            lock(&shared).ended = true;
        });
        Ok(Self { stream, lines })
    }

    /// Waits until the program in the guest answers.
    ///
    /// # Errors
    /// If it did not in time, or QEMU ended.
    pub fn wait_until_ready(&mut self) -> Result<(), Error> {
        let end = Instant::now() + BOOT_PATIENCE;
        loop {
            // A line that arrives before the guest listens is lost, so it is sent again.
            let answer = self.answer("hello", Duration::from_millis(500));
            match answer {
                Err(Error::Deadline { .. }) if Instant::now() < end => {}
                answer => return answer.map(drop),
            }
        }
    }

    /// Sends a command, such as `check 64M`. Returns what the guest says after `ok`.
    ///
    /// # Errors
    /// If the guest refuses it or does not answer, or QEMU ended.
    pub fn command(&mut self, command: &str) -> Result<String, Error> {
        self.answer(command, PATIENCE).map(|(_, said)| said)
    }

    /// Sends a command whose answer is a text: `dmesg` or `bad`.
    ///
    /// # Errors
    /// As for [`Console::command`].
    pub fn text(&mut self, command: &str) -> Result<Vec<String>, Error> {
        let (number, _) = self.answer(command, PATIENCE)?;
        let prefix = format!("@{number} line ");
        let lines = lock(&self.lines);
        let text = lines.said.iter().filter_map(|(_, line)| line.strip_prefix(&prefix));
        Ok(text.map(str::to_owned).collect())
    }

    /// How the guest is.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn status(&mut self) -> Result<Status, Error> {
        Status::parse(&self.command("status")?)
    }

    /// Asks for the status until `holds`. `what` names the condition in the error.
    ///
    /// # Errors
    /// If it did not hold in time, or the guest does not answer.
    pub fn wait_for_status(
        &mut self, what: &str, mut holds: impl FnMut(&Status) -> bool,
    ) -> Result<Status, Error> {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.status()?;
            if holds(&status) {
                return Ok(status);
            }
            if Instant::now() >= end {
                let last = format!("{what}; the last status was {status:?}");
                return Err(Error::Deadline { what: last, timeout: PATIENCE });
            }
            // The answer travels over a serial line of an emulated machine: spare its processor.
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The ticks that arrived so far, after the command `tick`.
    pub fn ticks(&self) -> Vec<Tick> {
        let lines = lock(&self.lines);
        lines.said.iter().filter_map(|(arrived, line)| Tick::parse(*arrived, line)).collect()
    }

    /// Waits until more than `count` ticks have arrived.
    ///
    /// # Errors
    /// If they did not in time.
    pub fn wait_for_ticks(&self, count: usize) -> Result<(), Error> {
        wait_until("more ticks", PATIENCE, || self.ticks().len() > count)
    }

    /// BAD lines that arrived so far, without being asked for. [`Status::verify`] also counts those
    /// that came while nobody was connected.
    pub fn bad(&self) -> Vec<String> {
        let lines = lock(&self.lines);
        let bad = lines.said.iter().filter_map(|(_, line)| line.strip_prefix("@! BAD "));
        bad.map(str::to_owned).collect()
    }

    fn answer(&mut self, command: &str, timeout: Duration) -> Result<(u64, String), Error> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let sent = self.stream.write_all(format!("{number} {command}\n").as_bytes());
        sent.map_err(Error::io(format!("send \"{command}\" to the guest")))?;
        let (ok, error) = (format!("@{number} ok"), format!("@{number} error "));
        let what = format!("an answer to \"{command}\"");
        let found = wait_for(&what, timeout, || {
            let lines = lock(&self.lines);
            let answer = lines.said.iter().rev().find_map(|(_, line)| {
                let said = line.strip_prefix(&ok).map(|said| Ok(said.trim().to_owned()));
                said.or_else(|| line.strip_prefix(&error).map(|said| Err(said.to_owned())))
            });
            let ended = || Err("QEMU closed the connection".to_owned());
            answer.or_else(|| lines.ended.then(ended))
        })?;
        let refused = |reason| Error::Mismatch(format!("the guest's {command}: {reason}"));
        found.map(|said| (number, said)).map_err(refused)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Ends the reader. QEMU then accepts the next connection.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

fn lock(lines: &Mutex<Lines>) -> std::sync::MutexGuard<'_, Lines> {
    lines.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the guest says of itself. The counters go up from its boot on, over all tasks of a kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Generations that `check` has filled.
    pub check: u64,
    /// Times that `churn` has allocated and freed its memory.
    pub churn: u64,
    /// Pages that `write` has written.
    pub written: u64,
    /// Passes of `disk`.
    pub disk: u64,
    /// Datagrams that `net` has sent.
    pub net_sent: u64,
    /// Datagrams that came back.
    pub net_echoed: u64,
    /// Pages, blocks and datagrams whose content was wrong.
    pub bad: u64,
    /// Messages of the kernel that something is wrong: an oops, a stall, an I/O error.
    pub alarms: u64,
    /// The guest's CLOCK_MONOTONIC. It stops while the VM is paused.
    pub monotonic: Duration,
    /// The guest's CLOCK_REALTIME.
    pub realtime: Duration,
    /// `MemFree`, in bytes.
    pub free: u64,
    /// `MemTotal`, in bytes. It is less while the balloon is inflated.
    pub total: u64,
}

impl Status {
    fn parse(said: &str) -> Result<Self, Error> {
        let number = |name: &str| {
            let value =
                said.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
            let value = value.and_then(|value| value.parse::<u64>().ok());
            value.ok_or_else(|| Error::Mismatch(format!("no {name} in the status: {said}")))
        };
        Ok(Self {
            check: number("check")?,
            churn: number("churn")?,
            written: number("written")?,
            disk: number("disk")?,
            net_sent: number("net_sent")?,
            net_echoed: number("net_echoed")?,
            bad: number("bad")?,
            alarms: number("alarms")?,
            monotonic: Duration::from_nanos(number("monotonic_ns")?),
            realtime: Duration::from_nanos(number("realtime_ns")?),
            free: number("free_kib")? << 10,
            total: number("total_kib")? << 10,
        })
    }

    /// Fails if the guest has found wrong content, or its kernel complained. The commands `bad` and
    /// `dmesg` say what it was.
    ///
    /// # Errors
    /// See above.
    pub fn verify(&self) -> Result<(), Error> {
        if self.bad == 0 && self.alarms == 0 {
            return Ok(());
        }
        Err(Error::Mismatch(format!("the guest complains: {self:?}")))
    }
}

/// A tick of the guest.
#[derive(Debug, Clone, Copy)]
pub struct Tick {
    /// When it arrived, on the host's clock. A gap is a pause, as a user of the guest sees it.
    pub arrived: Instant,
    /// Its number.
    pub number: u64,
    /// The guest's CLOCK_MONOTONIC.
    pub monotonic: Duration,
}

impl Tick {
    fn parse(arrived: Instant, line: &str) -> Option<Self> {
        let (number, monotonic) =
            line.strip_prefix("@! tick number=")?.split_once(" monotonic_ns=")?;
        let monotonic = Duration::from_nanos(monotonic.parse().ok()?);
        Some(Self { arrived, number: number.parse().ok()?, monotonic })
    }
}
