// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the Linux guest of the tests does: it uses memory, a disk and a network, and checks all the
//! time that each page and block has the content that it put there.
//!
//! It is the only program in the guest, static and without dependencies. A host controls it over a
//! serial line, whose device is its argument. A command is one line: a number of the host's choice,
//! a word, its arguments. Everything that it says is a line that starts with `@`:
//!
//! - `@NUMBER ok NAME=VALUE ...` or `@NUMBER error TEXT` ends the answer to that command;
//! - `@NUMBER line TEXT` comes before, if the answer has a text of many lines;
//! - `@! EVENT ...` comes at any time: `ready`, `tick`, and `BAD` if a check has failed.
//!
//! | command | what it starts or does |
//! | --- | --- |
//! | `hello` | nothing: a host finds out that the guest listens |
//! | `check SIZE [MS]` | verifies and fills SIZE bytes page by page, waits MS (0), and so on |
//! | `churn SIZE [MS]` | maps SIZE bytes, fills, verifies, unmaps, waits MS (500), and so on |
//! | `write RATE SIZE` | writes to RATE random pages of SIZE bytes each second |
//! | `disk` | writes and verifies `/dev/vda`, or its first 64 MiB, without the page cache |
//! | `net PORT` | sends UDP to 10.0.2.2:PORT, and verifies what an echo server there returns |
//! | `tick` | ten `tick` events each second, with CLOCK_MONOTONIC |
//! | `stop [TASK]` | ends one task, or all; a `check` verifies its memory once more before |
//! | `status` | counters, clocks and memory, in one line |
//! | `bad`, `dmesg` | the first BAD lines; the kernel's log |
//! | `poweroff` | powers the guest off |
//!
//! A SIZE is in bytes, or ends in K, M or G.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::net::UdpSocket;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

type Outcome<T> = Result<T, Box<dyn Error>>;

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// BAD lines that are kept and sent. More are only counted: a serial line is slow.
const BAD_LINES: u64 = 32;

fn main() -> Outcome<()> {
    let device = std::env::args().nth(1).ok_or("usage: workload /dev/ttyS1")?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(system::O_NOCTTY);
    let input = BufReader::new(options.open(&device)?);
    let report = Arc::new(Report::new(options.open(&device)?));
    let mut tasks = Tasks { report: Arc::clone(&report), running: BTreeMap::new() };
    let mut log = KernelLog::open()?;
    report.say("@! ready");
    for line in input.split(b'\n') {
        // Bytes that arrive while the line is set up may be lost: the host asks again.
        let line = String::from_utf8_lossy(&line?).into_owned();
        let mut words = line.split_ascii_whitespace();
        let (Some(number), Some(command)) = (words.next(), words.next()) else { continue };
        let arguments: Vec<&str> = words.collect();
        match answer(number, command, &arguments, &mut tasks, &mut log) {
            Ok(said) => report.say(format!("@{number} ok {said}").trim_end()),
            Err(error) => report.say(&format!("@{number} error {error}")),
        }
        if command == "poweroff" {
            break;
        }
    }
    Ok(())
}

/// Does what one command asks for. Returns what follows `ok`.
fn answer(
    number: &str, command: &str, arguments: &[&str], tasks: &mut Tasks, log: &mut KernelLog,
) -> Outcome<String> {
    let report = Arc::clone(&tasks.report);
    let lines = |lines: &[String]| {
        for line in lines {
            report.say(&format!("@{number} line {line}"));
        }
        format!("lines={}", lines.len())
    };
    match (command, arguments) {
        ("hello" | "poweroff", []) => {}
        ("check", [size]) => tasks.start("check", check(Region::new(bytes(size)?)?, 0))?,
        ("check", [size, wait]) => {
            tasks.start("check", check(Region::new(bytes(size)?)?, wait.parse()?))?;
        }
        ("churn", [size]) => tasks.start("churn", churn(bytes(size)?, 500))?,
        ("churn", [size, wait]) => tasks.start("churn", churn(bytes(size)?, wait.parse()?))?,
        ("write", [rate, size]) => {
            tasks.start("write", write(rate.parse()?, Region::new(bytes(size)?)?))?;
        }
        ("disk", []) => tasks.start("disk", disk(Disk::open()?))?,
        ("net", [port]) => tasks.start("net", net(port.parse()?)?)?,
        ("tick", []) => tasks.start("tick", tick)?,
        ("stop", []) => tasks.stop(None),
        ("stop", [name]) => tasks.stop(Some(name)),
        ("status", []) => return status(&report.counters, log),
        ("bad", []) => return Ok(lines(&lock(&report.bad))),
        ("dmesg", []) => return Ok(lines(&KernelLog::all()?)),
        _ => return Err(format!("unknown command, or wrong arguments: {command}").into()),
    }
    Ok(String::new())
}

