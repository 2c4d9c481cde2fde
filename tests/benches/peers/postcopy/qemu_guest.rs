// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest under TCG whose boot sector touches pages and measures each touch itself. QEMU moves it
//! by postcopy with preemption, and pageferry does, beside unmodified QEMUs.
//!
//! An ordinary guest is not needed, and would not report how long it waited. This guest records
//! each touch that takes longer than any touch without a fault. The bench reads these records in
//! the file that is the guest's memory.

use super::super::image::Image;
use super::super::qemu::{Machine, free_port};
use super::super::qemu_guest::memory_of;
use super::super::table::median;
use super::Times;
use pageferry_tests::deadline::{wait_for, wait_until};
use pageferry_tests::linux_guest::{Operator, Qmp, SideCar};
use serde_json::json;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// A push that is held back, in bytes per second: practically none.
const TRICKLE: u64 = 1 << 20;
/// How long the guest touches pages while the push is held back.
const QUIET: Duration = Duration::from_secs(2);
/// Address of the guest's records: the number of slow touches, the number of touches, and the
/// clock. From byte 16 on: the slow touches, in ticks.
const NOTES: u64 = 0x10_0000;
/// Largest number of slow touches that it records.
const MOST: u32 = 65_000;
/// Bytes of a guest of which 256 MiB are touched, from 16 MiB on.
pub const SIZE: u64 = 512 << 20;

/// Touches of more ticks than this (13 us at 2.6 GHz) are recorded. Without faults one touch in ten
/// thousand takes longer.
#[rustfmt::skip]
const BOOT: [u8; 196] = [
    // 16 bit, at 0x7c00: no interrupts, flat segments, the A20 gate, protected mode.
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0,       // cli; xor ax, ax; mov ds, es, ss, ax
    0xbc, 0x00, 0x70, 0xe4, 0x92, 0x0c, 0x02, 0xe6, 0x92,       // mov sp, 0x7000; in al, 0x92; or al, 2; out 0x92, al
    0x0f, 0x01, 0x16, 0xc0, 0x7c,                               // lgdt [0x7cc0]
    0x0f, 0x20, 0xc0, 0x66, 0x83, 0xc8, 0x01, 0x0f, 0x22, 0xc0, // mov eax, cr0; or eax, 1; mov cr0, eax
    0xea, 0x26, 0x7c, 0x08, 0x00,                               // jmp 8:0x7c26
    // 32 bit.
    0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, // mov ax, 16; mov ds, es, ss, ax
    0xbc, 0x00, 0x70, 0x00, 0x00,                               // mov esp, 0x7000
    0xc7, 0x05, 0x00, 0x00, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, // mov dword [NOTES], 0
    0xc7, 0x05, 0x04, 0x00, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, // mov dword [NOTES + 4], 0
    0xbb, 0x39, 0x30, 0x00, 0x00,                               // mov ebx, 12345
    // next: at 0x7c4e
    0x69, 0xdb, 0x0d, 0x66, 0x19, 0x00,                         // imul ebx, ebx, 1664525
    0x81, 0xc3, 0x5f, 0xf3, 0x6e, 0x3c,                         // add ebx, 1013904223
    0x89, 0xde, 0xc1, 0xee, 0x04,                               // mov esi, ebx; shr esi, 4
    0x81, 0xe6, 0x00, 0xf0, 0xff, 0x0f,                         // and esi, 0x0ffff000
    0x81, 0xc6, 0x00, 0x00, 0x00, 0x01,                         // add esi, 16 MiB
    0x0f, 0x31, 0x89, 0xc7, 0x8b, 0x0e, 0x0f, 0x31, 0x29, 0xf8, // rdtsc; mov edi, eax; mov ecx, [esi]; rdtsc; sub eax, edi
    0x89, 0x3d, 0x08, 0x00, 0x10, 0x00,                         // mov [NOTES + 8], edi
    0xff, 0x05, 0x04, 0x00, 0x10, 0x00,                         // inc dword [NOTES + 4]
    0x3d, 0x00, 0x80, 0x00, 0x00, 0x72, 0xc6,                   // cmp eax, 32768; jb next
    0x8b, 0x15, 0x00, 0x00, 0x10, 0x00,                         // mov edx, [NOTES]
    0x81, 0xfa, 0xe8, 0xfd, 0x00, 0x00, 0x73, 0xb8,             // cmp edx, MOST; jae next
    0x89, 0x04, 0x95, 0x10, 0x00, 0x10, 0x00,                   // mov [NOTES + 16 + edx * 4], eax
    0xff, 0x05, 0x00, 0x00, 0x10, 0x00, 0xeb, 0xa9,             // inc dword [NOTES]; jmp next
    // The segments: none, code, memory; and where they are.
    0x8d, 0x76, 0x00, 0, 0, 0, 0, 0, 0, 0, 0,
    0xff, 0xff, 0x00, 0x00, 0x00, 0x9a, 0xcf, 0x00,
    0xff, 0xff, 0x00, 0x00, 0x00, 0x92, 0xcf, 0x00,
    0x17, 0x00, 0xa8, 0x7c,
];

