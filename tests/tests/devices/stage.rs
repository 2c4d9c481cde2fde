// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest of QEMU whose memory an agent has, as if QEMU were a VMM that knows of it, and whose
//! device the agent is.

use pageferry_client::{BlockSpec, Client, Config};
use pageferry_tests::files::Still;
use pageferry_tests::linux_guest::{GuestMemory, LinuxGuest, Operator, QemuVersion, RunningGuest};
use pageferry_tests::linux_guest::{QemuTools, Sockets};
use pageferry_tests::process::{AgentProcess, program};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
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
    pub pluggable: File,
    folder: TempDir,
}

/// A device of the agent.
pub struct Device {
    /// The options of the agent: the path of the socket follows the first.
    pub options: &'static [&'static str],
    /// The options of the front-end.
    pub front_end: &'static str,
    /// Bytes of memory at [`PLUGGABLE`] that the guest gets only by the device.
    pub pluggable: u64,
}

/// Guest physical address of the memory that can be plugged: where QEMU puts a DIMM if the guest
/// has less than 3 GiB.
pub const PLUGGABLE: u64 = 4 << 30;
/// The name of its block.
pub const PLUGGABLE_NAME: &str = "pluggable";

impl Stage {
    /// Boots a guest with this device.
    pub fn boot(tools: &QemuTools, device: &Device, size: u64, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ram = Path::new("/dev/shm").join(folder.path().file_name().unwrap());
        let dimm = ram.with_extension("dimm");
        let [memory, pluggable] = [(&ram, size), (&dimm, device.pluggable)].map(|(path, size)| {
            let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
            file.set_len(size).unwrap();
            file
        });
        let (agent, operator, client) = attach(folder.path(), device, &memory, &pluggable);
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
        if device.pluggable > 0 {
            let (maximum, size) = ((size + device.pluggable) / MIB, device.pluggable / MIB);
            let memory = format!("slots=1,maxmem={maximum}M");
            let backend = format!(
                "memory-backend-file,id=dimm0,size={size}M,mem-path={},share=on",
                dimm.display()
            );
            let dimm = "pc-dimm,id=dimm,memdev=dimm0";
            options
                .extend(["-m", &memory, "-object", &backend, "-device", dimm].map(OsString::from));
        }
        options.extend(more.iter().map(OsString::from));
        let guest = LinuxGuest {
            memory: GuestMemory::Backend(backend),
            balloon: false,
            net: false,
            // Otherwise the guest uses the DIMM by itself.
            append: "acpi_no_memhotplug".to_owned(),
            more: options,
            ..LinuxGuest::new(size)
        };
        let line = guest.command_line(tools, QemuVersion::V11_1, &sockets);
        let mut guest = RunningGuest::start(&line, sockets).unwrap();
        guest.wait_until_ready().unwrap();
        // QEMU has it, and so has this test.
        std::fs::remove_file(&ram).unwrap();
        std::fs::remove_file(&dimm).unwrap();
        Self { guest, agent, operator, client, memory, pluggable, folder }
    }

    /// Kills the agent, and attaches another one.
    pub fn replace_agent(&mut self, device: &Device) {
        self.agent.process().kill().unwrap();
        (self.agent, self.operator, self.client) =
            attach(self.folder.path(), device, &self.memory, &self.pluggable);
    }

    /// Bytes of memory that the host has for the guest.
    pub fn allocated(&self) -> u64 {
        allocated(&self.memory)
    }
}

/// Bytes that a file takes.
pub fn allocated(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

fn attach(
    folder: &Path, device: &Device, memory: &File, pluggable: &File,
) -> (AgentProcess, Operator, Client) {
    let socket: PathBuf = folder.join("device");
    let mut options = device.options.to_vec();
    options.insert(1, socket.to_str().unwrap());
    let agent =
        AgentProcess::start_with(&mut Command::new(program()), folder, "agent", &options).unwrap();
    let (client, channel) = Client::connect(agent.socket(), Config::default()).unwrap();
    let size = memory.metadata().unwrap().len();
    Still::hand_over(&client, channel, memory, size).unwrap();
    if device.pluggable > 0 {
        let block = BlockSpec {
            id: 1,
            name: PLUGGABLE_NAME,
            gpa: PLUGGABLE,
            length: device.pluggable,
            memory: pluggable.as_fd(),
            fd_offset: 0,
            vmm_address: 0,
            granularity: 4096,
            discarded: true,
        };
        client.add_block(block).unwrap();
    }
    let operator = Operator::new(agent.socket().to_owned());
    (agent, operator, client)
}
