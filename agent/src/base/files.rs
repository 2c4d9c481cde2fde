// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The folder of the bases: `PAGEFERRY_BASES`, or a folder of the user in `/dev/shm`.
//!
//! Whoever has a base open has it locked (`flock`, shared). A VMM has it locked as long as it has
//! it mapped, since the lock is that of the open file. Nobody can remove a base that is in use, and
//! whoever opens one, or whose agent ends, removes all that nobody uses. A file that was removed
//! between its opening and its lock is opened anew.
//!
//! The folder belongs to this user, nobody else can change it, and it is on tmpfs. Only files with
//! the name of a base are removed.

use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_protocol::memory::file::is_tmpfs;
use rustix::fs::{
    AtFlags, CWD, Dir, FallocateFlags, FileType, FlockOperation, Mode, OFlags, Stat, fallocate,
    flock, fstat, ftruncate, mkdirat, openat, statat, unlinkat,
};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Where bases are, if `PAGEFERRY_BASES` does not say.
const SHARED_MEMORY: &str = "/dev/shm";
/// The variable.
const VARIABLE: &str = "PAGEFERRY_BASES";
/// Characters of the name of a base.
const NAME: usize = 64;
/// How long another process may have a base locked for itself. To remove it takes no time.
const PATIENCE: Duration = Duration::from_secs(2);
/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(1);

/// An open base.
#[derive(Debug)]
pub struct BaseFiles {
    /// For the agent, to be read and written.
    pub agents: OwnedFd,
    /// For the VMM, to be read.
    pub vmms: OwnedFd,
}

/// Opens the base `name` of `length` bytes, which is made if there is none. Its first `reserved`
/// bytes have room: an access to a mapping of them never finds the file system full. Removes the
/// bases that nobody uses.
///
/// # Errors
/// If there is no room, the folder is not as it must be, or the kernel refuses.
pub fn open(name: &str, length: u64, reserved: u64) -> io::Result<BaseFiles> {
    // The header, a bit for each page, and up to 512 bitmaps that begin at a page.
    let most = length / PAGE_SIZE / 8 + 514 * PAGE_SIZE;
    if !is_name(name.as_bytes()) || reserved > most.min(length) {
        return Err(Errno::INVAL.into());
    }
    let folder = Folder::find()?;
    let made = folder.open(true)?;
    remove_unused_in(&made);
    folder.named("", make(&made, name, length, reserved))
}

fn make(folder: &OwnedFd, name: &str, length: u64, reserved: u64) -> io::Result<BaseFiles> {
    loop {
        let flags = OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let agents = openat(folder, name, flags | OFlags::RDWR, Mode::RUSR | Mode::WUSR)?;
        lock(&agents)?;
        let stat = fstat(&agents)?;
        if stat.st_nlink == 0 {
            continue;
        }
        if stat.st_size == 0 {
            ftruncate(&agents, length)?;
        } else if u64::try_from(stat.st_size) != Ok(length) {
            let sentence = format!("base {name} has {} bytes, expected is {length}", stat.st_size);
            return Err(io::Error::other(sentence));
        }
        fallocate(&agents, FallocateFlags::empty(), 0, reserved).map_err(|errno| {
            io::Error::other(format!("no room for {reserved} bytes, the start of a base: {errno}"))
        })?;
        let vmms = reopen(agents.as_fd(), OFlags::RDONLY)?;
        lock(&vmms)?;
        return Ok(BaseFiles { agents, vmms });
    }
}

/// Opens a base that a VMM has open, to be read and written. It need not have a name any more.
///
/// # Errors
/// If it is no file of this user on tmpfs, or the kernel refuses.
pub fn open_again(vmms: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let stat = fstat(vmms)?;
    let is_file = FileType::from_raw_mode(stat.st_mode).is_file();
    if !is_file || !is_own(&stat) || !is_tmpfs(vmms)? {
        return Err(Errno::ACCESS.into());
    }
    let agents = reopen(vmms, OFlags::RDWR)?;
    lock(&agents)?;
    Ok(agents)
}

/// Removes the bases that nobody uses.
pub fn remove_unused() {
    // What is wrong with the folder is said to whoever opens a base.
    if let Ok(folder) = Folder::find().and_then(|folder| folder.open(false)) {
        remove_unused_in(&folder);
    }
}

fn remove_unused_in(folder: &OwnedFd) {
    let Ok(entries) = Dir::read_from(folder) else { return };
    for entry in entries.flatten().filter(|entry| is_name(entry.file_name().to_bytes())) {
        let name = entry.file_name();
        // Not to wait, whatever the file is.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let Ok(file) = openat(folder, name, flags, Mode::empty()) else { continue };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        // Only who has the lock removes the file, so the name stays its own once it is. Otherwise
        // the name is that of a new base.
        let Ok(stat) = fstat(&file) else { continue };
        let named = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW);
        let is_named = named.is_ok_and(|named| identity(&named) == identity(&stat));
        if is_named && FileType::from_raw_mode(stat.st_mode).is_file() {
            // Whoever opened it meanwhile waits for the lock, and sees that it has no name.
            let _ = unlinkat(folder, name, AtFlags::empty());
        }
    }
}

fn is_name(name: &[u8]) -> bool {
    name.len() == NAME && name.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn is_own(stat: &Stat) -> bool {
    stat.st_uid == rustix::process::geteuid().as_raw()
}

/// Opens the file of a descriptor once more.
fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok(openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty())?)
}

/// Locks a base, so that nobody removes it.
fn lock(base: &OwnedFd) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        match flock(base, FlockOperation::NonBlockingLockShared) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(LOOK),
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::other("another process has the base locked for itself"));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The folder of the bases.
struct Folder(PathBuf);

impl Folder {
    fn find() -> io::Result<Self> {
        let Some(named) = std::env::var_os(VARIABLE) else {
            let user = rustix::process::geteuid().as_raw();
            return Ok(Self(PathBuf::from(SHARED_MEMORY).join(format!("pageferry-{user}"))));
        };
        let folder = Self(named.into());
        match folder.0.is_absolute() {
            true => Ok(folder),
            false => folder.refused("write an absolute path"),
        }
    }

    /// Opens it, and checks that only this user can put files there.
    fn open(&self, make: bool) -> io::Result<OwnedFd> {
        if make {
            match mkdirat(CWD, &self.0, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return self.named("cannot make it: ", Err(errno.into())),
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = openat(CWD, &self.0, flags, Mode::empty()).map_err(io::Error::from);
        let folder = self.named("cannot open it: ", folder)?;
        let stat = self.named("", fstat(&folder).map_err(io::Error::from))?;
        let (owner, mode) = (stat.st_uid, stat.st_mode & 0o7777);
        if !is_own(&stat) {
            let user = rustix::process::geteuid().as_raw();
            return self.refused(&format!("it belongs to user {owner}, and not to {user}"));
        }
        if mode & 0o022 != 0 {
            return self.refused(&format!("others can change it (mode {mode:o})"));
        }
        if !self.named("", is_tmpfs(folder.as_fd()).map_err(io::Error::from))? {
            return self.refused("it is not on tmpfs");
        }
        Ok(folder)
    }

    fn named<T>(&self, what: &str, result: io::Result<T>) -> io::Result<T> {
        result.or_else(|error| self.refused(&format!("{what}{error}")))
    }

    fn refused<T>(&self, why: &str) -> io::Result<T> {
        let folder = self.0.display();
        Err(io::Error::other(format!("folder {folder} ({VARIABLE} names another one): {why}")))
    }
}
