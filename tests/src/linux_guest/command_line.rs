// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line of a QEMU for a Linux guest.
//!
//! The guest runs under TCG: KVM of a nested host does not always boot Linux, and a test must not
//! depend on that. Its devices are those that write guest memory or give it back: virtio-net,
//! virtio-blk, a balloon with free page reporting, virtio-mem.

use super::{QemuTools, QemuVersion};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Options of the kernel for a fast start under TCG. With them and a model of few features the
/// guest answers after 4.3 seconds of a host's processor; without them, and with `-cpu max`, after
/// 6.
///
/// `tsc=reliable` and `no_timer_check` skip checks that fail on a busy host. The guest needs no
/// self-tests of ciphers, no probes of the tracer and no mitigations. Without `swiotlb=noforce` a
/// guest of 256 MiB that can be plugged memory above 4 GiB reserves 64 MiB for bounce buffers.
/// Memory of virtio-mem must go online by itself, and must be movable, so that it can be unplugged.
const APPEND: &str = "console=ttyS0 quiet panic=-1 nokaslr mitigations=off swiotlb=noforce \
    no_timer_check tsc=reliable clocksource=tsc random.trust_cpu=on audit=0 cryptomgr.notests \
    noreplace-smp initcall_blacklist=init_kprobe_trace memhp_default_state=online_movable";

/// Who describes the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestMemory {
    /// `-m` alone: QEMU allocates it, and no other process can map it.
    Private,
    /// `-m`, and this value of `-object` for a backend with the id `ram0`, for example
    /// `memory-backend-file,id=ram0,size=256M,mem-path=/dev/shm/ram,share=on`.
    Backend(String),
    /// No option at all: another program adds them, with `-m`.
    LeftOut,
}

/// A virtio-mem device with the id `vm0`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtioMem {
    /// Its size in bytes.
    pub size: u64,
    /// How much of it the guest gets at first. The QOM property `requested-size` changes it.
    pub requested: u64,
    /// The value of `-object` for its backend with the id `vmem0`. Without one, QEMU allocates it.
    pub backend: Option<String>,
}

/// A guest, and the options that start it.
#[derive(Debug, Clone)]
pub struct LinuxGuest {
    /// Memory at start, in bytes. The guest needs 128 MiB.
    pub memory_size: u64,
    /// Who describes this memory.
    pub memory: GuestMemory,
    /// The number of vCPUs. Each is a thread.
    pub vcpus: u32,
    /// The machine, for example `pc` or `q35`.
    pub machine: String,
    /// The model of the vCPUs. A model with few features boots faster under TCG.
    pub cpu: String,
    /// A file for `/dev/vda`, in raw format. Both sides of a migration open the same.
    pub disk: Option<PathBuf>,
    /// The disk bypasses the page cache of the host.
    pub is_disk_direct: bool,
    /// True if it has a network.
    pub net: bool,
    /// True if it has a balloon with the id `balloon0`, and reports free pages by it.
    pub balloon: bool,
    /// Memory that can be plugged and unplugged.
    pub virtio_mem: Option<VirtioMem>,
    /// The value of `-incoming`, for example `defer`. Such a QEMU waits for a migration.
    pub incoming: Option<String>,
    /// More arguments of the kernel.
    pub append: String,
    /// More options, at the end.
    pub more: Vec<OsString>,
}

impl LinuxGuest {
    /// A guest of one vCPU and this many bytes of memory, with a network and a balloon, and without
    /// a disk and virtio-mem.
    pub fn new(memory_size: u64) -> Self {
        Self {
            memory_size,
            memory: GuestMemory::Private,
            vcpus: 1,
            machine: "pc".to_owned(),
            cpu: "qemu64".to_owned(),
            disk: None,
            is_disk_direct: false,
            net: true,
            balloon: true,
            virtio_mem: None,
            incoming: None,
            append: String::new(),
            more: Vec::new(),
        }
    }

