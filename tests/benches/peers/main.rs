// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! pageferry compared with its alternatives: QEMU, and the simplest program that copies the same
//! bytes.
//!
//! `cargo bench -p pageferry-tests --bench peers` runs everything and prints one table; `-- --help`
//! lists the options. The programs that are compared run interleaved, on the same images, to memory
//! that was touched and punched before. The figures are medians. Only ratios count.
//!
//! - [`table`]: the figures, and how they are printed;
//! - [`image`]: guest memory as a file, prepared once for all programs;
//! - [`ours`], [`qemu`], [`floor`]: the programs that move it;
//! - [`copying`]: full, sparse and huge guests;
//! - [`arrived`]: how fast a guest runs that has arrived;
//! - [`compression`]: a guest with compressible memory;
//! - [`tls`]: the same streams in plain text and over TLS;
//! - [`live`]: a guest that writes while it migrates; [`tracking`]: what its trackers cost it;
//! - [`postcopy`]: a guest that runs before its memory is there;
//! - [`snapshots`]: a guest that is saved to a file, and may keep running;
//! - [`qemu_guest`]: a Linux guest that moves between unmodified QEMUs;
//! - [`bitmaps`]: marking, harvesting and walking;
//! - [`discards`]: how fast discards are acknowledged;
//! - [`devices`]: how fast a guest gives memory back by the agent's balloon;
//! - [`codec`]: zero scan, checksum and records; an idle agent;
//! - [`cores`]: many workers, and how long they wait for the agent's own locks.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub
)]

mod arrived;
mod bitmaps;
mod codec;
mod compression;
mod copying;
mod cores;
mod devices;
mod discards;
mod floor;
mod image;
mod live;
mod ours;
mod postcopy;
mod qemu;
mod qemu_guest;
mod snapshots;
mod table;
mod tls;
mod tracking;

use clap::Parser;
use std::path::PathBuf;
use table::Table;

/// Compares pageferry with its peers.
#[derive(Debug, Parser)]
#[command(name = "peers", max_term_width = 100)]
struct Cli {
    /// Run only these parts, separated by commas: full, arrived, compression, tls, sparse, huge,
    /// live, tracking, postcopy, snapshots, bitmaps, discards, queued, devices, bytes, cores,
    /// qemu-guest.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Rounds of each comparison; the figures are medians.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Where guest memory lies: a folder on tmpfs with room for two guests of 8 GiB.
    #[arg(long, default_value = "/dev/shm")]
    folder: PathBuf,
    /// Where `snapshots` writes images: a folder on a disk with 10 GiB free.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    disk: PathBuf,
    /// In `snapshots`, do only these: save, save-tmpfs, save-sparse, pause, pause-sparse,
    /// linux-guest, restore, restore-lazy, restore-deaths.
    #[arg(long, value_delimiter = ',')]
    snapshots: Vec<String>,
    /// In `pause` of `snapshots`, the sizes of the guest in MiB.
    #[arg(long, value_delimiter = ',', default_value = "256,1024,2048,4096")]
    sizes: Vec<u64>,
    /// In `snapshots`, measure the agents of these builds of pageferry-test-process, too.
    #[arg(long, value_delimiter = ',')]
    other: Vec<PathBuf>,
    /// Write the table as JSON to this file, too.
    #[arg(long)]
    json: Option<PathBuf>,
    /// In `qemu-guest`, move only these guests: idle, writes, balloon, writes-20k, writes-200k.
    #[arg(long, value_delimiter = ',')]
    guests: Vec<String>,
    /// In `qemu-guest`, the versions of QEMU: 10.0, 11.1.
    #[arg(long, value_delimiter = ',', default_value = "10.0")]
    qemu_versions: Vec<String>,
    /// In `full`, `snapshots` and `qemu-guest`, run only these: pageferry, floor, qemu.
    #[arg(long, value_delimiter = ',', default_value = "pageferry,floor,qemu")]
    who: Vec<String>,
    /// In `full` and `tls`, numbers of streams and sockets.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4")]
    streams: Vec<u16>,
    /// Leave QEMU out even if it is installed.
    #[arg(long)]
    no_qemu: bool,
    /// Given by `cargo bench`. Without it everything is tiny, and `live`, `tracking` and
    /// `qemu-guest` are left out: this only tests that the bench works.
    #[arg(long, hide = true)]
    bench: bool,
    /// Be the other process of `postcopy`'s floor, which gets its instructions over this socket.
    #[arg(long, hide = true)]
    answer: Option<PathBuf>,
}

