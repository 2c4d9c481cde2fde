// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an opener may open: what somebody has named.
//!
//! A folder is named by a descriptor of it, or by the arguments of the agent. It stands for all
//! that is in it and below it. A descriptor that was opened for reading (`O_RDONLY`) allows to
//! write there, too; one with `O_PATH` does not. The operator's commands and the client library
//! send such a descriptor before each request with a path.
//!
//! A host is named by a UDP socket that is connected to its address. Connecting one sends nothing.
//!
//! The agent can make neither of these descriptors, since it may neither open nor connect anything.
//! So one that comes from the agent was made by somebody who may.
//!
//! A few files of the kernel need not be named. They are only read.

use rustix::fs::{AtFlags, CWD, FileType, OFlags, StatxFlags, statx};
use rustix::io::Errno;
use rustix::net::{SocketType, sockopt};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Most folders, and most addresses. Later ones take the place of the oldest.
const MAX_NAMED: usize = 1024;

/// Files of the kernel that any process may read, and that an agent looks at.
const ALWAYS: [&str; 2] = ["/proc/meminfo", "/proc/sys/net/core/rmem_max"];
/// The same in the folder of the agent's own process.
const OF_AGENT: [&str; 2] = ["cgroup", "mountinfo"];
/// The folders of such files: of control groups, and of the pools of huge pages.
const FOLDERS: [&str; 2] = ["/sys/fs/cgroup", "/sys/kernel/mm"];

/// The device and the number of a file, and when it was made: the number of one that is removed is
/// given to another one. The time is 0 where the file system does not know it.
type Inode = (u32, u32, u64, i64, u32);

/// A folder or an address, and what may be done with it.
#[derive(Debug, Clone, Copy)]
struct Allowed {
    /// Files there may be made, changed and removed.
    write: bool,
    /// When it was named: higher is later. What the options of the agent name is never the oldest.
    since: u64,
}

/// What was named.
#[derive(Debug, Default)]
pub(super) struct Named {
    folders: BTreeMap<Inode, Allowed>,
    addresses: BTreeMap<SocketAddr, Allowed>,
    count: u64,
}

