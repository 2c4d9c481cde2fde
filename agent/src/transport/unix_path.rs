// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Listening UNIX sockets with a path: when an agent may bind a path, and when it removes it.
//!
//! The user writes the paths of the control socket and of stream listeners. A typo must not delete
//! a file, and two agents must not take a path from each other. So:
//!
//! - An agent replaces only a *stale* socket: one on which no process listens. A regular file, a
//!   symbolic link, a folder, or a socket with a listener is refused and left unchanged.
//! - When the listener is dropped, it removes the path, but only if the path is still its own
//!   socket: same device, same inode. The kernel does not use the inode again while the socket is
//!   open.
//! - An agent locks the folder (`flock`) while it checks, removes and binds a path, so these steps
//!   are one step for all agents. The lock leaves no file behind, and the kernel releases it when
//!   the process ends. If two agents start at the same instant, one listens, and the other gets the
//!   error that the path is in use. If an agent crashes between the steps, it leaves a stale
//!   socket, and the next start replaces it.
//!
//! Every process that may open the folder can hold the lock for ever. Then a start is refused after
//! `LOCK_TIMEOUT`. A dropped listener leaves its path behind after `END_TIMEOUT`, and the next
//! start replaces it.

use crate::opener;
use crate::waiting::may_wait;
use pageferry_protocol::control::unix_path::socket_address;
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Most connections that wait in the kernel to be accepted.
const BACKLOG: i32 = 128;
/// Longest wait for the lock on the folder when a listener is bound.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for the lock on the folder when a listener is dropped.
const END_TIMEOUT: Duration = Duration::from_millis(100);
/// Time between two attempts to lock the folder.
const LOCK_RETRY: Duration = Duration::from_millis(5);
/// Most attempts to bind a path. After each removal of a stale socket, a process that does not use
/// the lock may bind the path again.
const ATTEMPTS: u32 = 16;

/// The reason why an agent cannot listen on a path.
#[derive(Debug, thiserror::Error)]
pub enum UnixPathError {
    /// The path is not a valid socket address.
    #[error(transparent)]
    Path(#[from] pageferry_protocol::control::unix_path::SocketPathError),
    /// Another process listens on the path.
    #[error("{} is in use: another process listens there", .0.display())]
    InUse(PathBuf),
    /// The path exists and is not a socket.
    #[error("{} is a {found}, not a socket: it is left as it is", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
        /// The kind of file that it is.
        found: &'static str,
    },
    /// Another process holds the lock on the folder. Or this process may not lock the folder, and
    /// the path is a stale socket.
    #[error(
        "{} cannot be bound safely, because the folder {} cannot be locked: \
         remove the path if it exists and no process listens there, or use another folder",
        path.display(), folder.display()
    )]
    Locked {
        /// The path.
        path: PathBuf,
        /// Its folder.
        folder: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("cannot {what}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl From<UnixPathError> for io::Error {
    fn from(error: UnixPathError) -> Self {
        let kind = match &error {
            UnixPathError::Path(_) => io::ErrorKind::InvalidInput,
            UnixPathError::InUse(_) | UnixPathError::Locked { .. } => io::ErrorKind::AddrInUse,
            UnixPathError::NotASocket { .. } => io::ErrorKind::AlreadyExists,
            UnixPathError::Kernel { source, .. } => source.kind(),
        };
        Self::new(kind, error)
    }
}

/// A listening socket and its path. On drop, the path is removed if it is still this socket's.
#[derive(Debug)]
pub struct UnixPathListener {
    socket: OwnedFd,
    path: PathBuf,
    inode: Inode,
}

/// Identifies a file among all files that exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inode {
    /// The device of its file system.
    pub device: u64,
    /// Its number there.
    pub number: u64,
}

impl Inode {
    fn of(stat: &Stat) -> Self {
        Self { device: stat.st_dev, number: stat.st_ino }
    }
}

/// The mode of a socket to which only its user and root may connect.
pub const MODE_USER: Mode = Mode::from_raw_mode(0o600);
/// The mode of a socket to which the group of its file may connect, too.
pub const MODE_GROUP: Mode = Mode::from_raw_mode(0o660);

impl UnixPathListener {
    /// Listens on `path`, which gets mode 0600. A stale socket at `path` is replaced.
    ///
    /// # Errors
    /// If the path is in use or is not a socket, or the kernel refuses. Then the path is unchanged,
    /// except that a stale socket may be gone.
    pub fn bind(path: &Path) -> Result<Self, UnixPathError> {
        Self::bind_with_mode(path, MODE_USER)
    }

