// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files and addresses by name, for an agent that may not open them itself.
//!
//! An agent in a sandbox ([`crate::sandbox`]) can neither open a file nor connect a socket. A small
//! process beside it does that, the *opener*. It was started before the sandbox was entered, and it
//! opens only what a person or a VMM has named (`named`). So somebody who takes the agent over by
//! what it reads, such as a page stream or an image, gets no other file and no other host.
//!
//! The functions of this file do what the system calls of their names do. In a process without an
//! opener they are these system calls: in the operator's commands, in a program that links the
//! agent as a library, and with `--sandbox off`.
//!
//! - `named`: what was named, and the check of a name;
//! - `wire`: the messages between the agent and its opener;
//! - `pair`: a socket that listens, and the connection that it is to accept;
//! - [`mod@channel`]: the agent's end;
//! - [`process`]: the process.

pub mod channel;
mod named;
mod pair;
pub mod process;
mod wire;

use crate::lock::lock;
use crate::transport::tcp_options::disable_pacing;
use channel::Channel;
use pageferry_protocol::control::grants::MAX_GRANTS;
use pageferry_protocol::control::unix_path::socket_address;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, OnceLock};
use wire::Op;

/// The opener of this process.
static OPENER: OnceLock<Channel> = OnceLock::new();
/// What was granted last. The next agent needs it to continue the job of this one.
static GRANTED: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());

/// From now on the functions of this file ask the opener at the other end of `channel`. The first
/// call of a process holds.
pub fn ask(channel: Channel) {
    let _ = OPENER.set(channel);
}

/// The channel to the opener, if this process has one.
pub fn channel() -> Option<&'static Channel> {
    OPENER.get()
}

/// True if this process has an opener.
pub fn is_asked() -> bool {
    OPENER.get().is_some()
}

/// Lets the opener open what the descriptors stand for. Without an opener it does nothing.
///
/// # Errors
/// If one of them stands for nothing.
pub fn grant(fds: Vec<OwnedFd>) -> Result<(), Errno> {
    let Some(opener) = OPENER.get() else { return Ok(()) };
    opener.grant(&fds.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
    let mut granted = lock(&GRANTED);
    granted.extend(fds);
    let more = granted.len().saturating_sub(MAX_GRANTS);
    granted.drain(..more);
    Ok(())
}

/// Duplicates of the descriptors that were granted last, at most [`MAX_GRANTS`].
///
/// # Errors
/// If the kernel has no descriptor left.
pub fn granted() -> io::Result<Vec<OwnedFd>> {
    lock(&GRANTED).iter().map(OwnedFd::try_clone).collect()
}

/// The same for what the options of the agent name, which the next agent names by itself.
///
/// # Errors
/// If one of them stands for nothing.
pub fn grant_for_good(fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    OPENER.get().map_or(Ok(()), |opener| opener.grant_for_good(fds))
}

/// This process ends: nobody waits long for an opener that does not answer.
pub fn hurry() {
    if let Some(opener) = OPENER.get() {
        opener.hurry();
    }
}

/// Whether the opener would open `path`, for writing too with `write`. Always true in a process
/// without an opener.
///
/// # Errors
/// If the opener is gone, or the path has no folder.
pub fn is_named(path: &Path, write: bool) -> Result<bool, Errno> {
    match OPENER.get() {
        None => Ok(true),
        Some(opener) => match opener.done(&Op::IsNamed { path: path.into(), write }, &[]) {
            Ok(()) => Ok(true),
            Err(Errno::ACCESS) => Ok(false),
            Err(errno) => Err(errno),
        },
    }
}

/// `open`.
///
/// # Errors
/// As of the system call; [`Errno::ACCESS`] also if nobody has named the folder of `path`.
pub fn open(path: impl AsRef<Path>, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let path = path.as_ref();
    match OPENER.get() {
        None => rustix::fs::open(path, flags, mode),
        Some(opener) => {
            let (path, flags, mode) = (path.into(), flags.bits(), mode.as_raw_mode());
            opener.descriptor(&Op::Open { path, flags, mode }, &[])
        }
    }
}

/// Opens the file of `file` once more, with other flags.
///
/// # Errors
/// As of `open`.
pub fn reopen(file: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
    match OPENER.get() {
        None => rustix::fs::open(by_descriptor(file), flags, Mode::empty()),
        Some(opener) => opener.descriptor(&Op::Reopen { flags: flags.bits() }, &[file]),
    }
}

/// Gives the open `file`, which may have no name, the name `path` (`linkat`).
///
/// # Errors
/// As of the system call, and as of [`open`].
pub fn link(file: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
    match OPENER.get() {
        None => {
            let flags = AtFlags::SYMLINK_FOLLOW;
            rustix::fs::linkat(CWD, by_descriptor(file), CWD, path, flags)
        }
        Some(opener) => opener.done(&Op::Link { path: path.into() }, &[file]),
    }
}

/// `renameat2`.
///
/// # Errors
/// As of the system call, and as of [`open`].
pub fn rename(from: &Path, to: &Path, flags: RenameFlags) -> Result<(), Errno> {
    match OPENER.get() {
        None if flags.is_empty() => rustix::fs::rename(from, to),
        None => rustix::fs::renameat_with(CWD, from, CWD, to, flags),
        Some(opener) => {
            let (from, to, flags) = (from.into(), to.into(), flags.bits());
            opener.done(&Op::Rename { from, to, flags }, &[])
        }
    }
}

/// `unlink`.
///
/// # Errors
/// As of the system call, and as of [`open`].
pub fn unlink(path: &Path) -> Result<(), Errno> {
    match OPENER.get() {
        None => rustix::fs::unlink(path),
        Some(opener) => opener.done(&Op::Unlink { path: path.into() }, &[]),
    }
}

/// Opens a file to read it. Does not wait for the other end of a pipe.
///
/// # Errors
/// As of [`open`].
pub fn open_to_read(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    Ok(open(path, flags, Mode::empty())?.into())
}

/// The bytes of a file of at most `limit` bytes.
///
/// # Errors
/// As of [`open`], and if the file is longer.
pub fn read(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    read_open(open_to_read(path)?, limit)
}

/// The bytes of an open file of at most `limit` bytes.
///
/// # Errors
/// As of the system call, and if the file is longer.
pub fn read_open(file: File, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        let sentence = format!("the file has more than {limit} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, sentence));
    }
    Ok(bytes)
}

/// What the kernel says of a file. A file in a folder that this process may not search is opened
/// for that: its opener may be allowed to.
///
/// # Errors
/// As of the system call, and as of [`open`].
pub fn metadata(path: &Path) -> io::Result<Metadata> {
    match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            open_to_read(path)?.metadata()
        }
        found => found,
    }
}

