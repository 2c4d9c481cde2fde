// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line `mock_vmm` as a user runs it: two agents, two mock VMMs and two files, or
//! clones of an image.

use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::memory::{Backing, BlockLayout, TestBlock, TestMemory};
use pageferry_tests::process::{AgentProcess, Process, mock_vmm, program};
use pageferry_tests::random::page_content;
use pageferry_tests::require;
use pageferry_tests::vmm::PATIENCE;
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

const SIZE: u64 = 64 << 20;

struct Bench {
    directory: tempfile::TempDir,
    source: AgentProcess,
    destination: AgentProcess,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let agent = |name| AgentProcess::spawn(program(), directory.path(), name).unwrap();
        let (source, destination) = (agent("source"), agent("destination"));
        Self { directory, source, destination }
    }

    fn file(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        File::create_new(&path).unwrap().set_len(SIZE).unwrap();
        path
    }

    /// Runs both sides. Returns their exit status and output.
    fn migrate(&self, source: &Path, destination: &Path, more: &[&str]) -> [(bool, Value); 2] {
        let address = format!("unix:{}", self.directory.path().join("stream").display());
        let mut receiver = self.vmm("destination", self.destination.socket(), destination);
        receiver.args(["--listen", &address]);
        let mut receiver = Process::spawn("destination VMM", &mut receiver).unwrap();
        receiver.wait_for_line("listening at", PATIENCE).unwrap();
        let mut sender = self.vmm("source", self.source.socket(), source);
        sender.args(["--to", &address]).args(more);
        let mut sender = Process::spawn("source VMM", &mut sender).unwrap();
        [&mut sender, &mut receiver].map(|process| {
            let status = process.wait(PATIENCE).unwrap();
            let lines = process.lines();
            let object = lines
                .iter()
                .find(|line| line.starts_with('{'))
                .unwrap_or_else(|| panic!("{lines:?}"));
            (status.success(), serde_json::from_str(object).unwrap())
        })
    }

    fn vmm(&self, side: &str, socket: &Path, memory: &Path) -> Command {
        mock_vmm(side, 64 << 20, socket, memory)
    }
}

fn open(path: &Path) -> TestMemory {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let layout = BlockLayout { backing: Backing::File(Arc::new(file)), ..BlockLayout::ram(SIZE) };
    TestMemory::new(vec![layout]).unwrap()
}

fn assert_same(source: &TestBlock, destination: &TestBlock, pages: PageRange) {
    for page in pages.first..pages.end() {
        assert!(
            source.read_page(page).unwrap() == destination.read_page(page).unwrap(),
            "page {page:#x}"
        );
    }
}

/// 8 MiB at 0 and 8 MiB at 32 MiB. The rest is holes.
fn prepare(path: &Path) -> TestMemory {
    let memory = open(path);
    let block = memory.block(0).unwrap();
    block.fill(PageRange::new(0, 2048), 1).unwrap();
    block.fill(PageRange::new(8192, 2048), 2).unwrap();
    memory
}

#[test]
fn what_is_allocated_arrives_and_nothing_else_is_allocated() {
    let bench = Bench::new();
    let (here, there) = (bench.file("here"), bench.file("there"));
    let source = prepare(&here);
    let [(sent, ours), (received, theirs)] = bench.migrate(&here, &there, &[]);
    assert!(sent && received, "{ours} {theirs}");
    let destination = open(&there);
    assert_same(
        source.block(0).unwrap(),
        destination.block(0).unwrap(),
        PageRange::new(0, SIZE / PAGE_SIZE),
    );
    assert_eq!(destination.allocated().unwrap(), 16 << 20);
    let fields = |name: &str| ours[name].as_u64().unwrap();
    assert_eq!(ours["status"], "completed");
    assert_eq!((fields("pages_sent"), fields("discarded_pages")), (4096, 0));
    assert_eq!(
        (fields("source_allocated_before"), fields("source_allocated_after")),
        (16 << 20, 16 << 20)
    );
    assert_eq!(theirs["destination_allocated"], 16 << 20);
    assert!(ours["destination_allocated"].is_null() && theirs["source_allocated_before"].is_null());
    assert!(fields("wire_bytes") < (16 << 20) * 101 / 100);
}