/// The measurements of the guest.
#[derive(Debug)]
pub struct Moved {
    /// Its slow touches after the switch.
    pub times: Times,
    /// Pages that the destination requested, by its own count.
    pub requests: u64,
    /// Time until all memory was there.
    pub time: Duration,
}

/// The records of the guest.
struct Notes<'a>(&'a File);

impl Notes<'_> {
    fn word(&self, index: u64) -> u32 {
        let mut bytes = [0; 4];
        self.0.read_exact_at(&mut bytes, NOTES + index * 4).unwrap();
        u32::from_le_bytes(bytes)
    }

    fn touches(&self) -> u32 {
        self.word(1)
    }

    /// Ticks of the guest's clock in a microsecond. It is the median of several readings, because
    /// the guest may be paused during one of them.
    fn ticks(&self) -> f64 {
        let look = |_| {
            let (started, before) = (Instant::now(), self.word(2));
            std::thread::sleep(Duration::from_millis(200));
            f64::from(self.word(2).wrapping_sub(before)) / (started.elapsed().as_secs_f64() * 1e6)
        };
        median(&(0..7).map(look).collect::<Vec<_>>())
    }

    /// The slow touches from number `first` on.
    fn times(&self, first: u32, ticks: f64) -> Times {
        let mut times = Times::default();
        for index in first..self.word(0).min(MOST) {
            let took = f64::from(self.word(4 + u64::from(index)));
            times.push(Duration::from_secs_f64(took / ticks / 1e6));
        }
        times
    }
}

/// A disk that holds the boot sector.
fn boot_disk(path: &Path) -> String {
    let mut disk = vec![0; 1 << 20];
    disk[..BOOT.len()].copy_from_slice(&BOOT);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(path, disk).unwrap();
    format!("file={},format=raw,if=ide,file.locking=off", path.display())
}

/// Who moves the guest.
#[derive(Debug, Clone, Copy)]
pub enum Mover {
    /// QEMU itself.
    Qemu,
    /// `pageferry qemu`, with this many connections for pages that no fault waits for.
    Pageferry { streams: u16 },
}

impl fmt::Display for Mover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Qemu => f.write_str("QEMU"),
            Self::Pageferry { streams } => write!(f, "pageferry, {streams}"),
        }
    }
}

impl Mover {
    /// Moves the guest. With `quiet` its push is held back for a while.
    pub fn migrate(self, source: &Image, destination: &Image, quiet: bool) -> Moved {
        let folder = tempfile::tempdir().unwrap();
        let disk = boot_disk(&folder.path().join("disk"));
        match self {
            Self::Qemu => by_qemu(folder.path(), &disk, source, destination, quiet),
            Self::Pageferry { streams } => {
                by_pageferry(folder.path(), &disk, source, streams, quiet)
            }
        }
    }
}

/// Starts the guest. Returns the ticks of its clock in a microsecond, too.
fn start(folder: &Path, source: &Image, more: &[&str]) -> (Machine, f64) {
    let from = Machine::start(folder, "source", source, more);
    let notes = Notes(&source.file);
    wait_until("touches of QEMU's guest", PATIENCE, || notes.touches() > 100_000).unwrap();
    (from, notes.ticks())
}

