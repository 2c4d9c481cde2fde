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

/// The guest at one moment.
pub struct Moment {
    status: Status,
    at: Instant,
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

    /// Puts memory, disk and network to work. Returns when all of them have begun.
    pub fn start(&self, console: &mut Console) -> Moment {
        let before = Moment::now(console);
        for task in ["check 48M", "churn 32M 100", "write 2000 16M", "disk", "tick"] {
            console.command(task).unwrap();
        }
        console.command(&format!("net {}", self.echo.port())).unwrap();
        goes_on(console, &before)
    }
}

impl Moment {
    pub fn now(console: &mut Console) -> Self {
        Self { at: Instant::now(), status: console.status().unwrap() }
    }
}

/// Waits until each task that was at work `before` has done more. The guest's clock must not have
/// run faster than the host's.
pub fn goes_on(console: &mut Console, before: &Moment) -> Moment {
    let was = &before.status;
    let more = |old: u64, new: u64, least: u64| new >= old + least || (old == 0 && was.check > 0);
    let status = console
        .wait_for_status("all tasks at work", |now| {
            more(was.check, now.check, 2)
                && more(was.churn, now.churn, 2)
                && more(was.written, now.written, 200)
                && more(was.disk, now.disk, 1)
                && more(was.net_echoed, now.net_echoed, 2)
        })
        .unwrap();
    let (at, passed) = (Instant::now(), status.monotonic.checked_sub(was.monotonic));
    let limit = at.duration_since(before.at) + Duration::from_secs(1);
    assert!(passed.is_some_and(|passed| passed < limit), "{limit:?}: {was:?}, then {status:?}");
    Moment { status, at }
}

/// The same for a guest that is here since a moment ago. All that its tasks have read must have
/// been right, and its kernel must have nothing to complain of.
pub fn goes_on_well(guest: &mut AttachedGuest, before: &Moment) -> Moment {
    let now = goes_on(&mut guest.console, before);
    guest.verify().unwrap();
    now
}
