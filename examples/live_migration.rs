// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrates a running guest from one VMM to another: two agents and two VMMs, each in its own
//! process.
//!
//! `cargo run --release --example live_migration`
//!
//! The guest has 1 GiB of memory. It writes to one part of it all the time, another part has
//! content that does not change, and the rest was never touched. The guest gives back 128 MiB
//! before the migration, and 64 MiB while it runs. Afterwards the program checks the result. The
//! exit status is 0 only if all of it is right.
#![allow(clippy::print_stdout)]

use clap::{Parser, Subcommand};
use pageferry_client::{
    BlockRange, IncomingOptions, Mode, NonConvergence, OutgoingOptions, Phase, Punch,
};
use pageferry_examples::counting::{BUSY, COUNTING, Expected, RAM, SEED, SIZE, mebibytes};
use pageferry_examples::show::{MIB, in_folder, mib, number, pages, program, report_of, time};
use pageferry_examples::table::Table;
use pageferry_protocol::memory::{PageRange, pages_in};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_tests::Error;
use pageferry_tests::guest::kvm::FIRMWARE_PAGES;
use pageferry_tests::memory::{Backing, BlockLayout, TestMemory};
use pageferry_tests::mock_vmm::report::{Report, watch};
use pageferry_tests::process::{AgentProcess, Process};
use pageferry_tests::usage::Usage;
use pageferry_tests::verify::{Compared, same_block};
use pageferry_tests::vmm::{MockVmm, PATIENCE, Tracker};
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Content that does not change. The pages after it were never touched.
const STILL: PageRange = mebibytes(32, 704);
/// Given back before the migration.
const BEFORE: PageRange = mebibytes(256, 128);
/// Given back during the migration.
const DURING: PageRange = mebibytes(512, 64);

/// Migrates a running guest of 1 GiB between two VMMs, and checks that it arrived.
#[derive(Debug, Parser)]
#[command(name = "live_migration")]
struct Cli {
    /// What moves first. precopy: the memory. postcopy: the guest. hybrid: the memory for two
    /// passes, then the guest.
    #[arg(long, value_name = "MODE", default_value = "precopy", value_parser = parse_mode)]
    mode: Mode,
    #[command(subcommand)]
    process: Option<Role>,
}

/// The role of this program in each process that it starts.
#[derive(Debug, Subcommand)]
enum Role {
    #[command(hide = true)]
    Source {
        socket: PathBuf,
        memory: PathBuf,
        to: String,
        #[arg(value_parser = parse_mode)]
        mode: Mode,
    },
    #[command(hide = true)]
    Destination { socket: PathBuf, memory: PathBuf, listen: String },
}

fn main() -> ExitCode {
    program(|| {
        let cli = Cli::parse();
        match cli.process {
            None => show(cli.mode),
            Some(Role::Source { socket, memory, to, mode }) => {
                source(&socket, &memory, &to, mode).map(|report| println!("{report}"))
            }
            Some(Role::Destination { socket, memory, listen }) => {
                destination(&socket, &memory, &listen).map(|report| println!("{report}"))
            }
        }
    })
}

/// Starts everything, waits, checks, and shows what happened.
fn show(mode: Mode) -> Result<(), Error> {
    let (here, there) = (guest_memory()?, guest_memory()?);
    println!(
        "preparing a guest of {} MiB, {} MiB of them with content",
        SIZE / MIB,
        STILL.bytes() / MIB
    );
    here.block(RAM)?.fill(STILL, SEED)?;
    let before = here.allocated()?;

    let [source, destination] =
        in_folder(|program, folder| migrate(program, folder, &here, &there, mode))?;
    table(&source, before, &here, &there)?;
    if mode.may_postcopy() {
        print!("{}", faults(&destination));
    }
    let compared = check(&here, &there)?;
    if destination["kvm"] == true {
        went_on(COUNTING.first(&here)?, COUNTING.first(&there)?)?;
    }
    println!("checked: {} pages are the same at the destination", compared.equal);
    println!(
        "checked: {} discarded pages are holes there, and nothing more is allocated than here",
        compared.discarded
    );
    println!("checked: {}", destination["guest"].as_str().unwrap_or_default());
    Ok(())
}

