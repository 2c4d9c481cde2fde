// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A UNIX socket that listens, and the connection that it is to accept. For a library that accepts
//! connections and takes none that are made.

use std::fs::DirBuilder;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

/// Makes the two. Nobody else can connect.
pub(super) fn listening_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    // Nobody else can reach a path in a folder of mode 0700, and it is removed at once.
    let folder = PrivateFolder::make()?;
    let path = folder.0.join("s");
    let listener = UnixListener::bind(&path)?;
    let connected = UnixStream::connect(&path)?;
    Ok((listener.into(), connected.into()))
}

/// A folder that only this user can look into. It is removed on drop.
struct PrivateFolder(PathBuf);

impl PrivateFolder {
    fn make() -> io::Result<Self> {
        // Seeded by the kernel, so nobody can be there before.
        let number = RandomState::new().build_hasher().finish();
        let folder = std::env::temp_dir().join(format!("pageferry-{number:016x}"));
        DirBuilder::new().mode(0o700).create(&folder)?;
        Ok(Self(folder))
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            log::warn!("{} stays: {error}", self.0.display());
        }
    }
}