/// A new UNIX stream socket that is bound to `path`, which must not exist. Its file gets `mode`.
///
/// # Errors
/// As of `bind`, and as of [`open`].
pub fn bind_unix(path: &Path, mode: Mode) -> Result<OwnedFd, Errno> {
    if let Some(opener) = OPENER.get() {
        let (path, mode) = (path.into(), mode.as_raw_mode());
        return opener.descriptor(&Op::BindUnix { path, mode }, &[]);
    }
    bind_unix_at(path, path, mode)
}

/// The same in this process. `name` is another name of `path`, of which nobody else can change what
/// lies before its last part.
fn bind_unix_at(path: &Path, name: &Path, mode: Mode) -> Result<OwnedFd, Errno> {
    let address = socket_address(path).map_err(|_| Errno::INVAL)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The path gets the mode that the socket has when it is bound. So there is no moment at which
    // another user may connect. The umask would have the same effect, but all threads share it.
    rustix::fs::fchmod(&socket, USER)?;
    rustix::net::bind(&socket, &address)?;
    // The mode at the bind is cut by the umask, so it cannot let anybody else in.
    if mode != USER {
        let changed = set_mode(name, mode);
        if changed.is_err() {
            rustix::fs::unlink(name)?;
        }
        changed?;
    }
    Ok(socket)
}

/// Sets the mode of a socket that was just bound. A link that was put at the path meanwhile is not
/// followed.
fn set_mode(path: &Path, mode: Mode) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let bound = rustix::fs::open(path, flags, Mode::empty())?;
    let found = FileType::from_raw_mode(rustix::fs::fstat(&bound)?.st_mode);
    if found != FileType::Socket {
        return Err(Errno::ADDRINUSE);
    }
    rustix::fs::chmod(by_descriptor(bound.as_fd()), mode)
}