/// A memfd that the other processes open by a path.
fn guest_memory() -> Result<TestMemory, Error> {
    TestMemory::ram(SIZE)
}

fn path_of(memory: &TestMemory) -> Result<PathBuf, Error> {
    let fd = memory.block(RAM)?.file().as_raw_fd();
    Ok(format!("/proc/{}/fd/{fd}", std::process::id()).into())
}

/// Runs two agents, two VMMs and one migration. Returns the reports of the two VMMs.
fn migrate(
    program: &Path, directory: &Path, here: &TestMemory, there: &TestMemory, mode: Mode,
) -> Result<[Value; 2], Error> {
    let agents = [
        AgentProcess::spawn(program.as_os_str(), directory, "source-agent")?,
        AgentProcess::spawn(program.as_os_str(), directory, "destination-agent")?,
    ];
    let vmm = |role: &str, agent: &AgentProcess, memory: &TestMemory, address: &str| {
        let mut command = Command::new(program);
        command.arg(role).arg(agent.socket()).arg(path_of(memory)?).arg(address);
        command.args((role == "source").then(|| mode.name()));
        Process::spawn_visible(role, &mut command)
    };
    let mut destination = vmm("destination", &agents[1], there, "tcp:127.0.0.1:0")?;
    let line = destination.wait_for_line("listening at ", PATIENCE)?;
    let address = line.trim_start_matches("listening at ");
    let mut source = vmm("source", &agents[0], here, address)?;
    Ok([report_of(&mut source)?, report_of(&mut destination)?])
}

/// The prepared memory, as one VMM uses it.
fn open(path: &Path) -> Result<Arc<Usage>, Error> {
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .map_err(Error::io("open the guest's memory"))?;
    let layout = BlockLayout { backing: Backing::File(Arc::new(file)), ..BlockLayout::ram(SIZE) };
    Usage::new(Arc::new(TestMemory::new(vec![layout])?))
}

/// The source VMM.
fn source(socket: &Path, memory: &Path, to: &str, mode: Mode) -> Result<Value, Error> {
    let usage = open(memory)?;
    let vmm = MockVmm::connect(socket, usage.clone(), Tracker::Log)?;
    let guest = COUNTING.boot(&vmm)?;
    eprintln!("migrating a guest {guest}");
    let give_back = |range: PageRange| {
        let (client, usage) = (vmm.client().clone(), usage.clone());
        move || -> Result<(), Error> {
            usage.give_up(RAM, range)?;
            let range = BlockRange { block: RAM, offset: range.offset(), length: range.bytes() };
            client.discard(&[range], Punch::Yes)?;
            Ok(())
        }
    };
    give_back(BEFORE)()?;
    // During the passes, or at their end at the latest.
    let pending = Arc::new(Mutex::new(Some(give_back(DURING))));
    let during = move || -> Result<(), Error> {
        let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.take().map_or(Ok(()), |give_back| give_back())
    };
    vmm.before_pause(during.clone());
    // The guest is paused after a few passes, even on a slow machine.
    let options = OutgoingOptions {
        policy: NonConvergence::StopAnyway,
        max_passes: 8,
        ..OutgoingOptions::default()
    };
    let options = match mode {
        // This limit is never met, so that the switch ends the passes.
        Mode::Hybrid => {
            OutgoingOptions { mode, switch_after: 2, downtime_limit: Duration::ZERO, ..options }
        }
        _ => OutgoingOptions { mode, ..options },
    };
    let job = vmm.start_outgoing(to, &options)?;
    let status =
        watch(
            &vmm,
            job,
            true,
            |status| if status.phase == Phase::Passes { during() } else { Ok(()) },
        )?;
    if status.phase != Phase::Completed {
        return Err(Error::Mismatch(format!(
            "the migration {}: {}",
            status.phase.name(),
            status.error_text()
        )));
    }
    Ok(json!(Report::new(&status)))
}