fn bytes(size: &str) -> Outcome<usize> {
    let (digits, unit) = match size.as_bytes().last() {
        Some(b'K') => (&size[..size.len() - 1], 1 << 10),
        Some(b'M') => (&size[..size.len() - 1], 1 << 20),
        Some(b'G') => (&size[..size.len() - 1], 1 << 30),
        _ => (size, 1),
    };
    let size: usize = digits.parse()?;
    size.checked_mul(unit).ok_or_else(|| format!("{size} is too large").into())
}

// Tasks

/// What each task has done since the guest started. A number never becomes smaller.
#[derive(Default)]
struct Counters {
    check: AtomicU64,
    churn: AtomicU64,
    written: AtomicU64,
    disk: AtomicU64,
    net_sent: AtomicU64,
    net_echoed: AtomicU64,
    bad: AtomicU64,
}

/// The way out: the serial line, the counters, and the first BAD lines.
struct Report {
    line: Mutex<File>,
    counters: Counters,
    bad: Mutex<Vec<String>>,
}

impl Report {
    fn new(line: File) -> Self {
        Self { line: Mutex::new(line), counters: Counters::default(), bad: Mutex::default() }
    }

    /// One line in one piece.
    fn say(&self, text: &str) {
        // Nobody can be told of a broken line.
        let _ = lock(&self.line).write_all(format!("{text}\n").as_bytes());
    }

    /// Something is not as it must be. The host may not be connected now, so the line is kept.
    fn bad(&self, what: impl Display) {
        if self.counters.bad.fetch_add(1, Ordering::Relaxed) < BAD_LINES {
            let line = format!("BAD {what}");
            self.say(&format!("@! {line}"));
            lock(&self.bad).push(line);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a task gets: where it reports, and when it has to end.
struct Context {
    report: Arc<Report>,
    stop: Arc<AtomicBool>,
}

impl Context {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Waits, but not longer than the task may.
    fn wait(&self, time: Duration) {
        let end = Instant::now() + time;
        while self.goes_on() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(Duration::from_millis(20)));
        }
    }
}

struct Tasks {
    report: Arc<Report>,
    running: BTreeMap<&'static str, (Arc<AtomicBool>, JoinHandle<()>)>,
}

impl Tasks {
    fn start(
        &mut self, name: &'static str, task: impl FnOnce(&Context) + Send + 'static,
    ) -> Outcome<()> {
        if self.running.contains_key(name) {
            return Err(format!("{name} runs already").into());
        }
        let stop = Arc::new(AtomicBool::new(false));
        let context = Context { report: Arc::clone(&self.report), stop: Arc::clone(&stop) };
        let thread = std::thread::Builder::new().name(name.to_owned());
        self.running.insert(name, (stop, thread.spawn(move || task(&context))?));
        Ok(())
    }

