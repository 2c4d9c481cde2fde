// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Paths of UNIX sockets: which are allowed, and connecting to one.
//!
//! Agent and client accept the same paths. The kernel allows a listener one byte more than
//! [`MAX_SOCKET_PATH`], but then no client could name the path to connect to it.

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest path in bytes: `sun_path` of `linux/un.h` has 108, and the last byte ends the path.
pub const MAX_SOCKET_PATH: usize = 107;

/// Time between two attempts to connect to a listener whose queue is full.
const RETRY: Duration = Duration::from_millis(10);

/// Why a path cannot be the path of a socket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SocketPathError {
    /// The path is empty.
    #[error("the socket's path is empty")]
    Empty,
    /// The kernel would end the path at a byte of zero. At the start, such a byte would mean an
    /// abstract address, to which everybody may connect.
    #[error("socket path {0:?} has a byte of zero, which no path has")]
    Nul(PathBuf),
    /// The path does not fit.
    #[error("socket path {} has {} bytes, allowed are {MAX_SOCKET_PATH}", .0.display(), .0.as_os_str().len())]
    TooLong(PathBuf),
}

/// The address of the socket at `path`.
///
/// # Errors
/// What is wrong with the path.
pub fn socket_address(path: &Path) -> Result<SocketAddrUnix, SocketPathError> {
    match path.as_os_str().as_bytes() {
        [] => Err(SocketPathError::Empty),
        bytes if bytes.contains(&0) => Err(SocketPathError::Nul(path.to_owned())),
        // Of what is left the kernel's crate refuses nothing that is not longer.
        bytes if bytes.len() <= MAX_SOCKET_PATH => {
            SocketAddrUnix::new(path).map_err(|_| SocketPathError::TooLong(path.to_owned()))
        }
        _ => Err(SocketPathError::TooLong(path.to_owned())),
    }
}

/// Connects to the socket at `path`. Waits until `deadline` for a listener whose queue is full.
///
/// # Errors
/// If the path is not allowed, nobody listens there, or the listener does not accept in time.
pub fn connect_unix(path: &Path, deadline: Instant) -> io::Result<OwnedFd> {
    let address =
        socket_address(path).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    // A blocking connect would wait for ever for a listener that hangs.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(Errno::AGAIN) => {
                let sentence = "somebody listens there, and takes no connection";
                return Err(io::Error::new(io::ErrorKind::TimedOut, sentence));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

/// True if a process listens on the socket at `path`. It tries to connect and does not wait: a
/// listener whose queue is full would not answer. A socket of another kind counts as one.
///
/// # Errors
/// If the path is not allowed, or the kernel does not tell.
pub fn is_listened_on(path: &Path) -> io::Result<bool> {
    let address =
        socket_address(path).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &address) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Ok(()) | Err(Errno::AGAIN | Errno::INPROGRESS | Errno::PROTOTYPE) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    /// A path of `length` bytes in `folder`.
    fn path_of(folder: &Path, length: usize) -> PathBuf {
        let rest = length - folder.as_os_str().len() - 1;
        folder.join("s".repeat(rest))
    }

    #[test]
    fn a_path_of_107_bytes_is_connected_to_and_a_longer_one_is_refused_with_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let longest = path_of(folder.path(), MAX_SOCKET_PATH);
        let _listener = UnixListener::bind(&longest).unwrap();
        connect_unix(&longest, Instant::now()).unwrap();
        for length in [MAX_SOCKET_PATH + 1, 300] {
            let path = path_of(folder.path(), length);
            let error = connect_unix(&path, Instant::now()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            let expected =
                format!("socket path {} has {length} bytes, allowed are 107", path.display());
            assert_eq!(error.to_string(), expected);
        }
        assert_eq!(socket_address(Path::new("")), Err(SocketPathError::Empty));
        for wrong in ["\0abstract", "a\0b"] {
            assert_eq!(socket_address(Path::new(wrong)), Err(SocketPathError::Nul(wrong.into())));
        }
    }

    #[test]
    fn a_listener_that_takes_no_connection_is_waited_for_until_the_deadline_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::net::bind(&socket, &socket_address(&path).unwrap()).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let _fills_the_queue = UnixStream::connect(&path).unwrap();
        assert!(is_listened_on(&path).unwrap());
        let error = connect_unix(&path, Instant::now() + Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(socket);
        assert!(!is_listened_on(&path).unwrap());
        assert!(!is_listened_on(&folder.path().join("none")).unwrap());
    }
}
