// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guard process for the moments in which a job has paused the guest.
//!
//! QEMU does not notice when the attachment dies: a guest that is paused for a job would stay
//! paused. So a second process waits for the end of the first one. If that comes while a job has
//! the guest paused, and the guest was not given up, the guard resumes it by the same monitor
//! (`vmm-survives`).
//!
//! The attachment tells the guard by a pipe what would have to be done, a line each, *before* the
//! guest is paused, and before the agent may send a commit. So the guard never resumes a guest that
//! may run elsewhere (`one-owner`). If it is told of the commit and the attachment dies before the
//! agent hears it, the guest stays paused, although it was never sent: an operator has to resume
//! it.

use super::device_state;
use super::migration_settings::Settings;
use super::monitor::{Monitor, MonitorError};
use crate::process::target::{ProcessError, TargetProcess};
use serde_json::Value;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, PipeWriter, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long the guard tries to reach the monitor, which was in use until a moment ago.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Interval at which it tries.
const TRY: Duration = Duration::from_millis(20);

/// Begins a line with the settings that are to be set back in QEMU.
const SETTINGS: &str = "s";

/// What the guard has to do when the attachment is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Duty {
    /// Nothing: no job has paused the guest, or it may run elsewhere.
    Nothing = b'n',
    /// Resume the guest.
    Resume = b'r',
}

/// The attachment's end of a guard.
#[derive(Debug)]
pub(super) struct Guard {
    /// The command that starts one.
    command: Vec<OsString>,
    running: Option<(Child, PipeWriter)>,
    /// What the guard was told last, for the next one.
    duty: Duty,
    /// The same, as the line that says it.
    settings: String,
}

impl Guard {
    /// Starts no process yet. `command` is one that calls [`run`].
    pub(super) fn new(command: Vec<OsString>) -> Self {
        Self { command, running: None, duty: Duty::Nothing, settings: settings_line(None) }
    }

    /// Tells the guard its duty, which counts when this returns. Starts a guard if there is none:
    /// the first, or one in place of one that was killed.
    ///
    /// # Errors
    /// If there is none, and none can be started. Then nobody does what the guard would do.
    pub(super) fn set(&mut self, duty: Duty) -> std::io::Result<()> {
        self.duty = duty;
        self.tell(&duty_line(duty))
    }

    /// Tells the guard what it has to set back in QEMU, or that there is nothing. This counts, and
    /// a guard is started, as for [`Guard::set`].
    ///
    /// # Errors
    /// As for [`Guard::set`].
    pub(super) fn remember(&mut self, settings: Option<&Settings>) -> std::io::Result<()> {
        self.settings = settings_line(settings);
        self.tell(&self.settings.clone())
    }

    /// Tells a guard that runs what is new, or the next one all that holds.
    fn tell(&mut self, line: &str) -> std::io::Result<()> {
        if self.write(line).is_ok() {
            return Ok(());
        }
        self.end();
        self.start()?;
        self.write(&format!("{}{}", self.settings, duty_line(self.duty)))
    }

    fn start(&mut self) -> std::io::Result<()> {
        let (theirs, ours) = std::io::pipe()?;
        let mut words = self.command.iter();
        let mut command = Command::new(words.next().cloned().unwrap_or_default());
        // What ends the attachment by its group is not to end the guard.
        command.args(words).process_group(0).stdin(Stdio::from(theirs)).stdout(Stdio::null());
        self.running = Some((command.spawn()?, ours));
        Ok(())
    }

    fn write(&mut self, line: &str) -> std::io::Result<()> {
        match &mut self.running {
            Some((_, pipe)) => pipe.write_all(line.as_bytes()),
            None => Err(std::io::ErrorKind::NotConnected.into()),
        }
    }

