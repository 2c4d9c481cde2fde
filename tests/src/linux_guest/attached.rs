// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A QEMU that `pageferry qemu` serves.
//!
//! Three processes belong to it: the *side-car* (`pageferry qemu run`, `receive` or `attach`), and
//! its children QEMU and the agent. A test can kill each of them alone.

use super::console::PATIENCE;
use super::memory_files::MemoryFiles;
use super::operator::{Operator, wait_slowly};
use super::other_process::OtherProcess;
use super::{Console, LinuxGuest, QemuTools, QemuVersion, Qmp, Sockets, Status};
use crate::Error;
use crate::process::{Process, program};
use rustix::process::Signal;
use serde_json::json;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

/// `pageferry qemu`, as a child of the test.
#[derive(Debug)]
pub struct SideCar {
    process: Process,
    handle: OtherProcess,
}

impl SideCar {
    /// Starts `pageferry qemu ARGUMENTS`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(arguments: &[OsString]) -> Result<Self, Error> {
        let mut command = Command::new(program());
        command.arg("qemu").args(arguments);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "info");
        }
        let process = Process::spawn("pageferry qemu", &mut command)?;
        let handle = OtherProcess::open(process.id())?;
        Ok(Self { process, handle })
    }

    /// Waits until it serves its QEMU. Returns what it says then.
    ///
    /// # Errors
    /// If it ends before, or takes too long.
    fn wait_until_ready(&mut self) -> Result<String, Error> {
        self.process.wait_for_line("of guest memory in", PATIENCE)
    }

    /// Kills it with SIGKILL, and waits until it is gone. QEMU stays.
    ///
    /// # Errors
    /// If it had ended before.
    pub fn kill(&self) -> Result<(), Error> {
        self.handle.kill()
    }

    /// Its process.
    pub fn handle(&self) -> &OtherProcess {
        &self.handle
    }

    /// What it, its QEMU and its agent have printed.
    pub fn lines(&self) -> Vec<String> {
        self.process.lines()
    }

    /// Waits for a line that contains `text`, and returns it.
    ///
    /// # Errors
    /// If none comes in time.
    pub fn wait_for_line(&mut self, text: &str) -> Result<String, Error> {
        self.process.wait_for_line(text, PATIENCE)
    }

    /// Waits for its end, and that of its children.
    ///
    /// # Errors
    /// If it takes too long. The error has what it said.
    pub fn wait(&mut self) -> Result<ExitStatus, Error> {
        let ended = self.process.wait(PATIENCE);
        ended.map_err(|error| {
            Error::Mismatch(format!("{}; it said {:#?}", error.sentence(), self.lines()))
        })
    }
}

/// A QEMU with its agent. All is killed when it is dropped.
#[derive(Debug)]
pub struct AttachedGuest {
    /// The side-car.
    pub side_car: SideCar,
    /// The agent, for an operator.
    pub agent: Operator,
    /// The program in the guest.
    pub console: Console,
    /// A monitor of the test's own.
    pub qmp: Qmp,
    /// QEMU.
    pub qemu: OtherProcess,
    /// Where the agent waits for a source: the address of `--listen`, with the port that the
    /// kernel chose.
    pub address: Option<String>,
    sockets: Sockets,
}

/// Where, and with which QEMU.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// A folder of the test.
    pub folder: &'a Path,
    /// The QEMUs.
    pub tools: &'a QemuTools,
    /// Which of them.
    pub version: QemuVersion,
}