    /// Ends one task, or all. Their memory is free when this returns.
    fn stop(&mut self, only: Option<&str>) {
        let chosen = |name: &str| only.is_none_or(|only| only == name);
        for (_, (stop, _)) in self.running.iter().filter(|(name, _)| chosen(name)) {
            stop.store(true, Ordering::Relaxed);
        }
        let running = std::mem::take(&mut self.running);
        let (ending, others): (BTreeMap<_, _>, _) =
            running.into_iter().partition(|(name, _)| chosen(name));
        self.running = others;
        for (_, thread) in ending.into_values() {
            // A panic aborts the program, so no thread ends by one.
            let _ = thread.join();
        }
    }
}

/// Fills the region with one generation after the other. Each page is verified just before it is
/// filled anew, so no lost page goes unnoticed. Waits `wait` milliseconds between generations.
fn check(mut region: Region, wait: u64) -> impl FnOnce(&Context) + Send {
    move |context| {
        let report = &context.report;
        let mut generation = 0;
        while context.goes_on() {
            for index in 0..region.pages() {
                region.verify_page(index, generation, "check", report);
                region.fill_page(index, generation + 1);
            }
            generation += 1;
            report.counters.check.fetch_add(1, Ordering::Relaxed);
            context.wait(Duration::from_millis(wait));
        }
        region.verify(generation, "check", report);
    }
}

/// Takes memory and gives it back. After `wait` milliseconds without it, takes it again.
fn churn(size: usize, wait: u64) -> impl FnOnce(&Context) + Send {
    move |context| {
        let report = &context.report;
        let mut generation = 0;
        while context.goes_on() {
            generation += 1;
            match Region::new(size) {
                Ok(mut region) => {
                    region.verify(0, "churn", report);
                    region.fill(generation);
                    region.verify(generation, "churn", report);
                }
                Err(error) => report.bad(format!("churn: {error}")),
            }
            report.counters.churn.fetch_add(1, Ordering::Relaxed);
            context.wait(Duration::from_millis(wait));
        }
    }
}

/// Increments the first word of `rate` random pages each second. Each page must have the number of
/// its writes.
fn write(rate: u64, mut region: Region) -> impl FnOnce(&Context) + Send {
    const SLICE: Duration = Duration::from_millis(10);
    move |context| {
        let mut writes = vec![0_u64; region.pages()];
        let mut random = 1;
        let (mut owed, mut before) = (0.0, Instant::now());
        while context.goes_on() {
            // After a pause it does not catch up: a rate is what a bench asks for.
            let now = Instant::now();
            let passed = now.duration_since(before).min(10 * SLICE);
            owed = (owed + passed.as_secs_f64() * rate as f64).min(rate as f64);
            before = now;
            let count = owed as u64;
            owed -= count as f64;
            for _ in 0..count {
                random = mix(random);
                let index = random as usize % region.pages();
                let (page, expected) = (region.page(index), &mut writes[index]);
                if page[0] != *expected {
                    let found = page[0];
                    context.report.bad(format!("page {index} of write: {found}, not {expected}"));
                }
                *expected += 1;
                page[0] = *expected;
            }
            context.report.counters.written.fetch_add(count, Ordering::Relaxed);
            if now.elapsed() < SLICE {
                std::thread::sleep(SLICE);
            }
        }
    }
}

/// Writes the disk block by block. Before a block is written again, it must be as it was written.
fn disk(disk: Disk) -> impl FnOnce(&Context) + Send {
    move |context| {
        let report = &context.report;
        let mut generation = 0;
        while context.goes_on() {
            generation += 1;
            for block in 0..disk.blocks {
                if let Err(error) = disk.visit(block, generation, report) {
                    report.bad(format!("block {block} of disk: {error}"));
                    context.wait(Duration::from_millis(100));
                }
                if !context.goes_on() {
                    return;
                }
            }
            report.counters.disk.fetch_add(1, Ordering::Relaxed);
        }
    }
}

struct Disk {
    file: File,
    blocks: u64,
    /// Many buffers, so that the device writes to many pages.
    buffers: Vec<Mutex<Region>>,
}

impl Disk {
    const BLOCK: usize = 16 * PAGE;

    fn open() -> Outcome<Self> {
        let mut options = OpenOptions::new();
        let mut file =
            options.read(true).write(true).custom_flags(system::O_DIRECT).open("/dev/vda")?;
        let length = file.seek(SeekFrom::End(0))?.min(64 << 20);
        let blocks = length / Self::BLOCK as u64;
        if blocks == 0 {
            return Err(format!("/dev/vda has {length} bytes").into());
        }
        let buffer = |_| Ok(Mutex::new(Region::new(Self::BLOCK)?));
        let buffers = (0..64).map(buffer).collect::<Outcome<_>>()?;
        Ok(Self { file, blocks, buffers })
    }

