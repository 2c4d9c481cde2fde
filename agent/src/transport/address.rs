//! Where a stream goes or comes from.

use super::TransportError;
use crate::job::{Cancel, JobError};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::addr::SocketAddrArg;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// An address that a user writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `tcp:HOST:PORT`
    Tcp(String),
    /// `unix:PATH`
    Unix(PathBuf),
}

impl Address {
    /// Reads an address.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, TransportError> {
        let wrong = |reason: &str| TransportError::Address { address: text.to_owned(), reason: reason.to_owned() };
        if let Some(rest) = text.strip_prefix("tcp:") {
            let Some((host, port)) = rest.rsplit_once(':') else { return Err(wrong("no port: use tcp:HOST:PORT")) };
            if host.is_empty() || port.parse::<u16>().is_err() {
                return Err(wrong("use tcp:HOST:PORT with a port of 0 to 65535"));
            }
            return Ok(Self::Tcp(rest.to_owned()));
        }
        match text.strip_prefix("unix:") {
            Some("") => Err(wrong("no path: use unix:PATH")),
            Some(path) => Ok(Self::Unix(PathBuf::from(path))),
            None => Err(wrong("use tcp:HOST:PORT or unix:PATH")),
        }
    }

    /// The socket addresses that the name stands for.
    fn resolve(name: &str) -> Result<Vec<SocketAddr>, TransportError> {
        let failed = |source| TransportError::Connect { what: "resolve", address: name.to_owned(), source };
        Ok(name.to_socket_addrs().map_err(failed)?.collect())
    }

    /// Connects, giving up after `timeout` for each socket address that the name stands for.
    ///
    /// # Errors
    /// If nobody answers, or the job is cancelled meanwhile.
    pub fn connect(&self, timeout: Duration, cancel: &Cancel) -> Result<OwnedFd, JobError> {
        let failed = |address: String| move |source| TransportError::Connect { what: "connect to", address, source };
        match self {
            Self::Unix(path) => {
                let name = format!("unix:{}", path.display());
                let address =
                    rustix::net::SocketAddrUnix::new(path).map_err(|errno| failed(name.clone())(errno.into()))?;
                connect_one(AddressFamily::UNIX, &address, |_| (), timeout, cancel)?
                    .map_err(|error| failed(name)(error).into())
            }
            Self::Tcp(name) => {
                let mut last = std::io::Error::other("the name has no address");
                for address in Self::resolve(name)? {
                    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                    let prepare = if address.ip().to_canonical().is_loopback() { unpace } else { |_: &OwnedFd| () };
                    match connect_one(family, &address, prepare, timeout, cancel)? {
                        Ok(socket) => return Ok(socket),
                        Err(error) => last = error,
                    }
                }
                Err(failed(format!("tcp:{name}"))(last).into())
            }
        }
    }

    /// Listens.
    ///
    /// # Errors
    /// If the address is taken or not ours.
    pub fn listen(&self) -> Result<Listener, TransportError> {
        let failed = |address: String| move |source| TransportError::Connect { what: "listen on", address, source };
        match self {
            Self::Unix(path) => {
                let socket = listen_unix(path).map_err(failed(format!("unix:{}", path.display())))?;
                let address = format!("unix:{}", path.display());
                Ok(Listener { socket: socket.into(), address, path: Some(path.clone()) })
            }
            Self::Tcp(name) => {
                let socket =
                    TcpListener::bind(Self::resolve(name)?.as_slice()).map_err(failed(format!("tcp:{name}")))?;
                let bound = socket.local_addr().map_err(failed(format!("tcp:{name}")))?;
                Ok(Listener { socket: socket.into(), address: format!("tcp:{bound}"), path: None })
            }
        }
    }
}

/// Connects one socket without blocking, so that a cancel is heard; it blocks afterwards. The outer error is the job's end.
fn connect_one(
    family: AddressFamily, address: &impl SocketAddrArg, prepare: fn(&OwnedFd), timeout: Duration, cancel: &Cancel,
) -> Result<std::io::Result<OwnedFd>, JobError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = match rustix::net::socket_with(family, SocketType::STREAM, flags, None) {
        Ok(socket) => socket,
        Err(errno) => return Ok(Err(errno.into())),
    };
    prepare(&socket);
    match rustix::net::connect(&socket, address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => {
            let ready = cancel.wait(&[(socket.as_fd(), PollFlags::OUT)], Instant::now() + timeout)?;
            if !ready.contains(&true) {
                return Ok(Err(std::io::ErrorKind::TimedOut.into()));
            }
            if let Err(errno) | Ok(Err(errno)) = sockopt::socket_error(&socket) {
                return Ok(Err(errno.into()));
            }
        }
        Err(errno) => return Ok(Err(errno.into())),
    }
    Ok(rustix::io::ioctl_fionbio(&socket, false).map(|()| socket).map_err(Into::into))
}

