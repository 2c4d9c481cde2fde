// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Saves a running guest, kills it, and restores it: an agent and a VMM to save it, and an agent
//! and a VMM for each restore, each in its own process.
//!
//! `cargo run --release --example snapshot_restore`
//!
//! The guest has 1 GiB of memory. It writes to one part of it all the time, another part has
//! content that does not change, and the rest was never touched. The program saves the guest while
//! it runs, and again as an increment. Then it kills the VMM and the agent, and restores the guest
//! lazily: the guest runs at once, and its memory follows from the images. It does that twice. The
//! second time, the pages that the guest touched first are read ahead. Afterwards the program
//! checks the result. The exit status is 0 only if all of it is right.
#![allow(clippy::print_stdout)]

use clap::{Parser, Subcommand};
use pageferry_client::{BlockRange, Phase, Punch, RestoreMode, RestoreOptions, SnapshotOptions};
use pageferry_examples::counting::{BUSY, COUNTING, RAM, SEED, SIZE, mebibytes};
use pageferry_examples::show::{
    LIMIT, MIB, in_folder, mib, number, pages, parse, program, report_of, time,
};
use pageferry_examples::table::Table;
use pageferry_protocol::memory::{PageRange, pages_in};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_tests::Error;
use pageferry_tests::memory::TestMemory;
use pageferry_tests::mock_vmm::report::{Report, watch};
use pageferry_tests::process::{AgentProcess, Process};
use pageferry_tests::usage::Usage;
use pageferry_tests::verify::same_block;
use pageferry_tests::vmm::{MockVmm, Tracker};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

/// Content that does not change. The pages after it were never touched.
const STILL: PageRange = mebibytes(32, 480);
/// Given back between the two images.
const GIVEN_BACK: PageRange = mebibytes(256, 128);

/// Saves a running guest of 1 GiB, kills it, restores it twice, and checks that it continues to
/// count.
#[derive(Debug, Parser)]
#[command(name = "snapshot_restore")]
struct Cli {
    #[command(subcommand)]
    process: Option<Role>,
}

/// The role of this program in each process that it starts.
#[derive(Debug, Subcommand)]
enum Role {
    #[command(hide = true)]
    Save { socket: PathBuf, folder: PathBuf },
    #[command(hide = true)]
    Restore { socket: PathBuf, folder: PathBuf },
}

fn main() -> ExitCode {
    program(|| match Cli::parse().process {
        None => in_folder(save_and_restore),
        Some(Role::Save { socket, folder }) => save(&socket, &folder),
        Some(Role::Restore { socket, folder }) => {
            restore(&socket, &folder).map(|report| println!("{report}"))
        }
    })
}

/// Starts everything, waits, checks, and shows what happened.
fn save_and_restore(program: &Path, folder: &Path) -> Result<(), Error> {
    let run = |role: &str, name: &str| -> Result<(AgentProcess, Process), Error> {
        let agent = AgentProcess::spawn(program.as_os_str(), folder, name)?;
        let vmm = Process::spawn_visible(
            role,
            Command::new(program).arg(role).arg(agent.socket()).arg(folder),
        )?;
        Ok((agent, vmm))
    };
    println!(
        "preparing a guest of {} MiB, {} MiB of them with content",
        SIZE / MIB,
        STILL.bytes() / MIB
    );
    let (mut agent, mut vmm) = run("save", "saving")?;
    let mut report = |name: &str| -> Result<Value, Error> {
        let line = vmm.wait_for_line(name, LIMIT)?;
        parse(line.trim_start_matches(name))
    };
    let (full, increment) = (report("full ")?, report("increment ")?);
    // The guest still runs.
    vmm.kill()?;
    agent.process().kill()?;
    print!("{}", saved("saved while it ran", &full, &folder.join("full"))?);
    print!("{}", saved("an increment, after it ran on", &increment, &folder.join("increment"))?);
    println!("killed the guest, its VMM and the agent");
    let mut faults = None;
    for name in ["restored", "restored once more"] {
        let (_agent, mut vmm) = run("restore", name)?;
        let restored = report_of(&mut vmm)?;
        print!("{}", restored_table(name, &restored["report"]));
        if let Some(before) = faults.replace(number(&restored["report"], "faults")) {
            read_ahead(before, &restored["report"])?;
        }
        println!("checked: {}", restored["guest"].as_str().unwrap_or_default());
        println!("checked: {}", restored["memory"].as_str().unwrap_or_default());
    }
    Ok(())
}

/// Checks that the working set was there before the guest touched it: fewer faults than `faults`,
/// the number of the first restore.
fn read_ahead(faults: u64, report: &Value) -> Result<(), Error> {
    let (pages, now) = (number(report, "working_set_pages"), number(report, "faults"));
    if pages > 0 && 3 * now <= faults {
        return Ok(());
    }
    let found = format!(
        "{pages} pages were read ahead by the working set, and {now} faults are left of {faults}"
    );
    Err(Error::Mismatch(format!("{found}: expected is a third at most")))
}

