// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Starts a QEMU whose guest memory is in files of ours.

use super::command_line::{self, MemoryFile, Purpose, Settings};
use super::monitor::{Monitor, MonitorError};
use crate::process::target::{ProcessError, TargetProcess};
use pageferry_protocol::control::unix_path::is_listened_on;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// How long QEMU may take until its monitor answers. It allocates memory before, if it is asked to.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// Interval at which the monitor is tried.
const TRY: Duration = Duration::from_millis(5);
/// Longest path of a UNIX socket.
const MAX_SOCKET_PATH: usize = 107;

/// Why QEMU cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The command line.
    #[error("QEMU's command line")]
    CommandLine(#[from] command_line::Error),
    /// A memory file cannot be made.
    #[error("cannot make the memory of {name}, {size} bytes{}",
            huge_page_size.map_or_else(String::new, |size| format!(" in pages of {size} bytes")))]
    MemoryFile {
        /// Its name.
        name: String,
        /// Its size in bytes.
        size: u64,
        /// Size of its huge pages.
        huge_page_size: Option<u64>,
        /// What the kernel said.
        #[source]
        source: rustix::io::Errno,
    },
    /// The program cannot be started.
    #[error("cannot start {}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The kernel has no huge pages of this size.
    #[error(
        "{} is no size of huge pages on this machine; it has {}", size_text(*size),
        if sizes.is_empty() { "none".to_owned() } else { sizes.join(", ") }
    )]
    NoSuchHugePages {
        /// The size.
        size: u64,
        /// The sizes that there are.
        sizes: Vec<String>,
    },
    /// There are not enough huge pages.
    #[error(
        "guest memory needs {needed} huge pages of {}, and {free} are free: reserve them in \
         {FOLDER}/hugepages-{}kB/nr_hugepages, as root", size_text(*size), *size >> 10
    )]
    TooFewHugePages {
        /// Their size.
        size: u64,
        /// How many are needed.
        needed: u64,
        /// How many can be had.
        free: u64,
    },
    /// QEMU exited before its monitor answered. It has said why on standard error.
    #[error("QEMU has ended before its monitor answered: {status}; see the lines before")]
    Ended {
        /// How.
        status: ExitStatus,
    },
    /// The path of the monitor is too long.
    #[error(
        "the monitor's path {} has more than {MAX_SOCKET_PATH} bytes: choose a shorter --socket", path.display()
    )]
    LongPath {
        /// The path.
        path: PathBuf,
    },
    /// Somebody listens where the monitor is to be. QEMU would take the path from it.
    #[error("the monitor's path {} is in use: another process listens there", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The process.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// A QEMU that was started.
#[derive(Debug)]
pub struct Launched {
    /// Its monitor, for us alone.
    pub monitor: Monitor,
    /// Its process.
    pub process: TargetProcess,
    /// The same, to be waited for.
    pub child: Child,
}

/// How QEMU is started.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The program and its arguments, as the user gave them.
    pub arguments: Vec<OsString>,
    /// Where QEMU listens for us.
    pub monitor: PathBuf,
    /// Size of the huge pages of guest memory.
    pub huge_page_size: Option<u64>,
    /// For a guest of its own, or for one that comes from elsewhere.
    pub purpose: Purpose,
}

