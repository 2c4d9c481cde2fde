// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Addresses of streams: `tcp:HOST:PORT`, `tls:HOST:PORT` and `unix:PATH`.
//!
//! [`Address::parse`] reads an address that a user wrote. [`Address::connect`] looks the name up,
//! and connects to one socket address after the other until one answers. [`Address::listen`] binds
//! a [`Listener`], whose `accept` returns the connections. A VMM may hand over a connected socket
//! instead ([`check_socket`]).
//!
//! Every look-up and every attempt to connect has a deadline. Cancelling the job ends a connect at
//! once.

use super::error::TransportError;
use super::plain::PlainNetworks;
use super::resolve::{resolve, resolve_for};
use super::unix_path::{MODE_USER, UnixPathListener};
use super::unix_socket::check_peer;
use crate::cancel::Cancel;
use crate::opener;
use crate::waiting::may_wait;
use pageferry_protocol::control::unix_path::socket_address;
use rustix::event::PollFlags;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{SocketFlags, SocketType, sockopt};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest look-up of a name to listen on. The client waits 10 seconds for the agent's answer, so
/// the look-up must end well before that.
pub const LISTEN_LOOKUP: Duration = Duration::from_secs(5);
/// Most connections that wait in the kernel to be accepted. The kernel has a limit of its own, by
/// default this one (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;
/// Time between two attempts to connect to a listener whose queue is full.
const FULL_QUEUE_RETRY: Duration = Duration::from_millis(10);

/// An address that a user writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `tcp:HOST:PORT`
    Tcp(String),
    /// `tls:HOST:PORT`: the same, and both sides prove who they are.
    Tls(String),
    /// `unix:PATH`
    Unix(PathBuf),
}