/// The VMM that saves its guest twice, and then runs until it is killed.
fn save(socket: &Path, folder: &Path) -> Result<(), Error> {
    let memory = Arc::new(TestMemory::ram(SIZE)?);
    memory.block(RAM)?.fill(STILL, SEED)?;
    let vmm = MockVmm::connect(socket, Usage::new(memory)?, Tracker::Log)?;
    let guest = COUNTING.boot(&vmm)?;
    eprintln!("saving a guest {guest}");
    let take = |name: &str, options: &SnapshotOptions| -> Result<(), Error> {
        let job = vmm.start_snapshot(&folder.join(name), options)?;
        let status = watch(&vmm, job, true, |_| Ok(()))?;
        if status.phase != Phase::Completed {
            return Err(Error::Mismatch(format!(
                "the snapshot {}: {}",
                status.phase.name(),
                status.error_text()
            )));
        }
        println!("{name} {}", json!(Report::new(&status)));
        Ok(())
    };
    let options = SnapshotOptions { track: true, ..SnapshotOptions::default() };
    take("full", &options)?;
    vmm.usage().give_up(RAM, GIVEN_BACK)?;
    let range = BlockRange { block: RAM, offset: GIVEN_BACK.offset(), length: GIVEN_BACK.bytes() };
    vmm.client().discard(&[range], Punch::Yes)?;
    take(
        "increment",
        &options.with_base(&folder.join("full")).map_err(pageferry_client::Error::from)?,
    )?;
    // This VMM is killed meanwhile.
    std::thread::sleep(LIMIT);
    Ok(())
}

/// A VMM that restores its guest from the image.
fn restore(socket: &Path, folder: &Path) -> Result<Value, Error> {
    let usage = Usage::new(Arc::new(TestMemory::ram(SIZE)?))?;
    let vmm = MockVmm::connect(socket, usage.clone(), Tracker::Log)?;
    let guest = COUNTING.expect(&vmm)?;
    let options = RestoreOptions { mode: RestoreMode::Lazy, ..RestoreOptions::default() };
    let options = options
        .with_working_set(&folder.join("working-set"))
        .map_err(pageferry_client::Error::from)?;
    let image = folder.join("increment");
    let counted = COUNTING.first_in(&image)?;
    let job = vmm.start_restore(&image, &options)?;
    let status = watch(&vmm, job, true, |_| Ok(()))?;
    if status.phase != Phase::Completed {
        return Err(Error::Mismatch(format!(
            "the restore {}: {}",
            status.phase.name(),
            status.error_text()
        )));
    }
    let guest = COUNTING.counts_on(&vmm, &guest, counted)?;
    let reference = TestMemory::ram(SIZE)?;
    reference.block(RAM)?.fill(STILL, SEED)?;
    let discarded =
        MappedBitmap::private(pages_in(SIZE)).map_err(|error| Error::Memory(error.to_string()))?;
    discarded.set(GIVEN_BACK);
    let stands_still = |page: u64| page >= BUSY.end();
    // Pages that the guest writes are allocated only here. They are not compared, and are not
    // checked for holes.
    reference.block(RAM)?.fill(BUSY, SEED)?;
    let compared =
        same_block(reference.block(RAM)?, &discarded, usage.memory().block(RAM)?, stands_still)?;
    let memory = format!(
        "{} pages are as they were saved, {} discarded pages are holes, and nothing more is allocated",
        compared.equal, compared.discarded
    );
    Ok(json!({ "guest": guest, "memory": memory, "report": Report::new(&status) }))
}

fn saved(name: &str, report: &Value, image: &Path) -> Result<Table, Error> {
    use std::os::unix::fs::MetadataExt;
    let file =
        std::fs::metadata(image).map_err(Error::io(format!("look at {}", image.display())))?;
    println!("{name}:");
    let mut table = Table::default();
    table.row("pages saved", pages(number(report, "pages_saved")));
    table.row(
        "of them before their turn, for a write",
        pages(number(report, "copied_before_write_pages")),
    );
    table.row("pages discarded", pages(number(report, "discarded_pages")));
    table.row("the guest was paused for", time(report, "downtime_us"));
    table.row("took", time(report, "total_us"));
    table.row("the file takes on the disk", mib(file.blocks() * 512));
    Ok(table)
}

fn restored_table(name: &str, report: &Value) -> Table {
    println!("{name}:");
    let mut table = Table::default();
    table.row("the guest was ready after", time(report, "time_to_run_us"));
    table.row("all of its memory was there after", time(report, "total_us"));
    table.row("pages restored", pages(number(report, "pages_restored")));
    table.row("of them read ahead by the working set", pages(number(report, "working_set_pages")));
    table.row("faults", number(report, "faults"));
    table.row("99 of 100 of them took at most", format!("{} us", number(report, "fault_p99_us")));
    table
}
