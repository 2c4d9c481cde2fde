// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of QEMU's devices, by QEMU's own migration.
//!
//! QEMU leaves out memory that is shared and has a name (capability `x-ignore-shared`), so its
//! stream has the state of the devices, and memory that is not guest RAM, such as firmware and that
//! of a VGA card. This side gets and gives the stream by one end of a socket pair, of which QEMU
//! gets the other (`getfd`).
//!
//! A save begins while the guest runs ([`Saving::begin`]). QEMU sends the memory, pauses the guest
//! by itself, and waits (capability `pause-before-switchover`). [`Saving::finish`] lets it send the
//! devices. The source is then in the run state `postmigrate`, and `cont` resumes it. A save that
//! was not finished is cancelled first, after which QEMU resumes the guest by itself.
//!
//! Both need other settings of QEMU than those of its user: [`super::migration_settings`].

use super::monitor::{Event, Monitor, MonitorError};
use pageferry_client::StatePiece;
use pageferry_client::error::chain;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Name of the one piece of state.
const PIECE: &str = "qemu";
/// Name of the descriptor in QEMU.
const FD_NAME: &str = "pageferry-state";
/// Largest state, as in the protocol.
const MAX_STATE: u64 = 1 << 30;
/// How long QEMU's migration may make no progress.
const STALL: Duration = Duration::from_secs(20);
/// Interval at which a migration is asked for whose end is not an event.
const POLL: Duration = Duration::from_millis(1);
/// Why the state cannot be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum DeviceStateError {
    /// The monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The migration of QEMU failed.
    #[error("QEMU's migration of its devices failed: {reason}")]
    Failed {
        /// What QEMU said.
        reason: String,
    },
    /// The pipe between QEMU and this process.
    #[error("the stream of QEMU's state")]
    Stream(#[from] std::io::Error),
    /// The state is too large.
    #[error(
        "the state of QEMU's devices has more than {MAX_STATE} bytes: is all guest memory in memory backends with share=on?"
    )]
    TooLarge,
    /// Someone has resumed the guest.
    #[error(
        "someone has resumed the guest (`cont`) while a job had it paused, so its state is not what was saved: \
         leave QEMU's run state alone while a job runs"
    )]
    Resumed,
    /// QEMU makes no progress.
    #[error("QEMU's migration of its devices made no progress in {STALL:?}")]
    Stalled,
    /// The state is not that of a QEMU.
    #[error(
        "the state has the pieces {found:?}, and not one piece named {PIECE:?}: it is of another VMM"
    )]
    OtherVmm {
        /// Names of the pieces.
        found: Vec<String>,
    },
}

/// A save that QEMU has begun, under
/// [`Settings::for_save`](super::migration_settings::Settings::for_save).
#[derive(Debug)]
pub struct Saving {
    stream: UnixStream,
    /// What the thread that reads the stream has read at its end.
    read: Receiver<Result<Vec<u8>, DeviceStateError>>,
    has_finished: bool,
}

impl Saving {
    /// Has QEMU save the memory that is not shared, and pause the guest if it runs.
    ///
    /// # Errors
    /// If QEMU refuses or fails. The save is cancelled then.
    pub fn begin(monitor: &mut Monitor) -> Result<Self, DeviceStateError> {
        let (stream, qemus) = UnixStream::pair()?;
        monitor.command_with_fd("getfd", json!({ "fdname": FD_NAME }), qemus.as_fd())?;
        drop(qemus);
        let (send, read) = channel();
        let ours = stream.try_clone()?;
        // QEMU waits when the socket is full, so this reads all the time. It ends when QEMU has
        // sent all or has failed, or when `stream` is shut down.
        std::thread::Builder::new().name("device-state".into()).spawn(move || {
            let _ = send.send(read_all(&ours));
            let _ = ours.shutdown(Shutdown::Both);
        })?;
        let mut this = Self { stream, read, has_finished: false };
        match this.reach_pause(monitor) {
            Ok(()) => Ok(this),
            Err(error) => {
                // A QEMU that waits for something on the stream would not answer.
                let _ = this.stream.shutdown(Shutdown::Both);
                this.cancel(monitor);
                // A state that is too large makes QEMU fail because nobody reads on.
                Err(this.read.try_recv().ok().and_then(Result::err).unwrap_or(error))
            }
        }
    }

