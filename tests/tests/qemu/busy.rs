// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest whose memory, disk and network are in use all the time, and what must hold for it.

use pageferry_tests::linux_guest::{AttachedGuest, Console, Echo, LinuxGuest, Place, Status};
use pageferry_tests::linux_guest::{QemuTools, QemuVersion};
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::{NamedTempFile, TempDir};

pub const MIB: u64 = 1 << 20;

/// What a test needs beside its guests.
pub struct Stage {
    pub folder: TempDir,
    tools: QemuTools,
    version: QemuVersion,
    disk: NamedTempFile,
    echo: Echo,
}

/// A busy guest at one moment.
pub struct Moment {
    status: Status,
    at: Instant,
    has_disk: bool,
}

impl Stage {
    pub fn new(tools: QemuTools, version: QemuVersion) -> Self {
        let disk = NamedTempFile::new().unwrap();
        disk.as_file().set_len(8 * MIB).unwrap();
        let (folder, echo) = (tempfile::tempdir().unwrap(), Echo::start().unwrap());
        Self { folder, tools, version, disk, echo }
    }

    pub fn place(&self) -> Place<'_> {
        Place { folder: self.folder.path(), tools: &self.tools, version: self.version }
    }

    /// A file in the folder of the test.
    pub fn file(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn disk(&self) -> &Path {
        self.disk.path()
    }

    /// A guest with all devices.
    pub fn guest(&self, memory_size: u64) -> LinuxGuest {
        LinuxGuest { disk: Some(self.disk().to_owned()), ..LinuxGuest::new(memory_size) }
    }

    /// Puts memory, network and the disk, if there is one, to work. Returns when all have begun.
    pub fn start(&self, guest: &LinuxGuest, console: &mut Console) -> Moment {
        let status = console.status().unwrap();
        let before = Moment { at: Instant::now(), status, has_disk: guest.disk.is_some() };
        for task in ["check 48M", "churn 32M 100", "write 2000 16M", "tick"] {
            console.command(task).unwrap();
        }
        if before.has_disk {
            console.command("disk").unwrap();
        }
        console.command(&format!("net {}", self.echo.port())).unwrap();
        goes_on(console, &before)
    }
}

/// Waits until each task that was at work `before` has done more. The guest's clock must not have
/// run faster than the host's.
pub fn goes_on(console: &mut Console, before: &Moment) -> Moment {
    let was = &before.status;
    let status = console
        .wait_for_status("all tasks at work", |now| {
            now.check >= was.check + 2
                && now.churn >= was.churn + 2
                && now.written >= was.written + 200
                && (now.disk > was.disk || !before.has_disk)
                && now.net_echoed >= was.net_echoed + 2
        })
        .unwrap();
    let (at, passed) = (Instant::now(), status.monotonic.checked_sub(was.monotonic));
    let limit = at.duration_since(before.at) + Duration::from_secs(1);
    assert!(passed.is_some_and(|passed| passed < limit), "{limit:?}: {was:?}, then {status:?}");
    Moment { status, at, has_disk: before.has_disk }
}

/// The same for a guest that is here since a moment ago. All that its tasks have read must have
/// been right, and its kernel must have nothing to complain of.
pub fn goes_on_well(guest: &mut AttachedGuest, before: &Moment) -> Moment {
    let now = goes_on(&mut guest.console, before);
    guest.verify().unwrap();
    now
}
