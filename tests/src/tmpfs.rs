//! A small file system for one process: full soon, without harm to anybody else.
//!
//! It is mounted in a mount namespace of the process's own, if need be in a user namespace, so that it takes no privilege, nobody else sees it, and it goes with the process.

use crate::Error;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Mounts a tmpfs of `$1` bytes at `$0`, and becomes what follows.
const SCRIPT: &str = r#"mount -t tmpfs -o "size=$1" none "$0" && shift && exec "$@""#;

/// Mounts a tmpfs with the options `$1` at `$0`, says so, and stays until its input ends.
const HOLD: &str = r#"mount -t tmpfs -o "$1" none "$0" && echo mounted && exec cat"#;

/// How a process gets one.
#[derive(Debug, Clone, Copy)]
pub struct Tmpfs {
    /// What `unshare` is to do: who is root needs no user namespace, unless that is all its container gives it.
    namespaces: &'static str,
}

/// The folder of another process where its tmpfs is, seen from here, also after the end of that process.
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
            let output = found.command(folder.path(), 1 << 16, OsStr::new("true")).stdin(Stdio::null()).output();
            let output = output.map_err(Error::io("run unshare"))?;
            if output.status.success() {
                return Ok(found);
            }
            said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        }
        Err(Error::Argument(said))
    }

    /// A command that runs `program` where `folder`, which is there, is a tmpfs of `bytes` bytes.
    pub fn command(&self, folder: &Path, bytes: u64, program: &OsStr) -> Command {
        let mut command = Command::new("unshare");
        command.args([self.namespaces, "sh", "-c", SCRIPT]).arg(folder).arg(bytes.to_string()).arg(program);
        command
    }
}

impl Tmpfs {
    /// A file of `length` bytes on a tmpfs of its own that was mounted with `options`. It goes with the file.
    ///
    /// # Errors
    /// If it cannot be mounted so.
    pub fn file(&self, options: &str, length: u64) -> Result<File, Error> {
        let folder = tempfile::tempdir().map_err(Error::io("make a folder"))?;
        let mut command = Command::new("unshare");
        command.args([self.namespaces, "sh", "-c", HOLD]).arg(folder.path()).arg(options);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(Error::io("run unshare"))?;
        let mut said = String::new();
        if let Some(output) = child.stdout.take() {
            BufReader::new(output).read_line(&mut said).map_err(Error::io("hear of the mount"))?;
        }
        let opened = if said.trim() == "mounted" {
            let view = View::of(child.id(), folder.path())?;
            let file = File::options().read(true).write(true).create_new(true).open(view.path().join("ram"));
            file.and_then(|file| file.set_len(length).map(|()| file)).map_err(Error::io("make a file on the tmpfs"))
        } else {
            Err(Error::Argument(format!("cannot mount a tmpfs with {options}")))
        };
        drop(child.stdin.take());
        child.wait().map_err(Error::io("end unshare"))?;
        opened
    }
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
        let found = rustix::fs::fstatvfs(&self.folder).map_err(Error::kernel("look at a file system"))?;
        Ok(found.f_bfree * found.f_frsize)
    }
}
