// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A QEMU that has a guest, or waits for one.

use super::MIB;
use pageferry_tests::linux_guest::{RunningGuest, Sockets};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// The QEMU. Its memory is a memfd.
pub struct Host {
    /// The process that was started: QEMU, or `pageferry qemu`, whose child it is.
    pub running: RunningGuest,
    /// The guest's memory. It stays open, so that it can be looked at when QEMU has ended.
    memory: File,
    /// The socket of its agent.
    pub agent: Option<PathBuf>,
    /// Where QEMU waits for a guest.
    pub address: String,
    _folder: TempDir,
}

impl Host {
    /// Starts a QEMU alone. `line` gets the value of `-object` for its memory.
    pub fn alone(memory_size: u64, line: impl FnOnce(String, &Sockets) -> Vec<OsString>) -> Self {
        let memory = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memory, memory_size).unwrap();
        let backend = format!(
            "memory-backend-file,id=ram0,size={}M,share=on,mem-path=/proc/{}/fd/{}",
            memory_size / MIB,
            std::process::id(),
            memory.as_raw_fd()
        );
        let (folder, sockets) = files();
        let line = line(backend, &sockets);
        let running = RunningGuest::start(&line, sockets).unwrap();
        Self {
            running,
            memory: memory.into(),
            agent: None,
            address: String::new(),
            _folder: folder,
        }
    }

    /// Starts `pageferry qemu` with an agent. `line` gets the agent's socket.
    pub fn with_agent(line: impl FnOnce(&Path, &Sockets) -> Vec<OsString>) -> Self {
        let (folder, sockets) = files();
        let agent = folder.path().join("agent");
        let line = line(&agent, &sockets);
        let mut running = RunningGuest::start(&line, sockets).unwrap();
        let said = running.process.wait_for_line("agent at", PATIENCE).unwrap();
        let id = said.split(' ').skip_while(|word| *word != "QEMU").nth(1).unwrap();
        let memory = memory_of(id);
        Self { running, memory, agent: Some(agent), address: String::new(), _folder: folder }
    }

    /// Bytes of the guest's memory that are allocated.
    pub fn allocated(&self) -> u64 {
        self.memory.metadata().unwrap().blocks() * 512
    }

    /// Executes a QMP command without arguments.
    pub fn execute(&mut self, command: &str) -> Value {
        self.running.qmp.execute(command, json!({})).unwrap()
    }

    /// The time of an event that QEMU has sent or will send, on the host's clock. Earlier ones of
    /// this name do not count.
    pub fn event_since(&mut self, name: &str, since: SystemTime) -> SystemTime {
        loop {
            let event = self.running.qmp.wait_for_event(name).unwrap();
            let number = |field: &str| event["timestamp"][field].as_u64().unwrap();
            let at = Duration::from_secs(number("seconds"))
                + Duration::from_micros(number("microseconds"));
            let at = SystemTime::UNIX_EPOCH + at;
            if at >= since {
                return at;
            }
        }
    }

    /// Ends it, after its guest has left.
    pub fn end(mut self) {
        if self.agent.is_some() {
            // It ends by itself.
            let status = self.running.process.wait(PATIENCE).unwrap();
            assert!(status.success(), "{status}: {:?}", self.running.process.lines());
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A killed `pageferry qemu` would leave QEMU behind.
        if self.agent.is_some() && self.running.process.terminate().is_ok() {
            let _ = self.running.process.wait(PATIENCE);
        }
    }
}

fn files() -> (TempDir, Sockets) {
    let folder = tempfile::tempdir().unwrap();
    let sockets = Sockets::new(folder.path(), "qemu");
    sockets.create().unwrap();
    (folder, sockets)
}

/// The memory of a QEMU that `pageferry qemu` has started.
pub fn memory_of(process: &str) -> File {
    let folder = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let paths = folder.map(|entry| entry.unwrap().path());
    let is_ram = |path: &PathBuf| {
        let target = std::fs::read_link(path).unwrap_or_default();
        target.to_string_lossy().starts_with("/memfd:pageferry-")
    };
    let path = paths.into_iter().find(is_ram).unwrap();
    File::open(path).unwrap()
}