/// Settings for all parts.
pub struct Bench {
    /// Where guest memory lies.
    pub folder: PathBuf,
    /// Where images are written.
    pub disk: PathBuf,
    /// The parts of `snapshots` to run. All of them if none is named.
    pub snapshots: Vec<String>,
    /// The sizes of the guest in `pause`, in MiB.
    pub sizes: Vec<u64>,
    /// Other builds of the agent.
    pub other: Vec<PathBuf>,
    /// Rounds of each comparison.
    pub rounds: usize,
    /// Sizes are divided by this.
    pub shrink: u64,
    /// QEMU, if it is installed.
    pub qemu: Option<qemu::Qemu>,
    /// The guests of `qemu-guest`. All of them if none is named.
    pub guests: Vec<String>,
    /// The versions of QEMU in `qemu-guest`.
    pub qemu_versions: Vec<String>,
    /// The programs that run in `full`, `snapshots` and `qemu-guest`.
    pub who: Vec<String>,
    /// Numbers of streams in `full` and `tls`.
    pub streams: Vec<u16>,
}

type Part = fn(&Bench, &mut Table);

fn main() {
    let cli = Cli::parse();
    if let Some(control) = &cli.answer {
        return postcopy::floor::answer(control);
    }
    let parts: [(&str, Part); 17] = [
        ("full", copying::full),
        ("arrived", arrived::arrived),
        ("compression", compression::compression),
        ("tls", tls::tls),
        ("sparse", copying::sparse),
        ("huge", copying::huge),
        ("bitmaps", bitmaps::bitmaps),
        ("discards", discards::discards),
        ("queued", discards::queued),
        ("devices", devices::devices),
        ("bytes", codec::codec),
        ("cores", cores::cores),
        ("postcopy", postcopy::postcopy),
        ("snapshots", snapshots::snapshots),
        ("live", live::live),
        ("tracking", tracking::tracking),
        ("qemu-guest", qemu_guest::qemu_guest),
    ];
    check("only", &cli.only, &parts.map(|(name, _)| name));
    check("snapshots", &cli.snapshots, &snapshots::PARTS.map(|(name, _)| name));
    check("guests", &cli.guests, &qemu_guest::names());
    check("qemu-versions", &cli.qemu_versions, &qemu_guest::versions());
    let qemu = if cli.no_qemu || !cli.bench { None } else { qemu::Qemu::find() };
    let bench = Bench {
        folder: cli.folder,
        disk: cli.disk,
        snapshots: cli.snapshots,
        sizes: cli.sizes,
        other: cli.other,
        rounds: if cli.bench { cli.rounds } else { 1 },
        shrink: if cli.bench { 1 } else { 128 },
        qemu,
        guests: cli.guests,
        qemu_versions: cli.qemu_versions,
        who: cli.who,
        streams: cli.streams,
    };
    let mut table = Table::default();
    table.note(machine());
    table.note(
        bench
            .qemu
            .as_ref()
            .map_or("skipped: no qemu-system-x86_64".to_owned(), |qemu| qemu.version.clone()),
    );
    for (name, part) in parts {
        // A test is short, but writers need their time, and Linux boots slowly.
        let wanted = if cli.only.is_empty() {
            cli.bench || !matches!(name, "live" | "tracking" | "qemu-guest")
        } else {
            cli.only.iter().any(|only| only == name)
        };
        if wanted {
            eprintln!("{name} ...");
            part(&bench, &mut table);
        }
    }
    println!("{}", table.markdown());
    if let Some(path) = cli.json {
        std::fs::write(&path, table.json())
            .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    }
}

/// Ends the program if one of the `wanted` names does not exist.
fn check(flag: &str, wanted: &[String], known: &[impl AsRef<str>]) {
    let known: Vec<&str> = known.iter().map(AsRef::as_ref).collect();
    if let Some(unknown) = wanted.iter().find(|name| !known.contains(&name.as_str())) {
        eprintln!("--{flag} {unknown}: write {}", known.join(", "));
        std::process::exit(2);
    }
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    format!(
        "{cores} cores ({}), Linux {}",
        model.trim_start_matches([' ', '\t', ':']),
        release.trim()
    )
}