    /// Like [`UnixPathListener::bind`], with another mode of the path.
    ///
    /// # Errors
    /// As there.
    pub fn bind_with_mode(path: &Path, mode: Mode) -> Result<Self, UnixPathError> {
        may_wait("listen on a path");
        socket_address(path)?;
        let folder = folder_of(path);
        let lock = lock(folder, Instant::now() + LOCK_TIMEOUT);
        if let Err(errno @ Errno::WOULDBLOCK) = lock {
            return Err(UnixPathError::Locked {
                path: path.to_owned(),
                folder: folder.to_owned(),
                source: errno.into(),
            });
        }
        for _ in 0..ATTEMPTS {
            match opener::bind_unix(path, mode) {
                Ok(socket) => {
                    let made = rustix::fs::lstat(path)
                        .map_err(kernel("look at the socket that was just bound"))?;
                    let made = Self { socket, path: path.to_owned(), inode: Inode::of(&made) };
                    let listens =
                        rustix::net::listen(&made.socket, BACKLOG).map_err(kernel("listen"));
                    if let Err(error) = listens {
                        // The drop of `made` removes the path. It needs the lock for that.
                        drop(lock);
                        return Err(error);
                    }
                    return Ok(made);
                }
                Err(Errno::ADDRINUSE) => {}
                Err(errno) => return Err(kernel("bind a socket")(errno)),
            }
            check_may_replace(path)?;
            // Without the lock, another agent could bind the path between the check and the
            // removal.
            if let Err(errno) = lock {
                let (path, folder) = (path.to_owned(), folder.to_owned());
                return Err(UnixPathError::Locked { path, folder, source: errno.into() });
            }
            match opener::unlink(path) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => {
                    return Err(kernel("remove the stale socket")(errno));
                }
            }
        }
        Err(UnixPathError::InUse(path.to_owned()))
    }
}

impl UnixPathListener {
    /// A socket that listens on `path` already, whose file is `inode`.
    pub fn adopt(socket: OwnedFd, path: &Path, inode: Inode) -> Self {
        Self { socket, path: path.to_owned(), inode }
    }

    /// The socket, and the file at its path, which now stays. For [`UnixPathListener::adopt`].
    ///
    /// # Errors
    /// If the kernel has no descriptor left. Then the path is removed.
    pub fn leave(mut self) -> io::Result<(OwnedFd, Inode)> {
        let socket = self.socket.try_clone()?;
        self.path = PathBuf::new();
        Ok((socket, self.inode))
    }
}

impl AsFd for UnixPathListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for UnixPathListener {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        // The socket is still open, so no other agent takes it for stale. The lock keeps this check
        // and the removal apart from another agent's check, removal and bind.
        let lock = lock(folder_of(&self.path), Instant::now() + END_TIMEOUT);
        match (rustix::fs::lstat(&self.path), lock) {
            (Ok(found), _) if Inode::of(&found) != self.inode => {
                log::info!(
                    "{} is not removed: it does not belong to this process any more",
                    self.path.display()
                );
            }
            (Ok(_), Err(Errno::WOULDBLOCK)) => {
                log::info!(
                    "{} is not removed: another process holds the lock on its folder",
                    self.path.display()
                );
            }
            // Removed also if this process cannot lock the folder: an agent that cannot lock it
            // does not replace a path in it.
            (Ok(_), _) => {
                if let Err(errno) = opener::unlink(&self.path) {
                    log::warn!("cannot remove {}: {errno}", self.path.display());
                }
            }
            // The path is gone already.
            (Err(_), _) => {}
        }
    }
}

fn kernel(what: &'static str) -> impl Fn(Errno) -> UnixPathError {
    move |errno| UnixPathError::Kernel { what, source: errno.into() }
}

/// Refuses everything except a stale socket, and a path that does not exist.
///
/// # Errors
/// What is there.
pub fn check_may_replace(path: &Path) -> Result<(), UnixPathError> {
    let found = match rustix::fs::lstat(path) {
        Ok(stat) => FileType::from_raw_mode(stat.st_mode),
        // Another process has removed it meanwhile.
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(kernel("look at the path")(errno)),
    };
    let found = match found {
        FileType::Socket => return check_is_stale(path),
        FileType::RegularFile => "regular file",
        FileType::Symlink => "symbolic link",
        FileType::Directory => "folder",
        FileType::Fifo => "pipe",
        FileType::CharacterDevice | FileType::BlockDevice => "device",
        FileType::Unknown => "file of an unknown kind",
    };
    Err(UnixPathError::NotASocket { path: path.to_owned(), found })
}

