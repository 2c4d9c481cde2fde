// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest of QEMU whose memory an agent has, as if QEMU were a VMM that knows of it, and whose
//! device the agent is.

use pageferry_client::{Client, Config};
use pageferry_tests::files::Still;
use pageferry_tests::linux_guest::{GuestMemory, LinuxGuest, Operator, QemuVersion, RunningGuest};
use pageferry_tests::linux_guest::{QemuTools, Sockets};
use pageferry_tests::process::{AgentProcess, program};
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;

pub struct Stage {
    pub guest: RunningGuest,
    pub agent: AgentProcess,
    pub operator: Operator,
    pub client: Client,
    pub memory: File,
    folder: TempDir,
}

/// A device of the agent: the option of the agent, its id, and the rest of the front-end's options.
pub struct Device {
    pub option: &'static str,
    pub front_end: &'static str,
}

impl Stage {
    /// Boots a guest with this device.
    pub fn boot(tools: &QemuTools, device: &Device, size: u64, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ram = Path::new("/dev/shm").join(folder.path().file_name().unwrap());
        let memory = File::options().read(true).write(true).create_new(true).open(&ram).unwrap();
        memory.set_len(size).unwrap();
        let (agent, operator, client) = attach(folder.path(), device, &memory, size);
        let sockets = Sockets::new(folder.path(), "qemu");
        sockets.create().unwrap();
        let backend = format!(
            "memory-backend-file,id=ram0,size={}M,mem-path={},share=on",
            size / MIB,
            ram.display()
        );
        let socket = folder.path().join("device");
        let chardev = format!("socket,id=device,path={}", socket.display());
        let front_end = format!("vhost-user-test-device-pci,chardev=device,{}", device.front_end);
        let mut options: Vec<OsString> =
            ["-chardev", &chardev, "-device", &front_end].map(OsString::from).into();
        options.extend(more.iter().map(OsString::from));
        let guest = LinuxGuest {
            memory: GuestMemory::Backend(backend),
            balloon: false,
            net: false,
            more: options,
            ..LinuxGuest::new(size)
        };
        let line = guest.command_line(tools, QemuVersion::V11_1, &sockets);
        let mut guest = RunningGuest::start(&line, sockets).unwrap();
        guest.wait_until_ready().unwrap();
        // QEMU has it, and so has this test.
        std::fs::remove_file(&ram).unwrap();
        Self { guest, agent, operator, client, memory, folder }
    }

    /// Kills the agent, and attaches another one.
    pub fn replace_agent(&mut self, device: &Device) {
        self.agent.process().kill().unwrap();
        let size = self.memory.metadata().unwrap().len();
        (self.agent, self.operator, self.client) =
            attach(self.folder.path(), device, &self.memory, size);
    }

    /// Bytes of memory that the host has for the guest.
    pub fn allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.memory.metadata().unwrap().blocks() * 512
    }
}

fn attach(
    folder: &Path, device: &Device, memory: &File, size: u64,
) -> (AgentProcess, Operator, Client) {
    let socket: PathBuf = folder.join("device");
    let options = [device.option, socket.to_str().unwrap()];
    let agent =
        AgentProcess::start_with(&mut Command::new(program()), folder, "agent", &options).unwrap();
    let (client, channel) = Client::connect(agent.socket(), Config::default()).unwrap();
    Still::hand_over(&client, channel, memory, size).unwrap();
    let operator = Operator::new(agent.socket().to_owned());
    (agent, operator, client)
}
