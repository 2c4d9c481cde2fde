//! Paths of UNIX sockets: who may listen on one, and who removes it.
//!
//! The agent's control socket and the listeners of streams have paths that a user writes. A typo
//! must not delete a file, and two agents must not take a path from each other:
//!
//! - Only a socket on which nobody listens is ever replaced. A regular file, a symbolic link, a
//!   folder, or a socket that somebody listens on is refused and left as it is.
//! - Whoever listens removes the path at its end, but only if the path is still its own socket:
//!   same device, same inode. The inode cannot be used again while the socket is open.
//! - Looking, removing and listening are one step for all agents: they hold a lock (`flock`) on the
//!   folder meanwhile. The kernel drops it with the process, and it leaves no file behind. So of
//!   two agents that start at the same instant one listens, and the other is told that the path is
//!   taken. A crash in between leaves a socket that nobody listens on, which the next start
//!   replaces.
//!
//! Somebody who may open the folder can hold that lock for ever. Then a start is refused after
//! `LOCK_TIMEOUT`, and an end leaves its path behind, to be replaced by the next start.

use crate::waiting::may_wait;
use pageferry_protocol::control::unix_path::socket_address;
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Connections that the kernel completes before they are accepted.
const BACKLOG: i32 = 128;
/// How long a start waits for another agent that starts in the same folder.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long an end waits for that.
const END_TIMEOUT: Duration = Duration::from_millis(100);
/// Time between two attempts to lock the folder.
const LOCK_RETRY: Duration = Duration::from_millis(5);
/// How often a path may turn up and go away again before this gives up.
const ATTEMPTS: u32 = 16;

/// Why a path cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum UnixPathError {
    /// The path is no address.
    #[error(transparent)]
    Path(#[from] pageferry_protocol::control::unix_path::SocketPathError),
    /// Somebody listens there.
    #[error("{} is in use: somebody listens there", .0.display())]
    InUse(PathBuf),
    /// There is something else, and it stays.
    #[error("{} is a {found}, not a socket: it is left as it is", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// Another process holds the lock on the folder, or this one cannot take it and there is a
    /// socket to be replaced.
    #[error(
        "{} cannot be taken safely, since the folder {} cannot be locked: \
         remove the path if it exists and nobody listens there, or use another folder",
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
    /// The kernel refused.
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
            UnixPathError::NoSocket { .. } => io::ErrorKind::AlreadyExists,
            UnixPathError::Kernel { source, .. } => source.kind(),
        };
        Self::new(kind, error)
    }
}

/// A listening socket, and its path. The path is removed on drop if it is still this socket's.
#[derive(Debug)]
pub struct UnixPathListener {
    socket: OwnedFd,
    path: PathBuf,
    inode: Inode,
}

/// What tells a file from all others that exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Inode {
    device: u64,
    number: u64,
}

impl Inode {
    fn of(stat: &Stat) -> Self {
        Self { device: stat.st_dev, number: stat.st_ino }
    }
}

impl UnixPathListener {
    /// Listens on `path` with mode 0600, in the place of a socket that nobody listens on any more.
    ///
    /// # Errors
    /// If the path is taken, or the kernel refuses. Nothing is changed then.
    pub fn bind(path: &Path) -> Result<Self, UnixPathError> {
        may_wait("listen on a path");
        let address = socket_address(path)?;
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
            match bind_new(&address) {
                Ok(socket) => {
                    let made = rustix::fs::lstat(path)
                        .map_err(kernel("look at the socket that was just made"))?;
                    let made = Self { socket, path: path.to_owned(), inode: Inode::of(&made) };
                    if let Err(errno) = rustix::net::listen(&made.socket, BACKLOG) {
                        // The drop of `made` removes the path, and takes the lock for that.
                        drop(lock);
                        return Err(kernel("listen")(errno));
                    }
                    return Ok(made);
                }
                Err(Errno::ADDRINUSE) => {}
                Err(errno) => return Err(kernel("bind a socket")(errno)),
            }
            check_may_replace(path)?;
            // The check, the removal and the next attempt are one step only with the lock.
            if let Err(errno) = lock {
                let (path, folder) = (path.to_owned(), folder.to_owned());
                return Err(UnixPathError::Locked { path, folder, source: errno.into() });
            }
            match rustix::fs::unlink(path) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => {
                    return Err(kernel("remove the socket that nobody listens on")(errno));
                }
            }
        }
        Err(UnixPathError::InUse(path.to_owned()))
    }

    /// Does not wait for a connection in [`UnixPathListener::accept`] from now on.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(&self.socket, true)?)
    }

    /// Takes the connection that is waiting.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        Ok(rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC)?)
    }
}