    fn end(&mut self) {
        if let Some((mut child, pipe)) = self.running.take() {
            drop(pipe);
            // It ends at once: its pipe is closed, and it has nothing to do, or it is dead.
            let _ = child.wait();
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Who ends in order has decided about the guest. Settings that are left are set back.
        let _ = self.write(&duty_line(Duty::Nothing));
        self.end();
    }
}

fn duty_line(duty: Duty) -> String {
    format!("{}\n", duty as u8 as char)
}

fn settings_line(settings: Option<&Settings>) -> String {
    let described = settings.map_or(Value::Null, Settings::to_json);
    format!("{SETTINGS}{described}\n")
}

/// The guard process: waits until `told` ends, and then does what the last byte says, for the QEMU
/// with this monitor and process.
///
/// # Errors
/// If QEMU cannot be put in order.
pub fn run(told: impl Read, monitor: &Path, pid: u32) -> Result<(), GuardError> {
    let process = TargetProcess::open(pid)?;
    let (mut resumes, mut settings) = (false, None);
    for line in BufReader::new(told).lines() {
        // It ends with the attachment.
        let Ok(line) = line else { break };
        match line.strip_prefix(SETTINGS) {
            Some(described) => settings = serde_json::from_str(described).ok(),
            None => resumes = line.starts_with(Duty::Resume as u8 as char),
        }
    }
    let settings = settings.and_then(Settings::from_json);
    if !resumes && settings.is_none() {
        return Ok(());
    }
    log::warn!(
        "the attachment of QEMU {pid} is gone in the middle of a job: putting QEMU in order"
    );
    let mut restore = settings;
    let deadline = Instant::now() + TIMEOUT;
    let mut logged = String::new();
    loop {
        if process.has_exited()? {
            log::info!("QEMU {pid} has ended");
            return Ok(());
        }
        let resumed = Monitor::connect(monitor).and_then(|mut monitor| {
            check_is_of(&monitor, pid)?;
            if resumes {
                resume(&mut monitor)?;
            }
            if let Some(settings) = restore.take() {
                settings.restore(&mut monitor);
            }
            Ok(())
        });
        match resumed {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                log::error!("QEMU {pid} could not be put in order{}", left(resumes));
                return Err(error.into());
            }
            Err(error) => {
                let why = pageferry_client::error::chain(&error);
                if why != logged {
                    log::warn!("cannot put QEMU {pid} in order yet{}: {why}", left(resumes));
                    logged = why;
                }
            }
        }
        // Ends early with QEMU.
        let _ = process.wait(Some(TRY))?;
    }
}

/// Refuses a monitor that is not that of this QEMU: whoever has its path now has another guest.
fn check_is_of(monitor: &Monitor, pid: u32) -> Result<(), MonitorError> {
    match monitor.process() {
        // It may have been made by a process that has ended, such as the parent of a daemon.
        Some(other) if other != pid && TargetProcess::open(other).is_ok() => {
            Err(monitor.of_other_process())
        }
        _ => Ok(()),
    }
}

/// What a QEMU that is not in order means for its guest.
fn left(resumes: bool) -> &'static str {
    if resumes { "; its guest stays paused" } else { "; its migration settings stay changed" }
}

/// Resumes the guest, also if QEMU is still saving its state.
fn resume(monitor: &mut Monitor) -> Result<(), MonitorError> {
    // Refused if none is under way.
    let _ = monitor.command("migrate_cancel", Value::Null);
    device_state::resume(monitor)?;
    // A destination may have loaded it.
    device_state::announce(monitor);
    Ok(())
}