    fn reach_pause(&mut self, monitor: &mut Monitor) -> Result<(), DeviceStateError> {
        monitor.forget_events(MIGRATION)?;
        let arguments = json!({ "uri": format!("fd:{FD_NAME}") });
        with_descriptor(monitor, "migrate", arguments)?;
        wait_for(monitor, "pre-switchover")
    }

    /// Has QEMU save the devices of the guest, which is paused. Returns the whole state.
    ///
    /// # Errors
    /// If QEMU refuses or fails.
    pub fn finish(&mut self, monitor: &mut Monitor) -> Result<Vec<StatePiece>, DeviceStateError> {
        monitor.command("migrate-continue", json!({ "state": "pre-switchover" }))?;
        wait_for(monitor, "completed")?;
        self.has_finished = true;
        let bytes = match self.read.recv_timeout(STALL) {
            Ok(read) => read?,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                return Err(DeviceStateError::Stalled);
            }
        };
        Ok(vec![StatePiece { name: PIECE.into(), bytes }])
    }

    /// Cancels a save that has not finished. QEMU then resumes a guest that it has paused.
    pub fn cancel(&mut self, monitor: &mut Monitor) {
        if std::mem::replace(&mut self.has_finished, true) {
            return;
        }
        // QEMU accepts this also if nothing is to be cancelled.
        let cancelled = monitor.command("migrate_cancel", Value::Null).map_err(Into::into);
        if let Err(error) = cancelled.and_then(|_| wait_for_end(monitor)) {
            log::warn!("cannot cancel QEMU's migration: {}", chain(&error));
        }
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        // Ends the thread that reads.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Runs a command that takes the descriptor which QEMU was given. If it is refused, QEMU closes the
/// descriptor.
fn with_descriptor(
    monitor: &mut Monitor, command: &str, arguments: Value,
) -> Result<Value, MonitorError> {
    let answer = monitor.command(command, arguments);
    if answer.is_err() {
        // Refused if QEMU has taken it.
        let _ = monitor.command("closefd", json!({ "fdname": FD_NAME }));
    }
    answer
}

fn read_all(stream: &UnixStream) -> Result<Vec<u8>, DeviceStateError> {
    let mut bytes = Vec::new();
    stream.take(MAX_STATE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_STATE {
        return Err(DeviceStateError::TooLarge);
    }
    Ok(bytes)
}

/// Resumes the guest. QEMU says that a migration has ended before the guest can be resumed.
///
/// # Errors
/// If QEMU refuses.
pub fn resume(monitor: &mut Monitor) -> Result<(), MonitorError> {
    let deadline = Instant::now() + STALL;
    loop {
        match monitor.command("cont", Value::Null) {
            Err(MonitorError::Refused { .. })
                if Instant::now() < deadline && !is_finalized(monitor)? =>
            {
                std::thread::sleep(POLL);
            }
            resumed => return resumed.map(drop),
        }
    }
}

/// Has QEMU announce the network cards of the guest to the switches, as after a migration that has
/// arrived: a destination that loaded the guest has announced them there. Costs nothing, and fails
/// without harm.
pub fn announce(monitor: &mut Monitor) {
    // As QEMU does by itself, in milliseconds (migration/options.c).
    let rounds = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
    if let Err(error) = monitor.command("announce-self", rounds) {
        log::warn!("the network is not told that the guest is still here: {error}");
    }
}

fn is_finalized(monitor: &mut Monitor) -> Result<bool, MonitorError> {
    let answer = monitor.command("query-status", Value::Null)?;
    Ok(answer.get("status").and_then(Value::as_str) != Some("finish-migrate"))
}

/// Waits until no migration runs.
fn wait_for_end(monitor: &mut Monitor) -> Result<(), DeviceStateError> {
    let deadline = Instant::now() + STALL;
    loop {
        let answer = monitor.command("query-migrate", Value::Null)?;
        match answer.get("status").and_then(Value::as_str) {
            None | Some("none" | "completed" | "failed" | "cancelled") => return Ok(()),
            Some(_) if Instant::now() > deadline => return Err(DeviceStateError::Stalled),
            Some(_) => std::thread::sleep(POLL),
        }
    }
}

/// Loads the state into a QEMU that was started with `-incoming defer`, under
/// [`Settings::for_load`](super::migration_settings::Settings::for_load).
///
/// # Errors
/// If the state is not that of a QEMU, or QEMU refuses it. That QEMU is of no use any more then.
pub fn load(monitor: &mut Monitor, state: &[StatePiece]) -> Result<(), DeviceStateError> {
    let [StatePiece { name, bytes }] = state else {
        return Err(other_vmm(state));
    };
    if name != PIECE {
        return Err(other_vmm(state));
    }
    let (ours, qemus) = UnixStream::pair()?;
    monitor.command_with_fd("getfd", json!({ "fdname": FD_NAME }), qemus.as_fd())?;
    drop(qemus);
    ours.set_write_timeout(Some(STALL))?;
    monitor.forget_events(MIGRATION)?;
    // Someone may have sent `cont`, which would run the guest as soon as it is loaded. QEMU
    // forgets that.
    monitor.command("stop", Value::Null)?;
    // QEMU loads in its main loop, so the answer may come after the load has begun.
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            (&ours).write_all(bytes)?;
            ours.shutdown(Shutdown::Write)
        });
        // A QEMU that exits at once would take the reason with it.
        let arguments = json!({ "uri": format!("fd:{FD_NAME}"), "exit-on-error": false });
        let begun = with_descriptor(monitor, "migrate-incoming", arguments);
        if begun.is_err() {
            let _ = ours.shutdown(Shutdown::Both);
        }
        let written = writer.join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()));
        begun.map(|_| written)
    })?;
    // A QEMU that refuses the state closes the stream, and says why.
    wait_for(monitor, "completed")?;
    written.map_err(stalled)?;
    if is_running(monitor)? {
        monitor.command("stop", Value::Null)?;
        return Err(DeviceStateError::Resumed);
    }
    Ok(())
}

