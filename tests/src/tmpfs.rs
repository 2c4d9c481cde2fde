// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A small file system for one process, which a test can fill without harm to other processes.
//!
//! It is mounted in a mount namespace of the process, and in a user namespace if necessary. So it
//! needs no privilege, no other process sees it, and it is gone when the process ends.

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

/// Mounts a tmpfs of `$1` bytes at `$0`, and executes the rest of the arguments.
const SCRIPT: &str = r#"mount -t tmpfs -o "size=$1" none "$0" && shift && exec "$@""#;

/// Mounts a tmpfs with the options `$1` at `$0`, prints a line, and waits until its input ends.
const HOLD: &str = r#"mount -t tmpfs -o "$1" none "$0" && echo mounted && exec cat"#;

/// How a process gets a tmpfs of its own.
#[derive(Debug, Clone, Copy)]
pub struct Tmpfs {
    /// The options of `unshare`. Root needs no user namespace, except in a container that allows
    /// nothing else.
    namespaces: &'static str,
}

/// The folder with the tmpfs of another process. It can be read from here also after that process
/// ended.
#[derive(Debug)]
pub struct View {
    folder: File,
}

impl Tmpfs {
    /// Finds the options that this machine allows.
    ///
    /// # Errors
    /// If it allows none.
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

    /// A command that mounts a tmpfs of `bytes` bytes at the existing folder `folder`, and runs
    /// `program`.
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
    /// A file of `length` bytes on a new tmpfs that is mounted with `options`. The tmpfs is gone
    /// when the file is closed.
    ///
    /// # Errors
    /// If it cannot be mounted.
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
        // End the child whether the file was made or not.
        drop(child.stdin.take());
        child.wait().map_err(Error::io("end unshare"))?;
        opened
    }
}

/// Creates a file on the tmpfs that `child` mounted.
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

/// Checks that a small write to this empty file allocates a huge page, and empties it again.
///
/// # Errors
/// If it does not, even after the kernel was asked to compact free memory.
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
        // Only root may ask for it. Another user waits until the kernel compacts memory by itself.
        let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
        std::thread::sleep(Duration::from_millis(200));
    }
    Err(Error::Argument(format!(
        "a write of one byte allocates {allocated:#x} bytes, and no huge page"
    )))
}

impl View {
    /// Opens the folder `folder` as the process `id` sees it.
    ///
    /// # Errors
    /// If it cannot be opened.
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