fn by_qemu(folder: &Path, disk: &str, source: &Image, destination: &Image, quiet: bool) -> Moved {
    let incoming = ["-drive", disk, "-incoming", "defer"];
    let mut to = Machine::start(folder, "destination", destination, &incoming);
    let (mut from, ticks) = start(folder, source, &incoming[..2]);

    let on = |name| json!({ "capability": name, "state": true });
    for machine in [&mut to, &mut from] {
        let capabilities = [on("postcopy-ram"), on("postcopy-preempt")];
        machine.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }));
    }
    let held_back = if quiet { TRICKLE } else { 0 };
    from.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": TRICKLE, "max-postcopy-bandwidth": held_back }),
    );
    let address = json!({ "uri": format!("tcp:127.0.0.1:{}", free_port()) });
    to.execute("migrate-incoming", address.clone());
    from.execute("migrate", address);
    let reaches = |from: &mut Machine, wanted: &str| {
        wait_for(&format!("QEMU's migration being {wanted}"), PATIENCE, || {
            let status = from.execute("query-migrate", json!({}));
            assert!(status["status"] != "failed", "QEMU's migration failed: {status}");
            (status["status"] == wanted).then_some(status)
        })
        .unwrap()
    };
    reaches(&mut from, "active");
    let started = Instant::now();
    let before = Notes(&source.file).word(0);
    from.execute("migrate-start-postcopy", json!({}));
    if quiet {
        reaches(&mut from, "postcopy-active");
        std::thread::sleep(QUIET);
        to.execute("stop", json!({}));
        from.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 }));
    }
    let status = reaches(&mut from, "completed");
    let time = started.elapsed();
    to.execute("stop", json!({}));
    let times = Notes(&destination.file).times(before, ticks);
    Moved { times, requests: status["ram"]["postcopy-requests"].as_u64().unwrap_or_default(), time }
}

/// The source's QEMU is attached as it runs. The destination's memory is a file of ours.
fn by_pageferry(folder: &Path, disk: &str, source: &Image, streams: u16, quiet: bool) -> Moved {
    let file = |name: &str| folder.join(name);
    let monitor = |name: &str| format!("unix:{},server=on,wait=off", file(name).display());
    let address = format!("tcp:127.0.0.1:{}", free_port());
    let mut line: Vec<OsString> = vec!["receive".into(), "--socket".into(), file("to").into()];
    line.extend(["--listen", &address, "--"].map(OsString::from));
    line.extend(Machine::command_line(source.size, "memory-backend-ram").map(OsString::from));
    line.extend(["-qmp", &monitor("destination"), "-drive", disk].map(OsString::from));
    let mut receiver = SideCar::spawn(&line).unwrap();
    let said = receiver.wait_for_line("agent at").unwrap();
    let destination = memory_of(said.split(' ').skip_while(|word| *word != "QEMU").nth(1).unwrap());
    let mut to = Qmp::connect(&file("destination")).unwrap();

    let (from, ticks) = start(folder, source, &["-drive", disk, "-qmp", &monitor("for-pageferry")]);
    let line = ["attach".into(), "--socket".into(), file("from").into()];
    let line = [&line[..], &["--qmp".into(), file("for-pageferry").into()]].concat();
    let mut sender = SideCar::spawn(&line).unwrap();
    sender.wait_for_line("agent at").unwrap();

    let operator = Operator::new(file("from"));
    let (streams, held_back) = (streams.to_string(), if quiet { TRICKLE } else { 0 }.to_string());
    let options = ["--to", &address, "--mode", "postcopy", "--streams", &streams];
    let options = [&options[..], &["--bandwidth", &held_back]].concat();
    let before = Notes(&source.file).word(0);
    let started = Instant::now();
    let job = operator.start("migrate", &options).unwrap();
    if quiet {
        to.wait_for_event("RESUME").unwrap();
        std::thread::sleep(QUIET);
        to.execute("stop", json!({})).unwrap();
        operator.run("set", &["--bandwidth", "0"]).unwrap();
    }
    job.end().unwrap();
    let time = started.elapsed();
    let requests = Operator::new(file("to")).status().unwrap();
    let requests = requests["requested_pages"].as_u64().unwrap_or_default();
    if !quiet {
        to.execute("stop", json!({})).unwrap();
    }
    let times = Notes(&destination).times(before, ticks);
    drop(from);
    // QEMU ends first, and then what serves it.
    to.execute("quit", json!({})).unwrap();
    receiver.wait().unwrap();
    sender.wait().unwrap();
    Moved { times, requests, time }
}
