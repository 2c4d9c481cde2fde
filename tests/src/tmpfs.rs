// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A small file system for one process: full soon, without harm to anybody else.
//!
//! It is mounted in a mount namespace of the process's own, if need be in a user namespace, so that
//! it takes no privilege, nobody else sees it, and it goes with the process.

use crate::Error;
use pageferry_protocol::memory::PAGE_SIZE;
use rustix::fs::{FallocateFlags, fallocate};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Mounts a tmpfs of `$1` bytes at `$0`, and becomes what follows.
const SCRIPT: &str = r#"mount -t tmpfs -o "size=$1" none "$0" && shift && exec "$@""#;

/// Mounts a tmpfs with the options `$1` at `$0`, says so, and stays until its input ends.
const HOLD: &str = r#"mount -t tmpfs -o "$1" none "$0" && echo mounted && exec cat"#;

/// How a process gets one.
#[derive(Debug, Clone, Copy)]
pub struct Tmpfs {
    /// What `unshare` is to do: who is root needs no user namespace, unless that is all its
    /// container gives it.
    namespaces: &'static str,
}

/// The folder of another process where its tmpfs is, seen from here, also after the end of that
/// process.
#[derive(Debug)]
pub struct View {
    folder: File,
}

impl Tmpfs {
    /// Finds out what this machine allows.
    ///
    /// # Errors
    /// If it is nothing.
    pub fn find() -> Result<Self, Error> {
        let folder = tempfile::tempdir().map_err(Error::io("make a folder"))?;
        let mut said = String::new();
        for namespaces in ["-m", "-Urm"] {
            let found = Self { namespaces };
            let output =
                found.command(folder.path(), 1 << 16, "true").stdin(Stdio::null()).output();
            let output = output.map_err(Error::io("run unshare"))?;
            if output.status.success() {
                return Ok(found);
            }
            said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        }
        Err(Error::Argument(said))
    }

    /// A command that runs `program` where `folder`, which is there, is a tmpfs of `bytes` bytes.
    pub fn command(&self, folder: &Path, bytes: u64, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("unshare");
        command
            .args([self.namespaces, "sh", "-c", SCRIPT])
            .arg(folder)
            .arg(bytes.to_string())
            .arg(program);
        command
    }
}

impl Tmpfs {
    /// A file of `length` bytes on a tmpfs of its own that was mounted with `options`. It goes with
    /// the file.
    ///
    /// # Errors
    /// If it cannot be mounted so.
    pub fn file(&self, options: &str, length: u64) -> Result<File, Error> {
        let folder = tempfile::tempdir().map_err(Error::io("make a folder"))?;
        let mut command = Command::new("unshare");
        command.args([self.namespaces, "sh", "-c", HOLD]).arg(folder.path()).arg(options);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Error::io("run unshare"))?;
        let opened = file_on_mount(&mut child, folder.path(), options, length);
        // Whatever came of it.
        drop(child.stdin.take());
        child.wait().map_err(Error::io("end unshare"))?;
        opened
    }
}

/// Makes a file where `child` has mounted its tmpfs.
fn file_on_mount(
    child: &mut Child, folder: &Path, options: &str, length: u64,
) -> Result<File, Error> {
    let mut said = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output).read_line(&mut said).map_err(Error::io("hear of the mount"))?;
    }
    if said.trim() != "mounted" {
        return Err(Error::Argument(format!("cannot mount a tmpfs with {options}")));
    }
    let view = View::of(child.id(), folder)?;
    let file =
        File::options().read(true).write(true).create_new(true).open(view.path().join("ram"));
    file.and_then(|file| file.set_len(length).map(|()| file))
        .map_err(Error::io("make a file on the tmpfs"))
}

/// Sees to it that a small write into this empty file allocates more than it writes, and empties it
/// again.
///
/// # Errors
/// If it does not, even after the kernel was asked to make free memory contiguous.
pub fn hands_out_huge_pages(file: &File) -> Result<(), Error> {
    let mut allocated = 0;
    for _ in 0..10 {
        file.write_at(&[1], 0).map_err(Error::io("write to a file on a tmpfs"))?;
        let length = file.metadata().map_err(Error::io("look at a file on a tmpfs"))?;
        allocated = length.blocks() * 512;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, flags, 0, length.len())
            .map_err(Error::kernel("empty a file on a tmpfs"))?;
        if allocated > PAGE_SIZE {
            return Ok(());
        }
        // Only root may. Whoever may not waits for the kernel to do it by itself.
        let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
        std::thread::sleep(Duration::from_millis(200));
    }
    Err(Error::Argument(format!(
        "a write of one byte allocates {allocated:#x} bytes, and no huge page"
    )))
}

impl View {
    /// The folder `folder` as the process `id` sees it.
    ///
    /// # Errors
    /// If it is not to be looked at.
    pub fn of(id: u32, folder: &Path) -> Result<Self, Error> {
        let path = format!("/proc/{id}/root{}", folder.display());
        Ok(Self { folder: File::open(&path).map_err(Error::io(format!("look at {path}")))? })
    }

    /// A path to it from here.
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.folder.as_raw_fd()).into()
    }

    /// Bytes that are free.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn free(&self) -> Result<u64, Error> {
        let found =
            rustix::fs::fstatvfs(&self.folder).map_err(Error::kernel("look at a file system"))?;
        Ok(found.f_bfree * found.f_frsize)
    }
}