/// Refuses a socket on which a process listens.
fn check_is_stale(path: &Path) -> Result<(), UnixPathError> {
    match is_listened_on(path) {
        Ok(false) => Ok(()),
        Ok(true) => Err(UnixPathError::InUse(path.to_owned())),
        Err(errno) => Err(kernel("find out whether a process listens there")(errno)),
    }
}

/// True if a process listens on the socket at `path`. It tries to connect and does not wait: a
/// listener whose queue is full would not answer. A socket of another kind counts as one.
fn is_listened_on(path: &Path) -> Result<bool, Errno> {
    match opener::connect_unix(path) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Ok(_) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Ok(true),
        Err(errno) => Err(errno),
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Locks the folder. The lock is held until the returned descriptor is dropped.
fn lock(folder: &Path, deadline: Instant) -> Result<OwnedFd, Errno> {
    let folder =
        opener::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    loop {
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(folder),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(LOCK_RETRY),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::Barrier;

    #[test]
    fn a_stale_socket_is_replaced_and_one_in_use_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let listener = UnixPathListener::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(UnixPathListener::bind(&path), Err(UnixPathError::InUse(_))));
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(!path.exists());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
    }

    #[test]
    fn a_file_that_is_not_a_socket_is_refused_and_not_changed() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("file"), "precious").unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        drop(UnixListener::bind(at("stale")).unwrap());
        for (link, target) in
            [("to-file", "file"), ("to-stale", "stale"), ("to-nothing", "nothing")]
        {
            std::os::unix::fs::symlink(at(target), at(link)).unwrap();
        }
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        for (name, found) in [
            ("file", "regular file"),
            ("folder", "folder"),
            ("to-file", "symbolic link"),
            ("to-stale", "symbolic link"),
            ("to-nothing", "symbolic link"),
            ("pipe", "pipe"),
        ] {
            let before = rustix::fs::lstat(at(name)).unwrap();
            let error = UnixPathListener::bind(&at(name)).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("{} is a {found}, not a socket: it is left as it is", at(name).display())
            );
            assert_eq!(
                Inode::of(&before),
                Inode::of(&rustix::fs::lstat(at(name)).unwrap()),
                "{name}"
            );
        }
        assert_eq!(std::fs::read_to_string(at("file")).unwrap(), "precious");
        assert!(at("stale").exists() && !at("nothing").exists());
    }

    #[test]
    fn exactly_one_of_many_starts_on_a_stale_path_listens() {
        const STARTS: usize = 8;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        for _ in 0..50 {
            drop(UnixListener::bind(&path).unwrap());
            let barrier = Barrier::new(STARTS);
            let start = || {
                barrier.wait();
                UnixPathListener::bind(&path)
            };
            let started: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..STARTS).map(|_| scope.spawn(start)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let (mut listening, refused): (Vec<_>, Vec<_>) =
                started.into_iter().partition(Result::is_ok);
            assert_eq!(listening.len(), 1);
            for error in refused {
                let error = io::Error::from(error.unwrap_err());
                assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{error}");
                assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            }
            UnixStream::connect(&path).unwrap();
            drop(listening.pop());
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_path_that_belongs_to_another_socket_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = UnixPathListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = UnixPathListener::bind(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
        // The path may even be a regular file when the listener is dropped.
        let listener = UnixPathListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        drop(listener);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_listener_with_a_full_queue_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = opener::bind_unix(&path, MODE_USER).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let _fills_the_queue = UnixStream::connect(&path).unwrap();
        assert!(matches!(UnixPathListener::bind(&path), Err(UnixPathError::InUse(_))));
    }

    #[test]
    fn a_start_is_refused_while_the_folder_is_locked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let held = lock(folder.path(), Instant::now()).unwrap();
        let error = UnixPathListener::bind(&path).unwrap_err();
        assert!(matches!(&error, UnixPathError::Locked { .. }), "{error}");
        assert!(!path.exists());
        drop(held);
        UnixPathListener::bind(&path).unwrap();
    }
}