impl AsFd for UnixPathListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for UnixPathListener {
    fn drop(&mut self) {
        // The socket is still open, so no agent takes the path for one that nobody listens on. The
        // lock is against an agent whose start looks at this folder just now.
        let lock = lock(folder_of(&self.path), Instant::now() + END_TIMEOUT);
        match (rustix::fs::lstat(&self.path), lock) {
            (Ok(found), _) if Inode::of(&found) != self.inode => {
                log::info!("{} is not this process's any more, and stays", self.path.display());
            }
            (Ok(_), Err(Errno::WOULDBLOCK)) => {
                log::info!(
                    "{} stays: another process holds the lock on its folder",
                    self.path.display()
                );
            }
            // Where this process cannot lock the folder no agent replaces a path in it.
            (Ok(_), _) => {
                if let Err(errno) = rustix::fs::unlink(&self.path) {
                    log::warn!("cannot remove {}: {errno}", self.path.display());
                }
            }
            // Somebody removed it.
            (Err(_), _) => {}
        }
    }
}

fn kernel(what: &'static str) -> impl Fn(Errno) -> UnixPathError {
    move |errno| UnixPathError::Kernel { what, source: errno.into() }
}

/// A socket at a path that did not exist. Nobody can connect before it listens.
fn bind_new(address: &SocketAddrUnix) -> Result<OwnedFd, Errno> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // The path gets the mode that the socket has when it is bound, so there is no moment at which
    // others may connect. The process's mask would do as well, but is not this thread's alone.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(0o600))?;
    rustix::net::bind(&socket, address)?;
    Ok(socket)
}

/// Refuses to replace anything but a socket on which nobody listens.
fn check_may_replace(path: &Path) -> Result<(), UnixPathError> {
    let found = match rustix::fs::lstat(path) {
        Ok(stat) => FileType::from_raw_mode(stat.st_mode),
        // It went away again.
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(kernel("look at the path")(errno)),
    };
    let found = match found {
        FileType::Socket => return check_nobody_listens(path),
        FileType::RegularFile => "regular file",
        FileType::Symlink => "symbolic link",
        FileType::Directory => "folder",
        FileType::Fifo => "pipe",
        FileType::CharacterDevice | FileType::BlockDevice => "device",
        FileType::Unknown => "file of an unknown kind",
    };
    Err(UnixPathError::NoSocket { path: path.to_owned(), found })
}

/// Connects to find out, without waiting: a listener whose queue is full does not answer.
fn check_nobody_listens(path: &Path) -> Result<(), UnixPathError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let socket = socket.map_err(kernel("make a socket"))?;
    match rustix::net::connect(&socket, &socket_address(path)?) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        // It listens, its queue is full, or it is a socket of another type.
        Ok(()) | Err(Errno::AGAIN | Errno::INPROGRESS | Errno::PROTOTYPE) => {
            Err(UnixPathError::InUse(path.to_owned()))
        }
        Err(errno) => Err(kernel("find out whether somebody listens there")(errno)),
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Locks the folder until the descriptor is dropped.
fn lock(folder: &Path, deadline: Instant) -> Result<OwnedFd, Errno> {
    let folder = rustix::fs::open(
        folder,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
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
    fn a_socket_that_nobody_listens_on_is_replaced_and_one_that_is_in_use_is_not() {
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
    fn what_is_no_socket_is_refused_by_name_and_not_touched() {
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
    fn of_many_that_start_at_once_on_a_stale_path_exactly_one_listens() {
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
    fn a_path_that_another_took_over_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = UnixPathListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = UnixPathListener::bind(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
        // What is there in the end may be no socket at all.
        let listener = UnixPathListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        drop(listener);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_listener_whose_queue_is_full_is_in_use_and_nobody_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = bind_new(&socket_address(&path).unwrap()).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let _fills_the_queue = UnixStream::connect(&path).unwrap();
        assert!(matches!(UnixPathListener::bind(&path), Err(UnixPathError::InUse(_))));
    }

    #[test]
    fn a_start_is_refused_while_somebody_holds_the_lock_on_the_folder() {
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