/// The destination VMM: its guest continues and is checked.
fn destination(socket: &Path, memory: &Path, listen: &str) -> Result<Value, Error> {
    let usage = open(memory)?;
    let vmm = MockVmm::connect(socket, usage.clone(), Tracker::Log)?;
    let guest = COUNTING.expect(&vmm)?;
    let kvm = matches!(guest, Expected::Kvm);
    let (job, address) = vmm.start_incoming(listen, &IncomingOptions::default())?;
    println!("listening at {address}");
    let first = || COUNTING.first(vmm.memory());
    // In postcopy: the guest's progress when the first page that it writes had arrived.
    let mut began = None;
    let status = watch(&vmm, job, false, |status| {
        if kvm && began.is_none() && status.phase == Phase::Postcopy {
            began = Some(first()?).filter(|sweep| *sweep > 0);
        }
        Ok(())
    })?;
    let meanwhile = began.map(|began| first().map(|now| now.wrapping_sub(began))).transpose()?;
    if status.phase != Phase::Completed {
        return Err(Error::Mismatch(format!(
            "the migration {}: {}",
            status.phase.name(),
            status.error_text()
        )));
    }
    // The source knows the guest's progress. Both are compared at the end.
    let guest = COUNTING.counts_on(&vmm, &guest, 0)?;
    Ok(
        json!({ "guest": guest, "kvm": kvm, "sweeps_meanwhile": meanwhile, "report": Report::new(&status) }),
    )
}

/// Checks that unchanged content is the same at both sides, and that what was given back is a hole
/// at the destination.
fn check(here: &TestMemory, there: &TestMemory) -> Result<Compared, Error> {
    let discarded =
        MappedBitmap::private(pages_in(SIZE)).map_err(|error| Error::Memory(error.to_string()))?;
    discarded.set(BEFORE);
    discarded.set(DURING);
    let stands_still = |page| page < FIRMWARE_PAGES || page >= BUSY.end();
    same_block(here.block(RAM)?, &discarded, there.block(RAM)?, stands_still)
}

/// Prints the first counter when the guest left the source, and its last value.
fn went_on(left_with: u32, came_to: u32) -> Result<(), Error> {
    if came_to > left_with {
        return Ok(());
    }
    Err(Error::Mismatch(format!(
        "the guest left with counter {left_with}, and came to {came_to} at the destination"
    )))
}

/// The faults of a guest that ran before all its memory was there.
fn faults(destination: &Value) -> Table {
    let report = &destination["report"];
    let micros = |name| format!("{} us", number(report, name));
    let mut table = Table::default();
    table.row("pages that the guest waited for", number(report, "requested_pages"));
    table.row("pages that came before it did", number(report, "pushed_pages"));
    table.row("faults", number(report, "faults"));
    table.row("half of them took at most", micros("fault_p50_us"));
    table.row(
        "99 of 100, and the slowest",
        format!("{}, {}", micros("fault_p99_us"), micros("fault_max_us")),
    );
    if let Some(sweeps) = destination["sweeps_meanwhile"].as_u64() {
        table.row("sweeps of the guest meanwhile", sweeps);
    }
    table
}

fn parse_mode(text: &str) -> Result<Mode, String> {
    let found = Mode::NAMES.iter().find(|(name, _)| *name == text);
    found
        .map(|(_, mode)| *mode)
        .ok_or_else(|| format!("\"{text}\": write precopy, postcopy or hybrid"))
}

fn table(report: &Value, before: u64, here: &TestMemory, there: &TestMemory) -> Result<(), Error> {
    let mut table = Table::default();
    table.row("sent", pages(number(report, "pages_sent")));
    table.row("on the wire", mib(number(report, "wire_bytes")));
    table.row("found to be zero", pages(number(report, "zero_pages")));
    table.row("discarded, told and not sent", pages(number(report, "discarded_pages")));
    table.row("never touched, skipped", mib(SIZE - STILL.bytes() - BUSY.bytes()));
    table.row("passes", number(report, "passes"));
    table.row("took", time(report, "total_us"));
    table.row("the guest was paused for", time(report, "downtime_us"));
    table.row("allocated before", mib(before));
    table.row(
        "allocated here and there",
        format!("{} and {}", mib(here.allocated()?), mib(there.allocated()?)),
    );
    print!("{table}");
    Ok(())
}
