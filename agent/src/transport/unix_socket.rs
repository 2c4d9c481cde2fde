// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Checks that a descriptor is a UNIX stream socket that is connected, or that listens, and whose
//! it is.

use rustix::net::{AddressFamily, SocketType, sockopt};
use std::os::fd::{AsFd, BorrowedFd};

/// What `fd` is instead of a connected UNIX stream socket; `None` if it is one.
pub fn not_connected(fd: impl AsFd) -> Option<&'static str> {
    let fd = fd.as_fd();
    if let Some(found) = not_unix_stream(fd) {
        return Some(found);
    }
    if sockopt::socket_acceptconn(fd) == Ok(true) {
        return Some("a listening socket");
    }
    // This also fails once the other side has closed the connection.
    if rustix::net::getpeername(fd).is_err() {
        return Some("a socket that is not connected");
    }
    None
}

/// What `fd` is instead of a UNIX stream socket that listens; `None` if it is one.
pub fn not_listening(fd: impl AsFd) -> Option<&'static str> {
    let fd = fd.as_fd();
    not_unix_stream(fd).or_else(|| match sockopt::socket_acceptconn(fd) {
        Ok(true) => None,
        _ => Some("a socket that does not listen"),
    })
}

/// Whether the other side of a connection may use this agent: the user of this process, and root.
///
/// # Errors
/// Its user, or why it is not known.
pub fn check_peer(socket: impl AsFd) -> Result<(), UntrustedPeer> {
    match sockopt::socket_peercred(socket) {
        Ok(peer) if peer.uid == rustix::process::geteuid() || peer.uid.is_root() => Ok(()),
        Ok(peer) => Err(UntrustedPeer::User(peer.uid.as_raw())),
        Err(errno) => Err(UntrustedPeer::Unknown(errno)),
    }
}

/// Why a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UntrustedPeer {
    /// It is another user's.
    #[error("a connection of user {0} is refused")]
    User(u32),
    /// The kernel does not tell.
    #[error("a connection is refused, because its user is not known")]
    Unknown(#[source] rustix::io::Errno),
}

/// What `fd` is instead of a UNIX stream socket; `None` if it is one.
fn not_unix_stream(fd: BorrowedFd<'_>) -> Option<&'static str> {
    match sockopt::socket_type(fd) {
        Ok(SocketType::STREAM) => {}
        Ok(_) => return Some("a socket, but not a stream socket"),
        Err(_) => return Some(kind(fd)),
    }
    let is_unix = matches!(sockopt::socket_domain(fd), Ok(AddressFamily::UNIX));
    (!is_unix).then_some("a socket, but not a UNIX socket")
}

/// What `fd` is. It is not a socket.
fn kind(fd: impl AsFd) -> &'static str {
    use rustix::fs::FileType;
    match rustix::fs::fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
        Ok(FileType::RegularFile) => "a file",
        Ok(FileType::Directory) => "a folder",
        Ok(FileType::Fifo) => "a pipe",
        Ok(FileType::CharacterDevice) => "a device",
        Ok(_) => "not a socket",
        Err(_) => "not open",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SocketFlags, socket_with};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    #[test]
    fn anything_but_a_connected_unix_stream_socket_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(not_connected(&ours), None);
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let unconnected =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        let open = |path: &str| OwnedFd::from(std::fs::File::open(path).unwrap());
        let file = OwnedFd::from(std::fs::File::create(folder.path().join("file")).unwrap());
        for (fd, found) in [
            (file, "a file"),
            (open("/"), "a folder"),
            (open("/dev/null"), "a device"),
            (rustix::pipe::pipe().unwrap().0, "a pipe"),
            (UnixDatagram::pair().unwrap().0.into(), "a socket, but not a stream socket"),
            (
                TcpStream::connect(tcp.local_addr().unwrap()).unwrap().into(),
                "a socket, but not a UNIX socket",
            ),
            (
                UnixListener::bind(folder.path().join("listens")).unwrap().into(),
                "a listening socket",
            ),
            (unconnected, "a socket that is not connected"),
        ] {
            assert_eq!(not_connected(&fd), Some(found));
        }
    }
    #[test]
    fn only_a_unix_stream_socket_that_listens_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("listens")).unwrap();
        assert_eq!(not_listening(&listener), None);
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(not_listening(&tcp), Some("a socket, but not a UNIX socket"));
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(not_listening(&ours), Some("a socket that does not listen"));
        assert_eq!(not_listening(rustix::pipe::pipe().unwrap().0), Some("a pipe"));
    }
}