impl Place<'_> {
    /// The files of the guest `name`.
    fn sockets(&self, name: &str) -> Result<Sockets, Error> {
        let sockets = Sockets::new(self.folder, name);
        sockets.create()?;
        Ok(sockets)
    }

    /// The socket of the agent of the guest `name`.
    pub fn agent_socket(&self, name: &str) -> PathBuf {
        self.folder.join(name).join("agent")
    }

    /// `ACTION --socket SOCKET MORE -- QEMU ...`, for [`SideCar::spawn`].
    ///
    /// # Errors
    /// If the folder of the guest cannot be made.
    pub fn arguments(
        &self, action: &str, name: &str, more: &[&str], guest: &LinuxGuest,
    ) -> Result<Vec<OsString>, Error> {
        let line = guest.command_line(self.tools, self.version, &self.sockets(name)?);
        let mut arguments = vec![action.into(), "--socket".into(), self.agent_socket(name).into()];
        arguments.extend(["--name", name].iter().chain(more).map(OsString::from));
        arguments.push("--".into());
        arguments.extend(line);
        Ok(arguments)
    }

    /// `pageferry qemu run`, with a guest that has booted.
    ///
    /// # Errors
    /// If it cannot be started, or the guest does not answer in time.
    pub fn boot(&self, name: &str, guest: &LinuxGuest) -> Result<AttachedGuest, Error> {
        let mut attached = self.start("run", name, &[], guest)?;
        match attached.console.wait_until_ready() {
            Ok(()) => Ok(attached),
            Err(error) => {
                let messages = attached.messages();
                Err(Error::Mismatch(format!("{}\n{messages}", error.sentence())))
            }
        }
    }

    /// `pageferry qemu receive --listen` at a free port of TCP. Returns when it listens.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn receive(&self, name: &str, guest: &LinuxGuest) -> Result<AttachedGuest, Error> {
        self.start("receive", name, &["--listen", "tcp:127.0.0.1:0"], guest)
    }

    /// `pageferry qemu receive` for a restore.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn receive_image(&self, name: &str, guest: &LinuxGuest) -> Result<AttachedGuest, Error> {
        self.start("receive", name, &[], guest)
    }

    /// `pageferry qemu ACTION`. Returns when it serves its QEMU, whose guest may still boot.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(
        &self, action: &str, name: &str, more: &[&str], guest: &LinuxGuest,
    ) -> Result<AttachedGuest, Error> {
        let mut side_car = SideCar::spawn(&self.arguments(action, name, more, guest)?)?;
        let started = self.connect(name, &mut side_car);
        match started {
            Ok((said, console, qmp, qemu)) => {
                let address = said.split_once("listens at ").map(|(_, address)| address.to_owned());
                let agent = Operator::new(self.agent_socket(name));
                let sockets = self.sockets(name)?;
                Ok(AttachedGuest { side_car, agent, console, qmp, qemu, address, sockets })
            }
            Err(error) => {
                // It ends its QEMU then.
                let _ = side_car.handle.signal(Signal::TERM);
                let _ = side_car.handle.wait_for_end();
                let said = side_car.lines().join("\n");
                Err(Error::Mismatch(format!("{}; it said {said}", error.sentence())))
            }
        }
    }

    fn connect(
        &self, name: &str, side_car: &mut SideCar,
    ) -> Result<(String, Console, Qmp, OtherProcess), Error> {
        let said = side_car.wait_until_ready()?;
        let pid = said.split_once("QEMU ").and_then(|(_, rest)| rest.split(' ').next());
        let pid = pid.and_then(|pid| pid.parse().ok());
        let pid = pid.ok_or_else(|| Error::Mismatch(format!("no process in {said}")))?;
        let sockets = self.sockets(name)?;
        let (console, qmp) = (Console::connect(&sockets.console())?, Qmp::connect(&sockets.qmp())?);
        Ok((said, console, qmp, OtherProcess::open(pid)?))
    }
}

impl AttachedGuest {
    /// The agent of now. It is a child of the side-car.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn agent_process(&self) -> Result<OtherProcess, Error> {
        let status = self.agent.status()?;
        let pid = status["agent"]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        OtherProcess::open(pid.ok_or_else(|| Error::Mismatch(format!("no agent in {status}")))?)
    }

    /// Ends QEMU's connection to the side-car. Both live.
    ///
    /// # Errors
    /// If there is none.
    pub fn break_monitor(&self) -> Result<(), Error> {
        let path = format!("{}.qmp", self.agent.socket().display());
        self.qemu.end_connections_of(&path)
    }

    /// The files of the guest's memory.
    ///
    /// # Errors
    /// If QEMU has ended.
    pub fn memory(&self) -> Result<MemoryFiles, Error> {
        MemoryFiles::of(self.qemu.pid())
    }

    /// Starts `pageferry qemu attach` for this QEMU, whose side-car has ended, by the monitor that
    /// the side-car has left.
    ///
    /// # Errors
    /// If it refuses.
    pub fn attach(&mut self) -> Result<(), Error> {
        let socket = self.agent.socket().as_os_str();
        let mut monitor = socket.to_owned();
        monitor.push(".qmp");
        let pid = self.qemu.pid().to_string();
        let words: [OsString; 7] = [
            "attach".into(),
            "--socket".into(),
            socket.to_owned(),
            "--qmp".into(),
            monitor,
            "--pid".into(),
            pid.into(),
        ];
        let mut side_car = SideCar::spawn(&words)?;
        side_car.wait_until_ready()?;
        self.side_car = side_car;
        Ok(())
    }

    /// QEMU's run state, such as `running`.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn run_state(&mut self) -> Result<String, Error> {
        let status = self.qmp.execute("query-status", json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits until QEMU is in this run state.
    ///
    /// # Errors
    /// If it is not in time.
    pub fn wait_for_run_state(&mut self, state: &str) -> Result<(), Error> {
        wait_slowly(&format!("run state {state}"), || Ok(self.run_state()? == state))
    }

    /// Fails if the guest has found wrong content, or its kernel complained. The error says what.
    ///
    /// # Errors
    /// See above, or if the guest does not answer.
    pub fn verify(&mut self) -> Result<Status, Error> {
        let status = self.console.status()?;
        let Err(error) = status.verify() else { return Ok(status) };
        let bad = self.console.text("bad")?.join("\n");
        let log = self.console.text("dmesg")?.join("\n");
        Err(Error::Mismatch(format!("{}\n{bad}\n{log}", error.sentence())))
    }

    /// What side-car, QEMU, agent and the guest's kernel have printed.
    pub fn messages(&self) -> String {
        let kernel = std::fs::read(self.sockets.kernel_log()).unwrap_or_default();
        let kernel = String::from_utf8_lossy(&kernel);
        format!("pageferry said: {}\nthe kernel said: {kernel}", self.side_car.lines().join("\n"))
    }
}

impl Drop for AttachedGuest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: {}", self.agent.socket().display(), self.messages());
        }
        // Fails if it has ended. The side-car then ends, too, or is killed when it is dropped.
        let _ = self.qemu.signal(Signal::KILL);
    }
}
