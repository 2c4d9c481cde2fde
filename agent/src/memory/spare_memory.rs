// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How much memory the kernel can still give to this process without swapping.
//!
//! The host has one limit, and each control group above the process another. The page cache of
//! files on disks counts as free, because the kernel takes it back. A file that cannot be read, or
//! that the kernel does not have, limits nothing.
//!
//! The files stay open: the threads that read them again and again may open none.

use crate::opener;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// More than any of these files has. The rest of a longer one is not read.
const LONGEST: usize = 64 << 10;

/// The limits of this process's memory.
#[derive(Debug, Clone)]
pub struct SpareMemory {
    /// `/proc/meminfo`.
    host: Option<Arc<OwnedFd>>,
    /// The control groups.
    groups: Vec<Arc<Group>>,
}

/// A control group.
#[derive(Debug)]
struct Group {
    folder: PathBuf,
    /// Its files, by their names.
    files: BTreeMap<&'static str, OwnedFd>,
}

/// The file with the figures of a control group.
const FIGURES: &str = "memory.stat";

/// The names that a version of control groups gives its files and figures.
struct Names {
    limits: &'static [&'static str],
    usage: &'static str,
    cached: [&'static str; 2],
}

/// See `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst` of Linux.
const VERSIONS: [Names; 2] = [
    Names {
        limits: &["memory.max", "memory.high"],
        usage: "memory.current",
        cached: ["inactive_file", "active_file"],
    },
    Names {
        limits: &["memory.limit_in_bytes"],
        usage: "memory.usage_in_bytes",
        cached: ["total_inactive_file", "total_active_file"],
    },
];

impl SpareMemory {
    /// The limits of this process. A process that is moved to another control group later keeps
    /// them.
    pub fn of_this_process() -> Self {
        let read = |path: &str| open(Path::new(path)).and_then(|file| read(&file));
        let read = |path| read(path).unwrap_or_default();
        // Not `self`: that may be the opener, which is in another group if this process was moved.
        let process = format!("/proc/{}", std::process::id());
        let [cgroup, mounts] = ["cgroup", "mountinfo"].map(|name| format!("{process}/{name}"));
        let groups = groups(&read(&cgroup), &read(&mounts));
        let host = open(Path::new("/proc/meminfo")).map(Arc::new);
        Self { host, groups: groups.into_iter().map(|folder| Group::of(folder).into()).collect() }
    }

    /// No limits.
    #[cfg(test)]
    pub fn unlimited() -> Self {
        Self { host: None, groups: Vec::new() }
    }

    /// The limits of the control group with this folder.
    #[cfg(test)]
    pub fn of_group(folder: &Path) -> Self {
        Self { host: None, groups: vec![Group::of(folder.to_owned()).into()] }
    }

    /// Says what has less than `least` bytes left. `None` if nothing has.
    pub fn shortage(&self, least: u64) -> Option<String> {
        let host = self.host.as_ref().and_then(|file| available(&read(file)?));
        if let Some(left) = host.filter(|left| *left < least) {
            return Some(format!("the host has {} MiB left", left >> 20));
        }
        self.groups.iter().find_map(|group| {
            let left = group.left().filter(|left| *left < least)?;
            let folder = group.folder.display();
            Some(format!("the control group {folder} has {} MiB left", left >> 20))
        })
    }
}

/// `MemAvailable` of `/proc/meminfo` in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
}

impl Group {
    fn of(folder: PathBuf) -> Self {
        let names = VERSIONS.iter().flat_map(|names| names.limits.iter().chain([&names.usage]));
        let names = names.chain([&FIGURES]);
        let files = names.filter_map(|name| Some((*name, open(&folder.join(name))?))).collect();
        Self { folder, files }
    }

    /// The bytes that it has left; `None` if it has no limit.
    fn left(&self) -> Option<u64> {
        let read = |name: &str| read(self.files.get(name)?);
        // "max" is no number, and limits nothing.
        let number = |name: &&str| read(name)?.trim().parse::<u64>().ok();
        VERSIONS.iter().find_map(|names| {
            let limit = names.limits.iter().filter_map(number).min()?;
            let used = number(&names.usage)?;
            let figures = read(FIGURES).unwrap_or_default();
            let cached = figures.lines().filter_map(|line| {
                let (name, bytes) = line.split_once(' ')?;
                names.cached.contains(&name).then(|| bytes.parse::<u64>().ok())?
            });
            Some(limit.saturating_sub(used.saturating_sub(cached.sum())))
        })
    }
}

