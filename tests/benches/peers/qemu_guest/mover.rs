// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The programs that move a guest.

use super::super::qemu::{free_port, unlimited};
use super::host::Host;
use super::{capability, with_memory};
use pageferry_tests::deadline::wait_for;
use pageferry_tests::linux_guest::{GuestMemory, LinuxGuest, QemuTools, QemuVersion, Sockets};
use pageferry_tests::process::{Process, program};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fmt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(120);
/// Milliseconds; the default of both programs.
const DOWNTIME_LIMIT: u64 = 300;

/// A program that moves guests. None has a limit of the bandwidth.
#[derive(Debug, Clone, Copy)]
pub enum Mover {
    /// `pageferry qemu run` and `receive` beside the QEMUs, and `pageferry migrate`.
    Pageferry {
        /// Connections for pages.
        streams: u16,
    },
    /// QEMU's own precopy.
    Qemu {
        /// Channels of multifd. 0 is without multifd.
        channels: u32,
    },
}

/// What a program says about a migration.
pub struct Sent {
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// More figures, for people.
    pub remark: String,
}

impl fmt::Display for Mover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pageferry { streams } => write!(f, "pageferry, {streams}"),
            Self::Qemu { channels: 0 } => f.write_str("QEMU"),
            Self::Qemu { channels } => write!(f, "QEMU, multifd {channels}"),
        }
    }
}

impl Mover {
    /// Its name in `--who`.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Pageferry { .. } => "pageferry",
            Self::Qemu { .. } => "qemu",
        }
    }

    /// Starts a QEMU with a guest.
    pub fn boot(self, tools: &QemuTools, version: QemuVersion, guest: &LinuxGuest) -> Host {
        match self {
            Self::Pageferry { .. } => Host::with_agent(|agent, sockets| {
                beside("run", agent, &[], guest.command_line(tools, version, sockets))
            }),
            Self::Qemu { .. } => Host::alone(guest.memory_size, |backend, sockets| {
                let guest = with_memory(guest, GuestMemory::Backend(backend));
                guest.command_line(tools, version, sockets)
            }),
        }
    }

    /// Starts a QEMU for a guest that comes.
    pub fn receive(self, tools: &QemuTools, version: QemuVersion, guest: &LinuxGuest) -> Host {
        let address = format!("tcp:127.0.0.1:{}", free_port());
        let mut host = match self {
            Self::Pageferry { .. } => Host::with_agent(|agent, sockets: &Sockets| {
                let line = guest.command_line(tools, version, sockets);
                beside("receive", agent, &["--listen", &address], line)
            }),
            Self::Qemu { channels } => {
                let mut host = Host::alone(guest.memory_size, |backend, sockets| {
                    let guest = LinuxGuest {
                        incoming: Some("defer".to_owned()),
                        ..with_memory(guest, GuestMemory::Backend(backend))
                    };
                    guest.command_line(tools, version, sockets)
                });
                set_up(&mut host, channels);
                let uri = json!({ "uri": address });
                host.running.qmp.execute("migrate-incoming", uri).unwrap();
                host
            }
        };
        host.address = address;
        host
    }

    /// Moves the guest, and returns when the source knows that it has left.
    pub fn migrate(self, from: &mut Host, to: &mut Host) -> Sent {
        match self {
            Self::Pageferry { streams } => by_pageferry(from, &to.address, streams),
            Self::Qemu { channels } => {
                set_up(from, channels);
                by_qemu(from, &to.address)
            }
        }
    }
}

/// The command line of `pageferry qemu`.
fn beside(command: &str, agent: &Path, options: &[&str], qemu: Vec<OsString>) -> Vec<OsString> {
    let mut line: Vec<OsString> = vec![program().into(), "qemu".into(), command.into()];
    line.extend(["--socket".into(), agent.into()]);
    line.extend(options.iter().map(OsString::from));
    line.push("--".into());
    line.extend(qemu);
    line
}

fn by_pageferry(from: &Host, address: &str, streams: u16) -> Sent {
    let mut command = Command::new(program());
    command.args(["migrate", "--json", "--to", address, "--streams", &streams.to_string()]);
    command.args(["--downtime-limit", &format!("{DOWNTIME_LIMIT}ms")]);
    command.arg("--socket").arg(from.agent.as_ref().unwrap());
    let mut process = Process::spawn("pageferry migrate", &mut command).unwrap();
    let exit = process.wait(PATIENCE).unwrap();
    let lines = process.lines();
    assert!(exit.success(), "{exit}: {lines:?}");
    let last: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    let number = |name: &str| last[name].as_u64().unwrap();
    let remark = format!(
        "{} passes, {} pages sent, {} of zeroes, downtime {:.1} ms by the agent",
        number("passes"),
        number("pages_sent"),
        number("zero_pages"),
        number("downtime_us") as f64 / 1e3
    );
    Sent { wire_bytes: number("wire_bytes"), remark }
}

fn set_up(host: &mut Host, channels: u32) {
    let qmp = &mut host.running.qmp;
    qmp.execute("migrate-set-capabilities", capability("multifd", channels > 0)).unwrap();
    let mut parameters = unlimited();
    parameters["downtime-limit"] = json!(DOWNTIME_LIMIT);
    if channels > 0 {
        parameters["multifd-channels"] = json!(channels);
    }
    qmp.execute("migrate-set-parameters", parameters).unwrap();
}

fn by_qemu(from: &mut Host, address: &str) -> Sent {
    from.running.qmp.execute("migrate", json!({ "uri": address })).unwrap();
    let status = wait_for("QEMU's migration", PATIENCE, || {
        let status = from.execute("query-migrate");
        match status["status"].as_str() {
            Some("completed") => Some(status),
            Some("failed" | "cancelled") => panic!("QEMU's migration failed: {status}"),
            _ => None,
        }
    });
    let status = status.unwrap();
    let ram = |name: &str| status["ram"][name].as_u64().unwrap_or_default();
    let remark = format!(
        "{} passes, {} pages sent, {} of zeroes, downtime {} ms by QEMU",
        ram("dirty-sync-count"),
        ram("normal"),
        ram("duplicate"),
        status["downtime"]
    );
    Sent { wire_bytes: ram("transferred"), remark }
}