impl Named {
    /// Remembers what the descriptor names, as something that an option of the agent names if
    /// `is_option`.
    ///
    /// # Errors
    /// [`Errno::INVAL`] if it names nothing.
    pub(super) fn add(&mut self, fd: &OwnedFd, is_option: bool) -> Result<(), Errno> {
        let stat = rustix::fs::fstat(fd)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Socket {
            if sockopt::socket_type(fd)? != SocketType::DGRAM {
                return Err(Errno::INVAL);
            }
            let peer = rustix::net::getpeername(fd)?.and_then(|peer| peer.try_into().ok());
            let allowed = self.next(false, is_option);
            insert(&mut self.addresses, canonical(peer.ok_or(Errno::INVAL)?), allowed);
            return Ok(());
        }
        let flags = rustix::fs::fcntl_getfl(fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let inode = inode(fd.as_fd(), Path::new(""), AtFlags::EMPTY_PATH)?;
        let known = self.folders.get(&inode);
        let write = !flags.contains(OFlags::PATH) || known.is_some_and(|allowed| allowed.write);
        let is_option = is_option || known.is_some_and(|allowed| allowed.since == u64::MAX);
        let allowed = self.next(write, is_option);
        insert(&mut self.folders, inode, allowed);
        Ok(())
    }

    fn next(&mut self, write: bool, is_option: bool) -> Allowed {
        self.count += 1;
        Allowed { write, since: if is_option { u64::MAX } else { self.count } }
    }

    /// The path without links, if it lies in a folder that was named.
    ///
    /// # Errors
    /// [`Errno::ACCESS`] if it does not, and what the kernel says of a folder that is not there.
    pub(super) fn check(&self, path: &Path, write: bool) -> Result<PathBuf, Errno> {
        // The opener was started in the current directory of its agent.
        let path = &std::path::absolute(path).map_err(|_| Errno::INVAL)?;
        if !write && is_of_kernel(path) {
            return without_links(path);
        }
        let path = without_links(path)?;
        if !write && FOLDERS.iter().any(|folder| path.starts_with(folder)) {
            return Ok(path);
        }
        let is_allowed = |folder: &Path| {
            let inode = inode(CWD, folder, AtFlags::empty()).ok();
            let found = inode.and_then(|inode| self.folders.get(&inode));
            found.is_some_and(|allowed| allowed.write || !write)
        };
        // The path itself may be a folder that was named.
        if path.ancestors().any(is_allowed) { Ok(path) } else { Err(Errno::ACCESS) }
    }

    /// Checks that somebody has named the address.
    ///
    /// # Errors
    /// [`Errno::ACCESS`] if nobody has.
    pub(super) fn check_address(&self, address: SocketAddr) -> Result<(), Errno> {
        let is_named = self.addresses.contains_key(&canonical(address));
        if is_named { Ok(()) } else { Err(Errno::ACCESS) }
    }
}

/// What identifies a folder, as long as it exists.
fn inode(folder: BorrowedFd<'_>, path: &Path, flags: AtFlags) -> Result<Inode, Errno> {
    let found = statx(folder, path, flags, StatxFlags::BASIC_STATS | StatxFlags::BTIME)?;
    let knows_time = found.stx_mask & StatxFlags::BTIME.bits() != 0;
    let made = if knows_time { found.stx_btime.tv_sec } else { 0 };
    let nanoseconds = if knows_time { found.stx_btime.tv_nsec } else { 0 };
    Ok((found.stx_dev_major, found.stx_dev_minor, found.stx_ino, made, nanoseconds))
}

/// True for a file of the kernel that need not be named.
fn is_of_kernel(path: &Path) -> bool {
    // The opener is a child of its agent.
    let agent = rustix::process::getppid().map_or(0, rustix::process::Pid::as_raw_pid);
    let folder = PathBuf::from(format!("/proc/{agent}"));
    ALWAYS.iter().any(|always| path == Path::new(always))
        || OF_AGENT.iter().any(|name| path == folder.join(name))
}

fn insert<K: Ord + Copy>(all: &mut BTreeMap<K, Allowed>, key: K, allowed: Allowed) {
    if all.len() >= MAX_NAMED
        && !all.contains_key(&key)
        && let Some((&oldest, _)) = all.iter().min_by_key(|(_, allowed)| allowed.since)
    {
        all.remove(&oldest);
    }
    all.insert(key, allowed);
}

/// One form for each address: an IPv4 address in an IPv6 one is the IPv4 address.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The path with all links resolved. Its last part may be missing.
fn without_links(path: &Path) -> Result<PathBuf, Errno> {
    let resolved = |path: &Path| {
        path.canonicalize().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    };
    match resolved(path) {
        Err(Errno::NOENT) => {
            let (folder, name) = path.parent().zip(path.file_name()).ok_or(Errno::NOENT)?;
            // A link that leads nowhere: what would be made is elsewhere.
            if path.symlink_metadata().is_ok() {
                return Err(Errno::NOENT);
            }
            Ok(resolved(folder)?.join(name))
        }
        resolved => resolved,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::Mode;

    fn folder(path: &Path, flags: OFlags) -> OwnedFd {
        rustix::fs::open(path, flags | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn a_folder_stands_for_all_below_it_and_for_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        for name in ["mine", "mine/below", "other"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        std::fs::write(at("other/secret"), "x").unwrap();
        std::os::unix::fs::symlink(at("other/secret"), at("mine/link")).unwrap();
        std::os::unix::fs::symlink(at("other/new"), at("mine/nowhere")).unwrap();
        std::os::unix::fs::symlink(at("mine"), at("way")).unwrap();
        let mut named = Named::default();
        assert_eq!(named.check(&at("mine/a"), false), Err(Errno::ACCESS));
        named.add(&folder(&at("mine"), OFlags::PATH), false).unwrap();
        for path in ["mine", "mine/a", "mine/below/a", "way/a"] {
            named.check(&at(path), false).unwrap();
            assert_eq!(named.check(&at(path), true), Err(Errno::ACCESS), "{path}");
        }
        named.add(&folder(&at("mine"), OFlags::RDONLY), false).unwrap();
        named.check(&at("mine/below/a"), true).unwrap();
        // Once allowed, a second name without it takes nothing away.
        named.add(&folder(&at("mine"), OFlags::PATH), false).unwrap();
        named.check(&at("mine/a"), true).unwrap();
        for path in ["other/secret", "mine/link", "mine/../other/secret", "."] {
            assert_eq!(named.check(&at(path), false), Err(Errno::ACCESS), "{path}");
        }
        assert_eq!(named.check(&at("mine/nowhere"), true), Err(Errno::NOENT));
        assert_eq!(named.check(Path::new("Cargo.toml"), false), Err(Errno::ACCESS));
        assert_eq!(named.check(Path::new(""), false), Err(Errno::INVAL));
        named.add(&folder(Path::new("."), OFlags::PATH), false).unwrap();
        named.check(Path::new("Cargo.toml"), false).unwrap();
    }

    #[test]
    fn a_folder_that_gets_the_number_of_a_removed_one_is_not_named() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        std::fs::create_dir(at("named")).unwrap();
        let mut named = Named::default();
        named.add(&folder(&at("named"), OFlags::RDONLY), false).unwrap();
        std::fs::remove_dir(at("named")).unwrap();
        for number in 0..20 {
            let other = at(&number.to_string());
            std::fs::create_dir(&other).unwrap();
            assert_eq!(named.check(&other.join("file"), false), Err(Errno::ACCESS));
        }
    }

    #[test]
    fn what_an_option_names_is_never_forgotten() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: u64| home.path().join(name.to_string());
        let mut named = Named::default();
        for number in 0..MAX_NAMED as u64 + 10 {
            std::fs::create_dir(at(number)).unwrap();
            named.add(&folder(&at(number), OFlags::PATH), number < 5).unwrap();
        }
        // Named once more by a command, it is still that of an option.
        named.add(&folder(&at(0), OFlags::PATH), false).unwrap();
        for (number, is_known) in [(0, true), (4, true), (5, false), (14, false), (15, true)] {
            assert_eq!(named.check(&at(number), false).is_ok(), is_known, "{number}");
        }
    }

    #[test]
    fn an_address_is_named_by_a_socket_that_sends_nothing() {
        let mut named = Named::default();
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.connect("127.0.0.1:4444").unwrap();
        let address = "127.0.0.1:4444".parse().unwrap();
        assert_eq!(named.check_address(address), Err(Errno::ACCESS));
        named.add(&udp.into(), false).unwrap();
        named.check_address(address).unwrap();
        named.check_address("[::ffff:127.0.0.1]:4444".parse().unwrap()).unwrap();
        assert_eq!(named.check_address("127.0.0.1:4445".parse().unwrap()), Err(Errno::ACCESS));
    }

    #[test]
    fn what_an_agent_could_make_itself_names_nothing() {
        let mut named = Named::default();
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let file = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        for fd in [OwnedFd::from(one), listener.into(), peer.into()] {
            assert_eq!(named.add(&fd, false), Err(Errno::INVAL));
        }
        assert_eq!(named.add(&file, false), Err(Errno::NOTDIR));
    }

    #[test]
    fn the_oldest_makes_room() {
        let mut all = BTreeMap::new();
        for key in 0..MAX_NAMED as u64 + 1 {
            insert(&mut all, key, Allowed { write: false, since: key });
        }
        assert_eq!((all.len(), all.contains_key(&0)), (MAX_NAMED, false));
    }
}