#[test]
fn discards_are_holes_at_the_destination() {
    let bench = Bench::new();
    let (here, there) = (bench.file("here"), bench.file("there"));
    let source = prepare(&here);
    let discards =
        ["--no-punch", "--discard", "1M+1M", "--discard", "33M+2050K", "--discard-during", "4M+1M"];
    let [(sent, ours), (received, theirs)] = bench.migrate(&here, &there, &discards);
    assert!(sent && received, "{ours} {theirs}");
    assert_eq!(ours["source_allocated_after"], 16 << 20, "stale bytes stay");
    let destination = open(&there);
    let block = destination.block(0).unwrap();
    // The discarded 2050 KiB end inside a page, which still migrates.
    let discarded =
        [PageRange::new(256, 256), PageRange::new(8448, 512), PageRange::new(1024, 256)];
    for pages in discarded {
        assert!(block.is_hole(pages).unwrap(), "{pages:?}");
    }
    assert_same(source.block(0).unwrap(), block, PageRange::new(8960, 1280));
    assert_same(source.block(0).unwrap(), block, PageRange::new(1280, 768));
    assert_eq!(theirs["destination_allocated"].as_u64().unwrap(), (16 << 20) - (4 << 20));
}

#[test]
fn a_busy_guest_arrives_as_it_stopped_with_either_tracker() {
    for tracker in ["log", "uffd"] {
        let bench = Bench::new();
        let (here, there) = (bench.file("here"), bench.file("there"));
        let source = prepare(&here);
        let more =
            ["--write-rate", "2000", "--tracker", tracker, "--streams", "3", "--bandwidth", "40M"];
        let [(sent, ours), (received, theirs)] = bench.migrate(&here, &there, &more);
        if tracker == "uffd" && !sent && ours["error"].as_str().unwrap().contains("userfaultfd") {
            eprintln!("skipped: {ours}");
            continue;
        }
        assert!(sent && received, "{tracker}: {ours} {theirs}");
        assert!(ours["passes"].as_u64().unwrap() > 1, "{tracker}: {ours}");
        let destination = open(&there);
        assert_same(
            source.block(0).unwrap(),
            destination.block(0).unwrap(),
            PageRange::new(0, SIZE / PAGE_SIZE),
        );
        assert_eq!(theirs["destination_allocated"], 16 << 20, "{tracker}");
    }
}

#[test]
fn a_migration_to_nobody_fails_with_a_sentence_and_a_status() {
    let bench = Bench::new();
    let here = bench.file("here");
    prepare(&here);
    let mut source = bench.vmm("source", bench.source.socket(), &here);
    source.args(["--to", "unix:/nonexistent/stream"]);
    let mut source = Process::spawn("source VMM", &mut source).unwrap();
    assert!(!source.wait(PATIENCE).unwrap().success());
    let lines = source.lines();
    let object: Value =
        serde_json::from_str(lines.iter().find(|line| line.starts_with('{')).unwrap()).unwrap();
    assert_eq!(object["status"], "failed");
    assert!(object["error"].as_str().unwrap().contains("/nonexistent/stream"), "{object}");
}

#[test]
fn a_file_that_is_too_short_is_named_in_the_error() {
    let bench = Bench::new();
    let here = bench.file("here");
    File::options().write(true).open(&here).unwrap().set_len(SIZE - 1).unwrap();
    let mut source = bench.vmm("source", bench.source.socket(), &here);
    source.args(["--to", "unix:/nonexistent/stream"]);
    let mut source = Process::spawn("source VMM", &mut source).unwrap();
    assert!(!source.wait(PATIENCE).unwrap().success());
    assert!(source.lines().join("").contains("0x3ffffff bytes"), "{:?}", source.lines());
    assert_eq!(std::fs::metadata(&here).unwrap().len(), SIZE - 1, "used as it is");
}

