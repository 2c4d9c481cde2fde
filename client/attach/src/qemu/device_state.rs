// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of QEMU's devices, by QEMU's own migration.
//!
//! QEMU leaves out memory that is shared and has a name (capability `x-ignore-shared`), so its
//! stream has the state of the devices, and memory that is not guest RAM, such as that of a VGA
//! card. This side gets and gives the stream by one end of a socket pair, of which QEMU gets the
//! other (`getfd`).
//!
//! Afterwards the source is in the run state `postmigrate`, and `cont` resumes it.
//!
//! What is set in QEMU for this is set back: the capabilities and parameters belong to the user.

use super::monitor::{Monitor, MonitorError};
use pageferry_client::StatePiece;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Name of the one piece of state.
const PIECE: &str = "qemu";
/// Name of the descriptor in QEMU.
const FD_NAME: &str = "pageferry-state";
/// Largest state, as in the protocol.
const MAX_STATE: u64 = 1 << 30;
/// How long QEMU's migration may make no progress.
const STALL: Duration = Duration::from_secs(20);
/// Interval at which QEMU is asked how far it is.
const POLL: Duration = Duration::from_millis(1);
/// Bytes per second that QEMU may send: as good as unlimited, for the state goes to a pipe, and the
/// guest is paused.
const BANDWIDTH: u64 = 1 << 40;

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

/// What a migration needs, and what was set before.
struct Settings {
    capabilities: Value,
    bandwidth: Option<u64>,
}

impl Settings {
    /// Sets the capabilities and parameters for a transfer of the state.
    fn set(monitor: &mut Monitor) -> Result<Self, MonitorError> {
        let before = monitor.command("query-migrate-capabilities", Value::Null)?;
        let wanted: Vec<Value> = before
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| one.get("capability")?.as_str())
            .map(|name| {
                let state = matches!(name, "x-ignore-shared" | "events");
                json!({ "capability": name, "state": state })
            })
            .collect();
        monitor.command("migrate-set-capabilities", json!({ "capabilities": wanted }))?;
        let parameters = monitor.command("query-migrate-parameters", Value::Null)?;
        let bandwidth = parameters.get("max-bandwidth").and_then(Value::as_u64);
        let this = Self { capabilities: before, bandwidth };
        let set = monitor.command("migrate-set-parameters", json!({ "max-bandwidth": BANDWIDTH }));
        if let Err(error) = set {
            this.restore(monitor);
            return Err(error);
        }
        Ok(this)
    }

    fn restore(&self, monitor: &mut Monitor) {
        let capabilities = json!({ "capabilities": self.capabilities });
        let restored = monitor.command("migrate-set-capabilities", capabilities).and_then(|_| {
            match self.bandwidth {
                Some(bytes) => {
                    monitor.command("migrate-set-parameters", json!({ "max-bandwidth": bytes }))
                }
                None => Ok(Value::Null),
            }
        });
        if let Err(error) = restored {
            log::warn!("QEMU's migration settings stay changed: {error}");
        }
    }
}

/// Saves the state of the devices of a paused guest.
///
/// # Errors
/// If QEMU refuses or fails. The guest can be resumed.
pub fn save(monitor: &mut Monitor) -> Result<Vec<StatePiece>, DeviceStateError> {
    let settings = Settings::set(monitor)?;
    let saved = save_with_settings(monitor);
    if saved.is_err() {
        // Refused if it has ended.
        let _ = monitor.command("migrate_cancel", Value::Null);
        let _ = wait_for_end(monitor);
    }
    settings.restore(monitor);
    Ok(vec![StatePiece { name: PIECE.into(), bytes: saved? }])
}

fn save_with_settings(monitor: &mut Monitor) -> Result<Vec<u8>, DeviceStateError> {
    let (ours, qemus) = UnixStream::pair()?;
    monitor.command_with_fd("getfd", json!({ "fdname": FD_NAME }), qemus.as_fd())?;
    drop(qemus);
    ours.set_read_timeout(Some(STALL))?;
    monitor.command("migrate", json!({ "uri": format!("fd:{FD_NAME}") }))?;
    let mut bytes = Vec::new();
    // The end comes when QEMU has sent all, or has failed.
    (&ours).take(MAX_STATE + 1).read_to_end(&mut bytes).map_err(stalled)?;
    if bytes.len() as u64 > MAX_STATE {
        return Err(DeviceStateError::TooLarge);
    }
    wait_for_end(monitor)?;
    Ok(bytes)
}

/// Loads the state into a QEMU that was started with `-incoming defer`.
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
    let settings = Settings::set(monitor)?;
    let loaded = load_bytes(monitor, bytes);
    settings.restore(monitor);
    loaded
}

fn load_bytes(monitor: &mut Monitor, bytes: &[u8]) -> Result<(), DeviceStateError> {
    let (ours, qemus) = UnixStream::pair()?;
    monitor.command_with_fd("getfd", json!({ "fdname": FD_NAME }), qemus.as_fd())?;
    drop(qemus);
    ours.set_write_timeout(Some(STALL))?;
    // QEMU loads in its main loop, so the answer may come after the load has begun.
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            (&ours).write_all(bytes)?;
            ours.shutdown(std::net::Shutdown::Write)
        });
        let begun = monitor.command("migrate-incoming", json!({ "uri": format!("fd:{FD_NAME}") }));
        if begun.is_err() {
            let _ = ours.shutdown(std::net::Shutdown::Both);
        }
        let written = writer.join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()));
        begun.map(|_| written)
    })?;
    // A QEMU that refuses the state closes the stream, and says why.
    wait_for_end(monitor)?;
    written.map_err(stalled)
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

/// Waits for the end of QEMU's migration.
fn wait_for_end(monitor: &mut Monitor) -> Result<(), DeviceStateError> {
    let deadline = Instant::now() + STALL;
    loop {
        let answer = monitor.command("query-migrate", Value::Null)?;
        match answer.get("status").and_then(Value::as_str) {
            Some("completed") => return Ok(()),
            Some(status @ ("failed" | "cancelled")) => {
                let reason = answer.get("error-desc").and_then(Value::as_str).unwrap_or(status);
                return Err(DeviceStateError::Failed { reason: reason.to_owned() });
            }
            None | Some("none") => {
                return Err(DeviceStateError::Failed { reason: "it did not begin".to_owned() });
            }
            Some(_) if Instant::now() > deadline => return Err(DeviceStateError::Stalled),
            Some(_) => std::thread::sleep(POLL),
        }
    }
}
