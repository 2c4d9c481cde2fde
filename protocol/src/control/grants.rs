// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What goes with [`Request::Grant`]: descriptors that stand for what a later request names.
//!
//! An agent in a sandbox opens no file and connects to no host by itself. Its opener does, in the
//! folders and to the addresses for which somebody has sent it such a descriptor. The agent cannot
//! make one.
//!
//! A folder stands for all files in it and below it. Its descriptor was opened with `O_RDONLY` if
//! files may be written there, and with `O_PATH` if they may only be read. An address stands for
//! itself: its descriptor is a UDP socket that is connected to it, which sends nothing.
//!
//! Whatever cannot be opened here is left out: the agent says what is wrong with it, in the words
//! of the request that names it.

use super::frame::MAX_FDS;
use super::request::Request;
use crate::image::stored::is_stored;
use rustix::fs::{Mode, OFlags, open};
use std::net::{ToSocketAddrs, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Most descriptors of one grant.
pub const MAX_GRANTS: usize = MAX_FDS / 2;

/// Descriptors that stand for folders and addresses.
#[derive(Debug, Default)]
pub struct Grants(Vec<OwnedFd>);

impl Grants {
    /// What the request names.
    pub fn of(request: &Request) -> Self {
        let none = Self::default();
        let read = |grants: Self, path: &String| match path.as_str() {
            "" => grants,
            path => grants.read(Path::new(path)),
        };
        match request {
            Request::StartOutgoing { target: address, .. } | Request::Recover { address, .. } => {
                none.address(address)
            }
            // To listen at an address of the network needs no grant.
            Request::StartIncoming { listen, .. } if listen.starts_with("unix:") => {
                none.address(listen)
            }
            Request::StartSnapshot { path, options } => {
                read(none.write(Path::new(path)), &options.base)
            }
            Request::StartRestore { path, options } => match options.working_set.as_str() {
                "" => read(none, path),
                recorded => read(none, path).write(Path::new(recorded)),
            },
            Request::OpenBase { path } => read(none, path),
            _ => none,
        }
    }

    /// Adds the folder in which a file is read.
    #[must_use]
    pub fn read(self, file: &Path) -> Self {
        self.folder_of(file, OFlags::PATH)
    }

    /// Adds the folder in which a file is written. It is added only for reading if this process may
    /// not list it.
    #[must_use]
    pub fn write(self, file: &Path) -> Self {
        self.folder_of(file, OFlags::RDONLY)
    }

    /// Adds a folder, in which files are read.
    #[must_use]
    pub fn folder(mut self, folder: &Path) -> Self {
        self.add_folder(folder, OFlags::PATH);
        self
    }

    /// Adds what a migration connects to, or listens on: an address as of
    /// [`Request::StartOutgoing`]. Looks a name up.
    #[must_use]
    pub fn address(mut self, address: &str) -> Self {
        if let Some(path) = address.strip_prefix("unix:") {
            return self.write(Path::new(path));
        }
        let host = ["tcp:", "tls:"].iter().find_map(|prefix| address.strip_prefix(prefix));
        let addresses = host.and_then(|host| host.to_socket_addrs().ok());
        for address in addresses.into_iter().flatten() {
            let own = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(own).and_then(|socket| {
                socket.connect(address)?;
                // Port 0 connects to nothing.
                socket.peer_addr()?;
                Ok(socket)
            });
            self.push(socket.ok().map(OwnedFd::from));
        }
        self
    }

    /// True if there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The descriptors, at most [`MAX_GRANTS`].
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd).collect()
    }

    /// The descriptors, at most [`MAX_GRANTS`].
    pub fn into_fds(self) -> Vec<OwnedFd> {
        self.0
    }

    fn folder_of(mut self, file: &Path, flags: OFlags) -> Self {
        // Stores are named by the options of the agent alone.
        if file.to_str().is_some_and(is_stored) {
            return self;
        }
        // The file may be a link into another folder.
        let behind = file.canonicalize().ok();
        let folders = [Some(file), behind.as_deref()].map(|file| file.and_then(Path::parent));
        match folders {
            [Some(one), Some(other)] if one != other => {
                self.add_folder(one, flags);
                self.add_folder(other, flags);
            }
            [one, other] => {
                if let Some(folder) = one.or(other) {
                    self.add_folder(folder, flags);
                }
            }
        }
        self
    }

    fn add_folder(&mut self, folder: &Path, flags: OFlags) {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let opened =
            |flags| open(folder, flags | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok();
        self.push(opened(flags).or_else(|| opened(OFlags::PATH)));
    }

    fn push(&mut self, fd: Option<OwnedFd>) {
        if self.0.len() < MAX_GRANTS {
            self.0.extend(fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{fcntl_getfl, fstat, stat};

    #[test]
    fn a_link_names_its_own_folder_and_that_of_its_file() {
        let home = tempfile::tempdir().unwrap();
        let (one, other) = (home.path().join("one"), home.path().join("other"));
        std::fs::create_dir(&one).unwrap();
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join("file"), "").unwrap();
        std::os::unix::fs::symlink(other.join("file"), one.join("link")).unwrap();
        let inodes = |grants: &Grants| -> Vec<u64> {
            grants.0.iter().map(|fd| fstat(fd).unwrap().st_ino).collect()
        };
        let of = |path: &Path| stat(path).unwrap().st_ino;
        let grants = Grants::default().read(&one.join("link"));
        assert_eq!(inodes(&grants), [of(&one), of(&other)]);
        assert!(fcntl_getfl(&grants.0[0]).unwrap().contains(OFlags::PATH));
        let grants = Grants::default().write(&one.join("new"));
        assert_eq!(inodes(&grants), [of(&one)]);
        assert!(!fcntl_getfl(&grants.0[0]).unwrap().contains(OFlags::PATH));
        let grants = Grants::default().address(&format!("unix:{}/socket", one.display()));
        assert_eq!(inodes(&grants), [of(&one)]);
        assert!(Grants::default().read(Path::new("/no/such/folder/file")).is_empty());
    }

    #[test]
    fn an_address_is_a_socket_that_is_connected_to_it() {
        for address in ["tcp:127.0.0.1:4444", "tls:127.0.0.1:4444"] {
            let grants = Grants::default().address(address);
            let [fd] = &grants.into_fds()[..] else { panic!("one descriptor") };
            let socket = UdpSocket::from(fd.try_clone().unwrap());
            assert_eq!(socket.peer_addr().unwrap().to_string(), "127.0.0.1:4444");
        }
        for none in ["fd", "tcp:127.0.0.1:0", "tcp:nothing"] {
            assert!(Grants::default().address(none).is_empty(), "{none}");
        }
    }
}