/// True if the guest runs.
///
/// # Errors
/// If QEMU does not answer.
pub fn is_running(monitor: &mut Monitor) -> Result<bool, MonitorError> {
    let answer = monitor.command("query-status", Value::Null)?;
    Ok(answer.get("running").and_then(Value::as_bool) == Some(true))
}

fn other_vmm(state: &[StatePiece]) -> DeviceStateError {
    DeviceStateError::OtherVmm { found: state.iter().map(|piece| piece.name.clone()).collect() }
}

fn stalled(error: std::io::Error) -> DeviceStateError {
    match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => DeviceStateError::Stalled,
        _ => error.into(),
    }
}

/// The event of a migration that has reached another state.
const MIGRATION: &str = "MIGRATION";

/// Waits until QEMU's migration is in this state.
fn wait_for(monitor: &mut Monitor, wanted: &str) -> Result<(), DeviceStateError> {
    fn status(event: &Event) -> Option<&str> {
        event.content.get("status")?.as_str()
    }
    let deadline = Instant::now() + STALL;
    let is_over = |event: &Event| {
        let status = status(event).unwrap_or_default();
        event.name == MIGRATION && (status == wanted || matches!(status, "failed" | "cancelled"))
    };
    match monitor.wait_for_event(deadline, is_over)? {
        None => Err(DeviceStateError::Stalled),
        Some(event) if status(&event) == Some(wanted) => Ok(()),
        Some(event) => {
            let answer = monitor.command("query-migrate", Value::Null)?;
            let reason = answer.get("error-desc").and_then(Value::as_str);
            let reason = reason.or(status(&event)).unwrap_or_default().to_owned();
            Err(DeviceStateError::Failed { reason })
        }
    }
}