fn open(path: &Path) -> Option<OwnedFd> {
    opener::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// What a file says now.
fn read(file: &OwnedFd) -> Option<String> {
    let (mut text, mut piece) = (Vec::new(), [0; 4096]);
    while text.len() < LONGEST {
        match rustix::io::pread(file, &mut piece, text.len() as u64) {
            Ok(0) => break,
            Ok(count) => text.extend_from_slice(&piece[..count]),
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
    String::from_utf8(text).ok()
}

/// The folders of the control groups of a process that may limit its memory, from the texts of
/// `/proc/PID/cgroup` and `/proc/PID/mountinfo` (see proc_pid_cgroup(5) and proc_pid_mountinfo(5)).
fn groups(memberships: &str, mounts: &str) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for membership in memberships.lines() {
        let mut fields = membership.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let is_memory = |list: &str| list.split(',').any(|name| name == "memory");
        let kind = match controllers {
            "" => "cgroup2",
            list if is_memory(list) => "cgroup",
            _ => continue,
        };
        let mounted = mounts.lines().find_map(|mount| {
            let (place, system) = mount.split_once(" - ")?;
            let mut system = system.split(' ');
            let is_it = system.next() == Some(kind)
                && (kind == "cgroup2" || system.next_back().is_some_and(is_memory));
            let mut place = place.split(' ').skip(3).map(PathBuf::from);
            let found = (place.next()?, place.next()?);
            is_it.then_some(found)
        });
        let Some((root, mount)) = mounted else { continue };
        // What is above the root of the mount cannot be seen from here.
        let Ok(below) = Path::new(path).strip_prefix(root) else { continue };
        let folder = mount.join(below);
        let above = folder.ancestors().take_while(|folder| folder.starts_with(&mount));
        folders.extend(above.map(Path::to_owned));
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_versions_are_found_up_to_their_mount() {
        let mounts = "\
            30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs rw\n\
            31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n\
            35 30 0:32 /vms /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory\n\
            36 30 0:33 / /sys/fs/cgroup/cpu rw shared:10 - cgroup cgroup rw,cpu,cpuacct\n";
        let found = |memberships| -> Vec<String> {
            groups(memberships, mounts).iter().map(|path| path.display().to_string()).collect()
        };
        assert_eq!(
            found("4:memory:/vms/a\n2:cpu,cpuacct:/\n0::/machine/b\n"),
            [
                "/sys/fs/cgroup/memory/a",
                "/sys/fs/cgroup/memory",
                "/sys/fs/cgroup/unified/machine/b",
                "/sys/fs/cgroup/unified/machine",
                "/sys/fs/cgroup/unified",
            ]
        );
        // Outside of what is mounted here, or nothing at all.
        assert!(found("4:memory:/other").is_empty());
        assert!(found("").is_empty() && groups("0::/", "").is_empty());
    }

    #[test]
    fn a_group_has_its_limit_less_what_it_uses_but_for_the_page_cache() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let left = || Group::of(folder.path().to_owned()).left();
        assert_eq!(left(), None);
        file("memory.limit_in_bytes", "9000\n");
        file("memory.usage_in_bytes", "6000\n");
        file("memory.stat", "active_file 5\ntotal_active_file 200\ntotal_inactive_file 300\n");
        assert_eq!(left(), Some(3500));
        // The second version goes first, if it has a limit.
        file("memory.max", "max\n");
        assert_eq!(left(), Some(3500));
        file("memory.high", "7000\n");
        file("memory.current", "8000\n");
        assert_eq!(left(), Some(0));
        let limits = SpareMemory::of_group(folder.path());
        assert!(limits.shortage(1).unwrap().ends_with("has 0 MiB left"));
        assert_eq!(limits.shortage(0), None);
    }

    #[test]
    fn the_host_has_what_it_says_is_available() {
        let text = "MemTotal:       24620952 kB\nMemAvailable:   20480 kB\n";
        assert_eq!(available(text), Some(20 << 20));
        assert_eq!(available("MemTotal: 5 kB\n"), None);
        assert_eq!(SpareMemory::of_this_process().shortage(0), None);
        let short = SpareMemory::of_this_process().shortage(u64::MAX).unwrap();
        assert!(short.starts_with("the host has "), "{short}");
    }
}