/// Listens on a path with mode 0600, in the place of a socket that nobody listens on any more.
///
/// # Errors
/// What the kernel said; `AddrInUse` if someone listens there.
pub fn listen_unix(path: &Path) -> std::io::Result<UnixListener> {
    const BACKLOG: i32 = 128;
    let address = rustix::net::SocketAddrUnix::new(path)?;
    let bind = || -> std::io::Result<UnixListener> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The path gets the mode that the socket has when it is bound, so there is no moment at which others may connect. The process's
        // mask would do as well, but is not this thread's alone.
        rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(0o600))?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(socket.into())
    };
    match bind() {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            match UnixStream::connect(path) {
                Err(refused) if refused.kind() == std::io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
                _ => return Err(error),
            }
            bind()
        }
        bound => bound,
    }
}

/// A listening socket; a path is removed on drop.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    address: String,
    path: Option<PathBuf>,
}

impl Listener {
    /// Where it listens, with the port that the kernel chose.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Takes the connection that is waiting.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn accept(&self) -> std::io::Result<OwnedFd> {
        Ok(rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC)?)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Someone else may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Checks that a descriptor which a VMM handed over is a connected stream socket.
///
/// # Errors
/// What it is instead.
pub fn check_socket(fd: OwnedFd) -> Result<OwnedFd, TransportError> {
    let wrong = |reason: &str| TransportError::Address { address: "fd".to_owned(), reason: reason.to_owned() };
    match sockopt::socket_type(&fd) {
        Ok(SocketType::STREAM) => {}
        Ok(_) => return Err(wrong("the socket is no stream socket")),
        Err(_) => return Err(wrong("the descriptor is no socket")),
    }
    if rustix::net::getpeername(&fd).is_err() {
        return Err(wrong("the socket is not connected"));
    }
    Ok(fd)
}

/// Sends small records at once on TCP, and notices a peer whose host is gone within about twice
/// `timeout`, also while this side has nothing to send or holds back for its bandwidth limit.
///
/// # Errors
/// What the kernel said.
pub fn tune(fd: BorrowedFd<'_>, timeout: Duration) -> rustix::io::Result<()> {
    let domain = sockopt::socket_domain(fd)?;
    if domain == AddressFamily::INET || domain == AddressFamily::INET6 {
        sockopt::set_tcp_nodelay(fd, true)?;
        sockopt::set_socket_keepalive(fd, true)?;
        // A probe after half of the time, and three more until it is over; in whole seconds.
        let seconds = |part: Duration| Duration::from_secs(part.as_secs().clamp(1, 3600));
        sockopt::set_tcp_keepidle(fd, seconds(timeout / 2))?;
        sockopt::set_tcp_keepintvl(fd, seconds(timeout / 6))?;
        sockopt::set_tcp_keepcnt(fd, 3)?;
        // The same for what was sent and is not acknowledged, which keeps the probes from being sent.
        let unacknowledged = u32::try_from(2 * timeout.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(fd, unacknowledged.max(1000))?;
    }
    Ok(())
}

/// Takes the pacing from a TCP socket that is not connected yet: as BBR's, it is for links, and between two processes of one machine, as when a VMM is replaced under its
/// guest, it only costs timers. Once connected it would stay.
fn unpace(socket: &OwnedFd) {
    // Where the kernel does not offer this one, the default stays.
    let _ = sockopt::set_tcp_congestion(socket, "reno");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_or_refused_with_the_reason() {
        assert_eq!(Address::parse("tcp:[::1]:70").unwrap(), Address::Tcp("[::1]:70".into()));
        assert_eq!(Address::parse("unix:/a b").unwrap(), Address::Unix("/a b".into()));
        for wrong in ["", "tcp:", "tcp:host", "tcp::1", "tcp:host:70000", "unix:", "fd:3", "localhost:1"] {
            let error = Address::parse(wrong).unwrap_err().to_string();
            assert!(error.contains(&format!("\"{wrong}\"")) && error.contains("use "), "{error}");
        }
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let listener = listen_unix(&path).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(listen_unix(&path).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
        drop(listener);
    }
}