impl Address {
    /// Reads an address.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, TransportError> {
        let wrong = |reason: &str| TransportError::Address {
            address: text.to_owned(),
            reason: reason.to_owned(),
        };
        let kinds = [("tcp:", Self::Tcp as fn(String) -> Self), ("tls:", Self::Tls)];
        for (prefix, kind) in kinds {
            let Some(rest) = text.strip_prefix(prefix) else { continue };
            let Some((host, port)) = rest.rsplit_once(':') else {
                return Err(wrong(&format!("no port: use {prefix}HOST:PORT")));
            };
            // Some write tcp://.
            if host.is_empty() || host.contains('/') || port.parse::<u16>().is_err() {
                return Err(wrong(&format!("use {prefix}HOST:PORT with a port of 0 to 65535")));
            }
            return Ok(kind(rest.to_owned()));
        }
        match text.strip_prefix("unix:") {
            Some("") => Err(wrong("no path: use unix:PATH")),
            Some(path) => match socket_address(Path::new(path)) {
                Ok(_) => Ok(Self::Unix(PathBuf::from(path))),
                Err(error) => Err(wrong(&error.to_string())),
            },
            None => Err(wrong("use tcp:HOST:PORT, tls:HOST:PORT or unix:PATH")),
        }
    }

    /// The host whose certificate the peer must show, if it must show one.
    pub fn secured_host(&self) -> Option<&str> {
        match self {
            Self::Tls(name) => name.rsplit_once(':').map(|(host, _)| host),
            Self::Tcp(_) | Self::Unix(_) => None,
        }
    }

    /// What an address of this kind begins with.
    fn prefix(&self) -> &'static str {
        match self {
            Self::Tcp(_) => "tcp",
            Self::Tls(_) => "tls",
            Self::Unix(_) => "unix",
        }
    }

    /// Checks a numeric address that will be connected to, before a job begins. A name is looked up
    /// and checked by [`Address::connect`].
    ///
    /// # Errors
    /// If guest memory would cross a network in the clear, and `plain` does not allow that.
    pub fn check_plain(&self, plain: PlainNetworks) -> Result<(), TransportError> {
        match self {
            Self::Tcp(name) if plain == PlainNetworks::Refused => {
                let number = name.parse::<SocketAddr>().ok();
                plain.check(&format!("tcp:{name}"), number.as_slice())
            }
            _ => Ok(()),
        }
    }

    /// Connects. The look-up of the name may take `timeout`, and so may each attempt to connect to
    /// one of its socket addresses. At the other end of a UNIX socket must be this user or root.
    ///
    /// # Errors
    /// If no socket address accepts the connection, `plain` does not allow one of them, or the job
    /// is cancelled meanwhile.
    pub fn connect(
        &self, timeout: Duration, cancel: &Cancel, plain: PlainNetworks,
    ) -> Result<OwnedFd, TransportError> {
        may_wait("connect");
        let failed = |address: String| {
            move |source| TransportError::Connect { what: "connect to", address, source }
        };
        match self {
            Self::Unix(path) => {
                let name = format!("unix:{}", path.display());
                let invalid = |error| {
                    failed(name.clone())(std::io::Error::new(ErrorKind::InvalidInput, error))
                };
                socket_address(path).map_err(invalid)?;
                let socket = connect_one(|| opener::connect_unix(path), timeout, cancel)?
                    .map_err(failed(name.clone()))?;
                check_peer(&socket).map_err(|error| failed(name)(std::io::Error::other(error)))?;
                Ok(socket)
            }
            Self::Tcp(name) | Self::Tls(name) => {
                let addresses = resolve_for(cancel, name, timeout)?.map_err(unresolved(name))?;
                self.check_found(plain, name, &addresses)?;
                let mut last = std::io::Error::other("the name has no address");
                for address in addresses {
                    if address.port() == 0 {
                        let why = "the port is 0, allowed: 1 to 65535";
                        last = std::io::Error::new(ErrorKind::InvalidInput, why);
                        continue;
                    }
                    match connect_one(|| opener::connect_tcp(address), timeout, cancel)? {
                        Ok(socket) => return Ok(socket),
                        Err(error) => last = error,
                    }
                }
                Err(failed(format!("{}:{name}", self.prefix()))(last))
            }
        }
    }

    fn check_found(
        &self, plain: PlainNetworks, name: &str, found: &[SocketAddr],
    ) -> Result<(), TransportError> {
        match self {
            Self::Tcp(_) => plain.check(&format!("tcp:{name}"), found),
            Self::Tls(_) | Self::Unix(_) => Ok(()),
        }
    }

    /// Listens for guests. A name is looked up for at most [`LISTEN_LOOKUP`].
    ///
    /// # Errors
    /// If the address is in use, does not belong to this host, or `plain` does not allow it.
    pub fn listen(&self, plain: PlainNetworks) -> Result<Listener, TransportError> {
        self.listen_with(MODE_USER, Some(plain))
    }

    /// Listens for something else than guests. The path of a UNIX socket gets this mode.
    ///
    /// # Errors
    /// If the address is in use, or does not belong to this host.
    pub fn listen_with_mode(&self, mode: Mode) -> Result<Listener, TransportError> {
        self.listen_with(mode, None)
    }

    fn listen_with(
        &self, mode: Mode, plain: Option<PlainNetworks>,
    ) -> Result<Listener, TransportError> {
        may_wait("listen");
        let failed = |address: String| {
            move |source| TransportError::Connect { what: "listen on", address, source }
        };
        match self {
            Self::Unix(path) => {
                let address = format!("unix:{}", path.display());
                let socket = UnixPathListener::bind_with_mode(path, mode)
                    .map_err(|error| failed(address.clone())(error.into()))?;
                Ok(Listener { socket: Listening::Unix(socket), address })
            }
            Self::Tcp(name) | Self::Tls(name) => {
                let addresses = resolve(name, LISTEN_LOOKUP).map_err(unresolved(name))?;
                plain.map_or(Ok(()), |plain| self.check_found(plain, name, &addresses))?;
                let socket = opener::listen_tcp(&addresses)
                    .map_err(failed(format!("{}:{name}", self.prefix())))?;
                // The standard library's queue is too short for a crowd of strangers: the kernel
                // drops connections for which there is no place, and a source tries again only
                // after a second.
                rustix::net::listen(&socket, BACKLOG)
                    .map_err(|errno| failed(format!("{}:{name}", self.prefix()))(errno.into()))?;
                let bound = socket.local_addr();
                let bound = bound.map_err(failed(format!("{}:{name}", self.prefix())))?;
                let address = format!("{}:{bound}", self.prefix());
                Ok(Listener { socket: Listening::Tcp(socket), address })
            }
        }
    }
}

fn unresolved(name: &str) -> impl Fn(std::io::Error) -> TransportError {
    move |source| TransportError::Connect { what: "resolve", address: name.to_owned(), source }
}