    /// The program and its options. QEMU creates `sockets`.
    pub fn command_line(
        &self, tools: &QemuTools, version: QemuVersion, sockets: &Sockets,
    ) -> Vec<OsString> {
        let mut line = Line(vec![tools.qemu(version).into()]);
        line.option("-nodefaults").option("-no-user-config").option("-no-reboot");
        line.with("-display", "none").with("-accel", "tcg,thread=multi");
        line.with("-cpu", &self.cpu).with("-smp", self.vcpus.to_string());
        self.memory(&mut line);
        line.with("-kernel", tools.kernel()).with("-initrd", tools.initrd());
        line.with("-append", format!("{APPEND} {}", self.append));
        // The kernel's messages go to a file, so that they never mix with the answers.
        line.value("-chardev", "file,id=kernel,path=", &sockets.kernel_log());
        line.with("-serial", "chardev:kernel");
        line.value("-chardev", "socket,id=console,server=on,wait=off,path=", &sockets.console());
        line.with("-serial", "chardev:console");
        line.value("-chardev", "socket,id=qmp,server=on,wait=off,path=", &sockets.qmp());
        line.with("-mon", "chardev=qmp,mode=control");
        self.devices(&mut line);
        if let Some(from) = &self.incoming {
            line.with("-incoming", from);
        }
        line.0.extend(self.more.iter().cloned());
        line.0
    }

    fn memory(&self, line: &mut Line) {
        let mut size = format!("{}k", self.memory_size >> 10);
        if let Some(plug) = &self.virtio_mem {
            size += &format!(",maxmem={}k", (self.memory_size + plug.size) >> 10);
        }
        match &self.memory {
            GuestMemory::Private => {
                line.with("-machine", &self.machine).with("-m", size);
            }
            GuestMemory::Backend(object) => {
                line.with("-machine", format!("{},memory-backend=ram0", self.machine));
                line.with("-m", size).with("-object", object);
            }
            GuestMemory::LeftOut => {
                line.with("-machine", &self.machine);
            }
        }
    }

    fn devices(&self, line: &mut Line) {
        if self.net {
            // No boot from the network: its ROM would only cost time.
            line.with("-netdev", "user,id=net0");
            line.with("-device", "virtio-net-pci,id=nic0,netdev=net0,romfile=");
        }
        if let Some(disk) = &self.disk {
            let cache = if self.is_disk_direct { "none" } else { "writeback" };
            let drive = format!("if=none,id=disk0,format=raw,cache={cache},file=");
            line.value("-drive", &drive, disk);
            line.with("-device", "virtio-blk-pci,id=vda,drive=disk0");
        }
        if self.balloon {
            line.with("-device", "virtio-balloon-pci,id=balloon0,free-page-reporting=on");
        }
        if let Some(plug) = &self.virtio_mem {
            let ram = || format!("memory-backend-ram,id=vmem0,size={}", plug.size);
            line.with("-object", plug.backend.clone().unwrap_or_else(ram));
            let requested = plug.requested;
            let device = format!("virtio-mem-pci,id=vm0,memdev=vmem0,requested-size={requested}");
            line.with("-device", device);
        }
    }
}

struct Line(Vec<OsString>);

impl Line {
    fn option(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    fn with(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.option(name).0.push(value.into());
        self
    }

    /// An option whose value ends in a path. In QEMU's options, a comma in a value is doubled.
    fn value(&mut self, name: &str, before: &str, path: &Path) -> &mut Self {
        self.with(name, format!("{before}{}", path.display().to_string().replace(',', ",,")))
    }
}

/// The files of one QEMU, in a folder of its own. Its path must be short: that of a socket has at
/// most 107 bytes.
#[derive(Debug, Clone)]
pub struct Sockets {
    folder: PathBuf,
}

impl Sockets {
    /// The files of the QEMU `name` in `folder`.
    pub fn new(folder: &Path, name: &str) -> Self {
        Self { folder: folder.join(name) }
    }

    /// Creates the folder.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn create(&self) -> Result<(), crate::Error> {
        let what = format!("create {}", self.folder.display());
        std::fs::create_dir_all(&self.folder).map_err(crate::Error::io(what))
    }

    /// The UNIX socket of the program in the guest, for a [`Console`](super::Console).
    pub fn console(&self) -> PathBuf {
        self.folder.join("console")
    }

    /// The UNIX socket of QEMU's monitor, for a [`Qmp`](super::Qmp).
    pub fn qmp(&self) -> PathBuf {
        self.folder.join("qmp")
    }

    /// The messages of firmware and kernel.
    pub fn kernel_log(&self) -> PathBuf {
        self.folder.join("kernel.log")
    }
}
