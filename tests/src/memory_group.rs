// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A control group that limits the memory of the processes in it.

use crate::Error;
use crate::deadline::wait_until;
use crate::vmm::PATIENCE;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A control group of this test. It is removed on drop, when its processes have ended.
#[derive(Debug)]
pub struct MemoryGroup {
    folder: PathBuf,
    names: &'static Names,
}

/// What the versions of control groups call their files.
#[derive(Debug)]
struct Names {
    limit: &'static str,
    peak: &'static str,
    /// A file with a line "oom_kill NUMBER".
    kills: &'static str,
}

const VERSIONS: [Names; 2] = [
    Names { limit: "memory.max", peak: "memory.peak", kills: "memory.events" },
    Names {
        limit: "memory.limit_in_bytes",
        peak: "memory.max_usage_in_bytes",
        kills: "memory.oom_control",
    },
];

/// Where systems mount them.
const MOUNTS: [&str; 3] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/memory"];

impl MemoryGroup {
    /// A group whose processes may use so many bytes.
    ///
    /// # Errors
    /// If this process may not make one, or the kernel has none that limit memory.
    pub fn new(limit: u64) -> Result<Self, Error> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("pageferry-test-{}-{number}", std::process::id());
        let mut refused = Error::Argument("no control groups are mounted".into());
        for mount in
            MOUNTS.iter().map(Path::new).filter(|mount| mount.join("cgroup.procs").exists())
        {
            let folder = mount.join(&name);
            if let Err(error) = fs::create_dir(&folder) {
                refused = Error::io(format!("make {}", folder.display()))(error);
                continue;
            }
            let names = VERSIONS.iter().find(|names| folder.join(names.limit).exists());
            let Some(names) = names else {
                let _ = fs::remove_dir(&folder);
                refused = Error::Argument(format!("{} does not limit memory", mount.display()));
                continue;
            };
            let group = Self { folder, names };
            group.write(names.limit, limit)?;
            return Ok(group);
        }
        Err(refused)
    }

    fn write(&self, name: &str, value: u64) -> Result<(), Error> {
        let path = self.folder.join(name);
        fs::write(&path, value.to_string())
            .map_err(Error::io(format!("write {value} to {}", path.display())))
    }

    fn read(&self, name: &str) -> Result<String, Error> {
        let path = self.folder.join(name);
        fs::read_to_string(&path).map_err(Error::io(format!("read {}", path.display())))
    }

    /// Moves a process into the group. What it allocates from now on counts.
    ///
    /// # Errors
    /// If it is gone.
    pub fn add(&self, process: u32) -> Result<(), Error> {
        self.write("cgroup.procs", process.into())
    }

    /// The most memory that its processes have used at once, in bytes.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn peak(&self) -> Result<u64, Error> {
        let text = self.read(self.names.peak)?;
        text.trim().parse().map_err(|error| Error::Argument(format!("{}: {error}", text.trim())))
    }

    /// How many of its processes the kernel has killed because of the limit.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn kills(&self) -> Result<u64, Error> {
        let text = self.read(self.names.kills)?;
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills
            .and_then(|count| count.trim().parse().ok())
            .ok_or_else(|| Error::Argument(format!("no number of kills in {}", text.trim())))
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let removed = wait_until("a control group without processes", PATIENCE, || {
            fs::remove_dir(&self.folder).is_ok()
        });
        if let Err(error) = removed {
            log::warn!("{} stays: {}", self.folder.display(), error.sentence());
        }
    }
}