/// A non-blocking stream socket that is connected to the UNIX socket at `path`.
///
/// # Errors
/// As of `connect`, and as of [`open`]. [`Errno::AGAIN`] if the listener's queue is full.
pub fn connect_unix(path: &Path) -> Result<OwnedFd, Errno> {
    if let Some(opener) = OPENER.get() {
        return opener.descriptor(&Op::ConnectUnix { path: path.into() }, &[]);
    }
    let address = socket_address(path).map_err(|_| Errno::INVAL)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, NEW, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}

/// A non-blocking TCP socket that connects to `address`: it is writable when that is decided.
///
/// # Errors
/// As of `connect`; [`Errno::ACCESS`] if nobody has named the address.
pub fn connect_tcp(address: SocketAddr) -> Result<OwnedFd, Errno> {
    if let Some(opener) = OPENER.get() {
        return opener.descriptor(&Op::ConnectTcp { address }, &[]);
    }
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, NEW, None)?;
    if address.ip().to_canonical().is_loopback() {
        disable_pacing(&socket);
    }
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(errno),
    }
}

/// A TCP socket that listens on the first of the addresses that can be bound.
///
/// # Errors
/// As of `bind`, of the last address.
pub fn listen_tcp(addresses: &[SocketAddr]) -> io::Result<TcpListener> {
    match OPENER.get() {
        None => TcpListener::bind(addresses),
        Some(opener) => {
            let addresses = addresses.to_vec();
            Ok(opener.descriptor(&Op::ListenTcp { addresses }, &[])?.into())
        }
    }
}

/// A UNIX socket that listens, and one that is connected to it. Nobody else can connect.
///
/// # Errors
/// If the kernel refuses, or there is no folder for temporary files.
pub fn listening_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    match OPENER.get() {
        None => pair::listening_pair(),
        Some(opener) => opener.pair(&Op::ListeningPair),
    }
}

/// A datagram socket that is connected to the service manager's, which `NOTIFY_SOCKET` names. A
/// name that begins with `@` is abstract.
///
/// # Errors
/// As of `connect`; [`Errno::ACCESS`] if the opener has another name in its environment.
pub fn connect_manager(name: &OsStr) -> Result<OwnedFd, Errno> {
    if let Some(opener) = OPENER.get() {
        return opener.descriptor(&Op::ConnectManager { name: name.into() }, &[]);
    }
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest)?,
        path @ [b'/', ..] => SocketAddrUnix::new(path)?,
        _ => return Err(Errno::INVAL),
    };
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}

/// A socket to a service of stores ([`crate::store`]), which the opener starts.
///
/// # Errors
/// If there is no opener, or it cannot start one.
pub fn store_service() -> Result<OwnedFd, Errno> {
    let opener = OPENER.get().ok_or(Errno::NOSYS)?;
    opener.descriptor(&Op::StoreService, &[])
}

/// The base `name` of `length` bytes, for the agent and for the VMM ([`crate::base::files`]).
///
/// # Errors
/// If there can be none.
pub fn base(name: &str, length: u64, reserved: u64) -> io::Result<(OwnedFd, OwnedFd)> {
    match OPENER.get() {
        None => {
            let base = crate::base::open(name, length, reserved)?;
            Ok((base.agents, base.vmms))
        }
        Some(opener) => opener.pair(&Op::Base { name: name.to_owned(), length, reserved }),
    }
}

/// The base that a VMM has open, for the agent.
///
/// # Errors
/// If it is no file of this user on tmpfs, or the kernel refuses.
pub fn base_again(vmms: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    match OPENER.get() {
        None => crate::base::open_again(vmms),
        Some(opener) => Ok(opener.descriptor(&Op::BaseAgain, &[vmms])?),
    }
}

/// The socket addresses of `HOST:PORT`. Has no deadline.
///
/// # Errors
/// As the look-up says.
pub fn look_up(name: &str) -> io::Result<Vec<SocketAddr>> {
    match OPENER.get() {
        None => Ok(name.to_socket_addrs()?.collect()),
        Some(opener) => opener.addresses(name),
    }
}

/// The mode of a file that only its user may use.
const USER: Mode = Mode::RUSR.union(Mode::WUSR);
/// The flags of a socket that is to be connected.
const NEW: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// A path to an open file, which needs no name for that.
fn by_descriptor(file: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}