    fn visit(&self, block: u64, generation: u64, report: &Report) -> std::io::Result<()> {
        let turn = (block + generation) as usize % self.buffers.len();
        let mut buffer = lock(&self.buffers[turn]);
        let offset = block * Self::BLOCK as u64;
        // In the content, a page has a number of its own on the whole disk.
        buffer.first = block * 16;
        if generation > 1 {
            self.file.read_exact_at(buffer.bytes(), offset)?;
            buffer.verify(generation - 1, "disk", report);
        }
        buffer.fill(generation);
        self.file.write_all_at(buffer.bytes(), offset)
    }
}

/// One datagram after the other to the host, and back.
fn net(port: u16) -> Outcome<impl FnOnce(&Context) + Send> {
    const LENGTH: usize = 1024;
    let socket = UdpSocket::bind("10.0.2.15:0")?;
    socket.connect(("10.0.2.2", port))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    Ok(move |context: &Context| {
        let counters = &context.report.counters;
        let (mut number, mut received) = (0_u64, [0; LENGTH]);
        while context.goes_on() {
            number += 1;
            let sent = datagram::<LENGTH>(number);
            if socket.send(&sent).is_err() {
                context.wait(Duration::from_millis(20));
                continue;
            }
            counters.net_sent.fetch_add(1, Ordering::Relaxed);
            // Datagrams may be lost, and an old one may come late. Damaged they never are.
            while let Ok(length) = socket.recv(&mut received) {
                let mut first = [0; 8];
                first.copy_from_slice(&received[..8]);
                let back = u64::from_le_bytes(first);
                if length != LENGTH || received != datagram::<LENGTH>(back) || back > number {
                    context.report.bad(format!("datagram {back} of net: {length} bytes"));
                }
                counters.net_echoed.fetch_add(1, Ordering::Relaxed);
                if back == number {
                    break;
                }
            }
        }
    })
}

fn datagram<const LENGTH: usize>(number: u64) -> [u8; LENGTH] {
    let mut bytes = [0; LENGTH];
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = if index == 0 { number } else { mix(number + ((index as u64) << 32)) };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn tick(context: &Context) {
    let mut number = 0_u64;
    while context.goes_on() {
        number += 1;
        let now = system::now(system::CLOCK_MONOTONIC);
        context.report.say(&format!("@! tick number={number} monotonic_ns={now}"));
        context.wait(Duration::from_millis(100));
    }
}

// Memory

/// Memory of its own, from mmap. It is zero at first, and unmapped when it is dropped.
struct Region {
    start: *mut u64,
    size: usize,
    /// Number of its first page in the content.
    first: u64,
}

// SAFETY: the region owns its mapping; no other pointer to it exists.
unsafe impl Send for Region {}

impl Region {
    fn new(size: usize) -> Outcome<Self> {
        if size < PAGE || !size.is_multiple_of(PAGE) {
            return Err(format!("{size} bytes are not a number of pages").into());
        }
        Ok(Self { start: system::map(size)?, size, first: 0 })
    }

    fn pages(&self) -> usize {
        self.size / PAGE
    }

    /// The words of one page. The compiler may assume nothing of what they are.
    fn page(&mut self, index: usize) -> &mut [u64; WORDS] {
        assert!(index < self.pages());
        // SAFETY: the page is within the mapping, which is writable, aligned, and borrowed by self.
        std::hint::black_box(unsafe { &mut *self.start.add(index * WORDS).cast() })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping has that many bytes, and is borrowed by self.
        std::hint::black_box(unsafe {
            std::slice::from_raw_parts_mut(self.start.cast(), self.size)
        })
    }

    fn fill(&mut self, generation: u64) {
        for index in 0..self.pages() {
            self.fill_page(index, generation);
        }
    }

    fn fill_page(&mut self, index: usize, generation: u64) {
        let number = self.first + index as u64;
        let seed = mix(number ^ generation << 40);
        for (word, at) in self.page(index).iter_mut().zip(0..) {
            *word = content(number, generation, seed, at);
        }
    }

    fn verify(&mut self, generation: u64, task: &str, report: &Report) {
        for index in 0..self.pages() {
            self.verify_page(index, generation, task, report);
        }
    }

    /// Reports the page if it is not as [`Region::fill_page`] left it. Generation 0 is zeros.
    fn verify_page(&mut self, index: usize, generation: u64, task: &str, report: &Report) {
        let number = self.first + index as u64;
        let seed = mix(number ^ generation << 40);
        let page = self.page(index);
        let wrong = page.iter().zip(0..).position(|(word, at)| {
            *word != if generation == 0 { 0 } else { content(number, generation, seed, at) }
        });
        let Some(at) = wrong else { return };
        let found = page[at];
        let holds = match page.iter().all(|word| *word == 0) {
            true => "zeros".to_owned(),
            false => format!("page {}, generation {}", page[0], page[1]),
        };
        report.bad(format!(
            "page {number} of {task}: generation {generation}, word {at} is {found:#x}; it holds \
             {holds}"
        ));
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        system::unmap(self.start, self.size);
    }
}

/// The word at `at` of a page. The first two tell a reader which page this is.
fn content(page: u64, generation: u64, seed: u64, at: u64) -> u64 {
    match at {
        0 => page,
        1 => generation,
        _ => seed.wrapping_add(at.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
    }
}

/// The finalizer of splitmix64.
fn mix(value: u64) -> u64 {
    let mut value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

// The guest's kernel

fn status(counters: &Counters, log: &mut KernelLog) -> Outcome<String> {
    let memory = std::fs::read_to_string("/proc/meminfo")?;
    let memory = |name: &str| {
        let line = memory.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_ascii_whitespace().nth(1)).unwrap_or("0").to_owned()
    };
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    Ok(format!(
        "check={} churn={} written={} disk={} net_sent={} net_echoed={} bad={} alarms={} \
         monotonic_ns={} realtime_ns={} free_kib={} total_kib={}",
        count(&counters.check),
        count(&counters.churn),
        count(&counters.written),
        count(&counters.disk),
        count(&counters.net_sent),
        count(&counters.net_echoed),
        count(&counters.bad),
        log.alarms()?,
        system::now(system::CLOCK_MONOTONIC),
        system::now(system::CLOCK_REALTIME),
        memory("MemFree:"),
        memory("MemTotal:"),
    ))
}

/// Counts the messages of the kernel that say that something is wrong.
struct KernelLog {
    file: File,
    alarms: u64,
}

impl KernelLog {
    const ALARMS: &[&str] = &[
        "Oops",
        "BUG:",
        "WARNING:",
        "soft lockup",
        "Call Trace",
        "I/O error",
        "self-detected stall",
        "detected stalls",
        "blocked for more than",
        "Out of memory",
        "segfault",
        "general protection",
    ];

    fn open() -> std::io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(system::O_NONBLOCK).open("/dev/kmsg")?;
        Ok(Self { file, alarms: 0 })
    }

    /// How many there were since the guest started.
    fn alarms(&mut self) -> std::io::Result<u64> {
        while let Some(line) = self.next()? {
            self.alarms += u64::from(Self::ALARMS.iter().any(|alarm| line.contains(alarm)));
        }
        Ok(self.alarms)
    }

    fn all() -> std::io::Result<Vec<String>> {
        let mut log = Self::open()?;
        std::iter::from_fn(|| log.next().transpose()).collect()
    }

    /// The next message: its time in microseconds and its text. `None` at the end.
    fn next(&mut self) -> std::io::Result<Option<String>> {
        // One read returns one message. A message is at most this long.
        let mut buffer = [0; 8192];
        loop {
            match self.file.read(&mut buffer) {
                Ok(length) => {
                    let record = String::from_utf8_lossy(&buffer[..length]);
                    let (head, text) = record.split_once(';').unwrap_or(("", &record));
                    let time = head.split(',').nth(2).unwrap_or("");
                    let text = text.lines().next().unwrap_or("");
                    return Ok(Some(format!("[{time}] {text}")));
                }
                // Old messages were overwritten: the next read goes on behind them.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

/// The C library, which the standard library links anyway. Values are those of Linux on x86-64.
mod system {
    use std::io::Error;

    pub(crate) const O_NOCTTY: i32 = 0o400;
    pub(crate) const O_NONBLOCK: i32 = 0o4000;
    pub(crate) const O_DIRECT: i32 = 0o40000;
    pub(crate) const CLOCK_REALTIME: i32 = 0;
    pub(crate) const CLOCK_MONOTONIC: i32 = 1;

    const PROT_READ_WRITE: i32 = 3;
    const MAP_PRIVATE_ANONYMOUS: i32 = 0x22;

    unsafe extern "C" {
        fn mmap(at: *mut u64, size: usize, prot: i32, flags: i32, fd: i32, offset: i64)
        -> *mut u64;
        fn munmap(at: *mut u64, size: usize) -> i32;
        fn clock_gettime(clock: i32, time: *mut [i64; 2]) -> i32;
    }

    /// New memory of `size` bytes, zero, aligned to pages.
    pub(crate) fn map(size: usize) -> Result<*mut u64, Error> {
        let null = std::ptr::null_mut();
        // SAFETY: a new mapping at an address that the kernel chooses touches no other memory.
        let start = unsafe { mmap(null, size, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0) };
        if start.addr() == usize::MAX { Err(Error::last_os_error()) } else { Ok(start) }
    }

    /// Ends a mapping of [`map`]. Its owner calls this once, and uses it no more.
    pub(crate) fn unmap(start: *mut u64, size: usize) {
        // SAFETY: the owner drops the only pointer to the mapping.
        unsafe { munmap(start, size) };
    }

    /// Nanoseconds on a clock.
    pub(crate) fn now(clock: i32) -> i64 {
        let mut time = [0; 2];
        // SAFETY: a timespec is two i64 on x86-64, and `time` outlives the call.
        unsafe { clock_gettime(clock, &raw mut time) };
        time[0] * 1_000_000_000 + time[1]
    }
}