/// Why QEMU cannot be put in order.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The monitor.
    #[error("QEMU could not be put in order")]
    Monitor(#[from] MonitorError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::monitor::test_support::{DONE, at_monitor};
    use serde_json::json;

    /// The commands that a guard sends which was told this, in the process of this test.
    fn commands(told: &[u8]) -> Vec<String> {
        let (outcome, commands) = at_monitor(
            |_| Some(DONE.to_owned()),
            |path| {
                let outcome = run(told, path, std::process::id());
                // The monitor waits for one client.
                let _ = std::os::unix::net::UnixStream::connect(path);
                outcome
            },
        );
        outcome.unwrap();
        let name = |command: &Value| command["execute"].as_str().unwrap().to_owned();
        commands.iter().map(name).collect()
    }

    #[test]
    fn a_guest_that_was_paused_and_not_given_up_is_resumed() {
        let all = ["qmp_capabilities", "migrate_cancel", "cont", "announce-self"];
        assert_eq!(commands(b"n\nr\n"), all);
        assert_eq!(commands(b"r\nn\nr\n"), all);
    }

    #[test]
    fn monitor_of_another_process_is_refused() {
        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        let ((own, others), _) = at_monitor(
            |_| Some(DONE.to_owned()),
            |path| {
                let monitor = Monitor::connect(path).unwrap();
                let own = check_is_of(&monitor, std::process::id());
                // This one listens, and lives.
                (own, check_is_of(&monitor, other.id()))
            },
        );
        other.kill().unwrap();
        other.wait().unwrap();
        own.unwrap();
        assert!(matches!(others, Err(MonitorError::OtherProcess { .. })), "{others:?}");
    }

    #[test]
    fn a_guest_that_runs_or_was_given_up_is_left_alone() {
        assert!(commands(b"").is_empty());
        assert!(commands(b"n\n").is_empty());
        assert!(commands(b"r\nn\n").is_empty());
        assert!(commands(b"s{\"capabilities\":[],\"parameters\":{}}\nsnull\n").is_empty());
    }

    #[test]
    fn settings_are_set_back_after_the_guest_was_resumed() {
        let told = br#"s{"capabilities":[{"capability":"events","state":false}],"parameters":{"max-bandwidth":7}}"#;
        let settings = ["migrate-set-capabilities", "migrate-set-parameters"];
        let all = ["qmp_capabilities", "migrate_cancel", "cont", "announce-self"];
        assert_eq!(commands(&[told, &b"\nr\n"[..]].concat()), [&all[..], &settings].concat());
        assert_eq!(commands(&[told, &b"\n"[..]].concat()), [&all[..1], &settings].concat());
    }

    #[test]
    fn a_guard_that_replaces_a_killed_one_is_told_all() {
        let folder = tempfile::tempdir().unwrap();
        let told = folder.path().join("told");
        let script = format!("exec cat >> {}", told.display());
        let mut guard = Guard::new(["sh", "-c", &script].map(OsString::from).to_vec());
        let settings = json!({ "capabilities": [], "parameters": { "max-bandwidth": 7 } });
        let line = format!("{SETTINGS}{settings}\n");
        guard.set(Duty::Nothing).unwrap();
        guard.remember(Settings::from_json(settings).as_ref()).unwrap();
        let kill = |guard: &mut Guard| {
            let (child, _) = guard.running.as_mut().unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            // What it had read before, or not.
            let _ = std::fs::remove_file(&told);
        };
        kill(&mut guard);
        guard.set(Duty::Resume).unwrap();
        let first = format!("{line}r\n");
        drop_and_read(guard, &told, &first);

        let mut guard = Guard::new(["sh", "-c", &script].map(OsString::from).to_vec());
        guard.set(Duty::Resume).unwrap();
        kill(&mut guard);
        guard.remember(None).unwrap();
        drop_and_read(guard, &told, "snull\nr\n");
    }

    /// Ends the attachment, and compares what its guard was told before.
    fn drop_and_read(guard: Guard, told: &Path, expected: &str) {
        drop(guard);
        let all = std::fs::read_to_string(told).unwrap();
        assert_eq!(all, format!("{expected}n\n"));
    }

    #[test]
    fn a_refused_cancel_does_not_keep_the_guest_paused() {
        let refused = r#"{"error": {"desc": "none"}, "id": ID}"#;
        let answer = |command: &Value| {
            let is_cancel = command["execute"] == json!("migrate_cancel");
            Some(if is_cancel { format!("{refused}\n") } else { DONE.to_owned() })
        };
        let (outcome, commands) =
            at_monitor(answer, |path| run(&b"r\n"[..], path, std::process::id()));
        outcome.unwrap();
        assert_eq!(commands[2]["execute"], json!("cont"));
    }
}
