// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A QEMU as a child of the test.

use super::console::PATIENCE;
use super::{Console, LinuxGuest, QemuTools, QemuVersion, Qmp, Sockets};
use crate::Error;
use crate::deadline::wait_until;
use crate::process::Process;
use std::ffi::OsString;
use std::process::Command;
use tempfile::TempDir;

/// A QEMU with its guest. It is killed when it is dropped.
#[derive(Debug)]
pub struct RunningGuest {
    /// QEMU.
    pub process: Process,
    /// The program in the guest.
    pub console: Console,
    /// QEMU's monitor.
    pub qmp: Qmp,
    sockets: Sockets,
    /// The folder of `sockets`, unless the test has given one.
    folder: Option<TempDir>,
}

impl RunningGuest {
    /// Starts a guest, and waits until its program answers.
    ///
    /// # Errors
    /// If QEMU cannot be started, or the guest does not answer in time. The error has QEMU's
    /// messages and the kernel's.
    pub fn boot(
        tools: &QemuTools, version: QemuVersion, guest: &LinuxGuest,
    ) -> Result<Self, Error> {
        let folder = tempfile::tempdir().map_err(Error::io("create a folder"))?;
        let sockets = Sockets::new(folder.path(), "qemu");
        sockets.create()?;
        let line = guest.command_line(tools, version, &sockets);
        let mut running = Self::start(&line, sockets)?;
        running.folder = Some(folder);
        running.wait_until_ready()?;
        Ok(running)
    }

    /// Starts a program that is, or becomes, a QEMU with the files in `sockets`, and connects to
    /// them. Does not wait for the guest: it may come by a migration.
    ///
    /// # Errors
    /// If it cannot be started, or does not create its sockets in time.
    pub fn start(line: &[OsString], sockets: Sockets) -> Result<Self, Error> {
        let [program, options @ ..] = line else {
            return Err(Error::Argument("an empty command line".to_owned()));
        };
        let mut process = Process::spawn("QEMU", Command::new(program).args(options))?;
        let there = || sockets.console().exists() && sockets.qmp().exists();
        let connected =
            wait_until("the sockets of QEMU", PATIENCE, || there() || process.has_ended())
                .and_then(|()| {
                    if process.has_ended() {
                        return Err(Error::Mismatch("QEMU ended".to_owned()));
                    }
                    Ok((Console::connect(&sockets.console())?, Qmp::connect(&sockets.qmp())?))
                });
        match connected {
            Ok((console, qmp)) => Ok(Self { process, console, qmp, sockets, folder: None }),
            Err(error) => Err(Error::Mismatch(format!(
                "{}; QEMU said: {}",
                error.sentence(),
                process.lines().join("\n")
            ))),
        }
    }

    /// Waits until the program in the guest answers.
    ///
    /// # Errors
    /// If it does not in time. The error has QEMU's messages and the kernel's.
    pub fn wait_until_ready(&mut self) -> Result<(), Error> {
        self.console
            .wait_until_ready()
            .map_err(|error| Error::Mismatch(format!("{}\n{}", error.sentence(), self.messages())))
    }

    /// Fails if the guest has found wrong content, or its kernel complained. The error says what.
    ///
    /// # Errors
    /// See above, or if the guest does not answer.
    pub fn verify(&mut self) -> Result<(), Error> {
        let Err(error) = self.console.status()?.verify() else { return Ok(()) };
        let bad = self.console.text("bad")?.join("\n");
        let log = self.console.text("dmesg")?.join("\n");
        Err(Error::Mismatch(format!("{}\n{bad}\n{log}", error.sentence())))
    }

    /// Powers the guest off, and waits for the end of QEMU.
    ///
    /// # Errors
    /// If QEMU does not end in time, or fails.
    pub fn power_off(mut self) -> Result<(), Error> {
        self.console.command("poweroff")?;
        let status = self.process.wait(PATIENCE)?;
        if status.success() {
            return Ok(());
        }
        Err(Error::Mismatch(format!("QEMU ended with {status}\n{}", self.messages())))
    }

    /// What QEMU and the kernel have printed.
    pub fn messages(&self) -> String {
        let qemu = self.process.lines().join("\n");
        format!("QEMU said: {qemu}\nthe kernel said: {}", self.kernel_log())
    }

    fn kernel_log(&self) -> String {
        let log = std::fs::read(self.sockets.kernel_log()).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Its files.
    pub fn sockets(&self) -> &Sockets {
        &self.sockets
    }
}

/// A failed test shows what the guest's kernel has said, beside what its processes have.
impl Drop for RunningGuest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the kernel said: {}", self.kernel_log());
        }
    }
}