#[test]
fn postcopy_starts_at_once_or_after_passes() {
    if !require::uffd() {
        return;
    }
    // Before a postcopy from the start the guest writes nothing. The source releases its pages as
    // they arrive, so they can be compared only with the content from the beginning.
    let postcopy = &["--mode", "postcopy", "--write-rate", "0"][..];
    let hybrid = &["--mode", "hybrid", "--switch-after", "2", "--write-rate", "1000000"][..];
    for (more, passes) in [(postcopy, 0), (hybrid, 2)] {
        let bench = Bench::new();
        let (from, to) = (bench.file("from"), bench.file("to"));
        let here = prepare(&from);
        // This limit is never met, so that the switch ends the passes.
        let options =
            [more, &["--downtime-limit", "0ms", "--discard", "4M+2M", "--release"]].concat();
        let [(sent, source), (received, destination)] = bench.migrate(&from, &to, &options);
        assert!(sent && received, "{source} {destination}");
        assert_eq!(source["passes"], passes, "{source}");
        let [requested, pushed] =
            ["requested_pages", "pushed_pages"].map(|name| source[name].as_u64().unwrap());
        let allocated = destination["destination_allocated"].as_u64().unwrap();
        assert!(allocated <= 14 << 20, "{allocated:#x} bytes for 14 MiB");
        let there = open(&to);
        let (here, there) = (here.block(0).unwrap(), there.block(0).unwrap());
        assert!(there.is_hole(PageRange::new(1024, 512)).unwrap());
        if passes == 0 {
            assert_eq!(pushed + requested, 14 << 8);
            // The source released the pages when they had arrived, so there is nothing to compare
            // with.
            assert_eq!(source["source_allocated_after"], 0, "{source}");
            assert!(there.read_page(8200).unwrap() == page_content(2, 8200));
        } else {
            // Two passes and no last one. Pages that the guest wrote since then came after the
            // switch.
            assert_eq!(here.allocated().unwrap() + (requested + pushed) * PAGE_SIZE, 14 << 20);
        }
    }
}

#[test]
fn clones_of_an_image_have_its_memory_and_share_it() {
    if !require::uffd() {
        return;
    }
    let bench = Bench::new();
    let here = bench.file("here");
    prepare(&here);
    let image = bench.directory.path().join("image");
    let mut source = bench.vmm("source", bench.source.socket(), &here);
    source.args(["--write-rate", "20000", "--paused", "--snapshot-to"]).arg(&image);
    let mut source = Process::spawn("source VMM", &mut source).unwrap();
    assert!(source.wait(PATIENCE).unwrap().success(), "{:?}", source.lines());

    let bases = bench.directory.path().join("bases");
    let clones = |more: &[&str]| {
        let mut command = Command::new(program());
        command.args(["mock-vmm", "clone", "--json", "--number", "3"]).args(more);
        command.arg(&image).arg("--agent").arg(program()).env("PAGEFERRY_BASES", &bases);
        let mut process = Process::spawn("clones", &mut command).unwrap();
        let succeeded = process.wait(PATIENCE).unwrap().success();
        let lines = process.lines();
        let object = lines.iter().find(|line| line.starts_with('{')).unwrap();
        (succeeded, serde_json::from_str::<Value>(object).unwrap())
    };
    let (succeeded, report) = clones(&["--write", "1M"]);
    assert!(succeeded, "{report}");
    assert_eq!((&report["clones"], &report["size"]), (&3.into(), &SIZE.into()));
    // Each has at least the words that it has written itself.
    assert!(report["words_checked"].as_u64().unwrap() >= 3 * 256, "{report}");
    let base = |when: &str| report[when]["base"].as_u64().unwrap();
    assert!((16 << 20..18 << 20).contains(&base("after_start")), "{report}");
    assert_eq!(base("after_start"), base("after_writes"), "no clone writes to the base");
    assert!(report["until_it_runs"]["others_p99_ms"].as_f64().unwrap() > 0.0, "{report}");

    assert!(clones(&[]).1["after_writes"].is_null());
    // Whoever ends last removes it, or whoever opens the next one.
    assert!(std::fs::read_dir(&bases).unwrap().count() <= 1);
    std::fs::write(&image, "no image").unwrap();
    let (succeeded, report) = clones(&[]);
    assert!(!succeeded && report["error"].as_str().unwrap().contains("clone 1: "), "{report}");
}