impl Launch {
    /// Starts QEMU. Its standard streams are those of this process.
    ///
    /// # Errors
    /// If the command line cannot be served, or QEMU does not start.
    pub fn start(&self) -> Result<Launched, LaunchError> {
        if self.monitor.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(LaunchError::LongPath { path: self.monitor.clone() });
        }
        // QEMU removes whatever is at this path, also the monitor of a QEMU that runs.
        if matches!(is_listened_on(&self.monitor), Ok(true)) {
            return Err(LaunchError::InUse { path: self.monitor.clone() });
        }
        // Before the size of the memory is found to be no multiple of it.
        self.huge_page_size.map(|size| huge_page_pool(size, Path::new(FOLDER))).transpose()?;
        let settings = Settings {
            purpose: self.purpose,
            monitor: &self.monitor,
            huge_page_size: self.huge_page_size,
            default_huge_page_size: default_huge_page_size(),
        };
        let plan = command_line::plan(&self.arguments, &settings, &huge_page_size_of)?;
        // QEMU would end by a signal, or with a sentence that says less.
        check_huge_pages(plan.files(), Path::new(FOLDER))?;
        let files: Vec<OwnedFd> = plan.files().iter().map(make_file).collect::<Result<_, _>>()?;
        let arguments = plan.arguments(|index| files[index].as_raw_fd());
        let mut child = spawn(&arguments, &files)?;
        match self.connect(&mut child) {
            Ok((monitor, process)) => Ok(Launched { monitor, process, child }),
            Err(error) => {
                // Fails if it has ended.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    fn connect(&self, child: &mut Child) -> Result<(Monitor, TargetProcess), LaunchError> {
        let process = TargetProcess::open(child.id())?;
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Some(status) = child.try_wait().ok().flatten() {
                return Err(LaunchError::Ended { status });
            }
            match Monitor::connect(&self.monitor) {
                Ok(monitor) => return Ok((monitor, process)),
                Err(MonitorError::Connect { .. } | MonitorError::Broken { .. })
                    if Instant::now() < deadline =>
                {
                    std::thread::sleep(TRY);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Starts QEMU with these descriptors, at their own numbers.
fn spawn(arguments: &[OsString], files: &[OwnedFd]) -> Result<Child, LaunchError> {
    let mut words = arguments.iter();
    let program = words.next().cloned().unwrap_or_default();
    let failed = |source| LaunchError::Spawn { program: PathBuf::from(program.clone()), source };
    let inherit = |flags: FdFlags| {
        files.iter().try_for_each(|file| fcntl_setfd(file, flags)).map_err(std::io::Error::from)
    };
    // No other thread starts a process now, which would inherit them, too.
    let spawned =
        inherit(FdFlags::empty()).and_then(|()| Command::new(&program).args(words).spawn());
    inherit(FdFlags::CLOEXEC).map_err(failed)?;
    spawned.map_err(failed)
}

fn make_file(file: &MemoryFile) -> Result<OwnedFd, LaunchError> {
    let MemoryFile { name, size, huge_page_size } = file;
    let failed = |source| LaunchError::MemoryFile {
        name: name.clone(),
        size: *size,
        huge_page_size: *huge_page_size,
        source,
    };
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if let Some(size) = huge_page_size {
        /// `MFD_HUGE_SHIFT` of `linux/memfd.h`: above it is the logarithm of the page size.
        const HUGE_SHIFT: u32 = 26;
        flags |= MemfdFlags::HUGETLB;
        flags |= MemfdFlags::from_bits_retain(size.trailing_zeros() << HUGE_SHIFT);
    }
    let made = memfd_create(format!("pageferry-{name}").as_str(), flags).map_err(failed)?;
    ftruncate(&made, *size).map_err(failed)?;
    fcntl_add_seals(&made, SealFlags::SHRINK).map_err(failed)?;
    Ok(made)
}

/// Where the kernel tells of its huge pages.
const FOLDER: &str = "/sys/kernel/mm/hugepages";

/// Refuses huge pages for the memory of `-m` that the kernel does not have. `folder` is [`FOLDER`].
///
/// Memory objects of the user are left to QEMU: with `reserve=off` they may be larger than the
/// pool, as those of virtio-mem are.
fn check_huge_pages(files: &[MemoryFile], folder: &Path) -> Result<(), LaunchError> {
    for file in files.iter().filter(|file| file.name == command_line::RAM) {
        let Some(size) = file.huge_page_size else { continue };
        let needed = file.size / size;
        let pool = huge_page_pool(size, folder)?;
        let count = |file: &str| -> Option<u64> {
            std::fs::read_to_string(pool.join(file)).ok()?.trim().parse().ok()
        };
        let (Some(free), Some(reserved)) = (count("free_hugepages"), count("resv_hugepages"))
        else {
            // The kernel does not tell: QEMU finds out.
            continue;
        };
        let more = count("nr_overcommit_hugepages").unwrap_or(0);
        let more = more.saturating_sub(count("surplus_hugepages").unwrap_or(0));
        let free = free.saturating_sub(reserved) + more;
        if free < needed {
            return Err(LaunchError::TooFewHugePages { size, needed, free });
        }
    }
    Ok(())
}

/// What the kernel tells of its huge pages of this size.
fn huge_page_pool(size: u64, folder: &Path) -> Result<PathBuf, LaunchError> {
    let pool = folder.join(format!("hugepages-{}kB", size >> 10));
    if size.is_multiple_of(1 << 10) && pool.is_dir() {
        return Ok(pool);
    }
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut sizes: Vec<u64> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let kib = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
            Some(kib.parse::<u64>().ok()? << 10)
        })
        .collect();
    sizes.sort_unstable();
    let sizes = sizes.into_iter().map(size_text).collect();
    Err(LaunchError::NoSuchHugePages { size, sizes })
}

/// A size as options have it, such as 2M.
fn size_text(size: u64) -> String {
    let units = [(30, "G"), (20, "M"), (10, "K")];
    let unit = units.into_iter().find(|(shift, _)| size > 0 && size.is_multiple_of(1 << shift));
    unit.map_or_else(|| size.to_string(), |(shift, unit)| format!("{}{unit}", size >> shift))
}

/// Size of the pages of a file system with huge pages.
fn huge_page_size_of(path: &Path) -> Option<u64> {
    let statfs = rustix::fs::statfs(path).ok()?;
    // The types of the fields differ between architectures.
    #[allow(clippy::unnecessary_cast)]
    let (kind, size) = (statfs.f_type as u64, statfs.f_bsize as u64);
    (kind == HUGETLBFS_MAGIC).then_some(size)
}

/// `HUGETLBFS_MAGIC` of `linux/magic.h`.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Size of the huge pages that the kernel uses if nobody says which.
fn default_huge_page_size() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(2 << 20, |kib| kib << 10)
}

/// Where the QEMU of an agent listens for us, beside the agent's socket.
pub fn monitor_beside(agent_socket: &Path) -> PathBuf {
    let mut path = agent_socket.as_os_str().to_owned();
    path.push(".qmp");
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_that_are_missing_are_named_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let pool = folder.path().join("hugepages-2048kB");
        std::fs::create_dir(&pool).unwrap();
        std::fs::create_dir(folder.path().join("hugepages-1048576kB")).unwrap();
        let set = |file: &str, count: u64| {
            std::fs::write(pool.join(file), format!("{count}\n")).unwrap();
        };
        set("free_hugepages", 5);
        set("resv_hugepages", 2);
        let check = |size, huge_page_size| {
            let name = command_line::RAM.to_owned();
            let files = [MemoryFile { name, size, huge_page_size }];
            check_huge_pages(&files, folder.path()).map_err(|error| error.to_string())
        };
        assert_eq!(check(1 << 30, None), Ok(()));
        assert_eq!(check(6 << 20, Some(2 << 20)), Ok(()));
        let said = check(8 << 20, Some(2 << 20)).unwrap_err();
        assert!(said.contains("needs 4 huge pages of 2M, and 3 are free"), "{said}");
        assert!(said.contains("hugepages-2048kB/nr_hugepages"), "{said}");
        set("nr_overcommit_hugepages", 1);
        assert_eq!(check(8 << 20, Some(2 << 20)), Ok(()));
        let said = check(6 << 20, Some(3 << 20)).unwrap_err();
        assert_eq!(said, "3M is no size of huge pages on this machine; it has 2M, 1G");
    }
}