/// Connects one socket, which `start` makes. It is non-blocking until it is connected, so that a
/// cancel ends the wait; the returned socket blocks. The outer error is for the job: it was
/// cancelled, or `poll` failed.
fn connect_one(
    start: impl Fn() -> Result<OwnedFd, Errno>, timeout: Duration, cancel: &Cancel,
) -> Result<std::io::Result<OwnedFd>, TransportError> {
    let deadline = Instant::now() + timeout;
    let mut started = start();
    // The queue of a UNIX listener is full. The kernel does not report when there is room again.
    while matches!(started, Err(Errno::AGAIN)) && Instant::now() < deadline {
        cancel.sleep(FULL_QUEUE_RETRY)?;
        started = start();
    }
    let socket = match started {
        Ok(socket) => socket,
        Err(Errno::AGAIN) => return Ok(Err(ErrorKind::TimedOut.into())),
        Err(errno) => return Ok(Err(errno.into())),
    };
    let ready = cancel.wait(&[(socket.as_fd(), PollFlags::OUT)], deadline)?;
    if !ready.contains(&true) {
        return Ok(Err(ErrorKind::TimedOut.into()));
    }
    if let Err(errno) | Ok(Err(errno)) = sockopt::socket_error(&socket) {
        return Ok(Err(errno.into()));
    }
    Ok(rustix::io::ioctl_fionbio(&socket, false).map(|()| socket).map_err(Into::into))
}

/// A listening socket. On drop, the path of a UNIX socket is removed if it is still this socket's.
#[derive(Debug)]
pub struct Listener {
    socket: Listening,
    address: String,
}

#[derive(Debug)]
enum Listening {
    Tcp(TcpListener),
    Unix(UnixPathListener),
}

impl Listener {
    /// The address on which it listens, with the port that the kernel chose.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// True if who connects must prove who it is.
    pub fn is_secured(&self) -> bool {
        self.address.starts_with("tls:")
    }

    /// Makes [`Listener::accept`] return at once if there is no connection.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_nonblocking(&self) -> std::io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(self, true)?)
    }

    /// Accepts the next connection; waits if there is none.
    ///
    /// # Errors
    /// If the kernel refuses, most often because the process has no free descriptor.
    pub fn accept(&self) -> std::io::Result<OwnedFd> {
        Ok(rustix::net::accept_with(self, SocketFlags::CLOEXEC)?)
    }

    /// As [`Listener::accept`]. Also returns who has connected, unless it is a UNIX socket.
    ///
    /// # Errors
    /// As there.
    pub fn accept_from(&self) -> std::io::Result<(OwnedFd, Option<SocketAddr>)> {
        let (socket, peer) = rustix::net::acceptfrom_with(self, SocketFlags::CLOEXEC)?;
        Ok((socket, peer.and_then(|peer| SocketAddr::try_from(peer).ok())))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Listening::Tcp(socket) => socket.as_fd(),
            Listening::Unix(socket) => socket.as_fd(),
        }
    }
}

/// Checks that a descriptor which a VMM handed over is a connected stream socket.
///
/// # Errors
/// If it is something else. The error says what.
pub fn check_socket(fd: OwnedFd) -> Result<OwnedFd, TransportError> {
    let wrong = |reason: &str| TransportError::Address {
        address: "fd".to_owned(),
        reason: reason.to_owned(),
    };
    match sockopt::socket_type(&fd) {
        Ok(SocketType::STREAM) => {}
        Ok(_) => return Err(wrong("the socket is not a stream socket")),
        Err(_) => return Err(wrong("the descriptor is not a socket")),
    }
    if rustix::net::getpeername(&fd).is_err() {
        return Err(wrong("the socket is not connected"));
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_or_refused_with_the_reason() {
        assert_eq!(Address::parse("tcp:[::1]:70").unwrap(), Address::Tcp("[::1]:70".into()));
        assert_eq!(Address::parse("unix:/a b").unwrap(), Address::Unix("/a b".into()));
        let tls = Address::parse("tls:[::1]:70").unwrap();
        assert_eq!((&tls, tls.secured_host()), (&Address::Tls("[::1]:70".into()), Some("[::1]")));
        for wrong in [
            "",
            "tcp:",
            "tls:",
            "tls:host",
            "tls://host:1",
            "tcp:host",
            "tcp::1",
            "tcp:host:70000",
            "unix:",
            "fd:3",
            "localhost:1",
        ] {
            let error = Address::parse(wrong).unwrap_err().to_string();
            assert!(error.contains(&format!("\"{wrong}\"")) && error.contains("use "), "{error}");
        }
    }
}
