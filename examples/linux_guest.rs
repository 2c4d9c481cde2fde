// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A Linux guest under an unmodified QEMU is moved and saved while it runs, killed, and restored.
//!
//! `cargo run --release --example linux_guest`
//!
//! `tests/guests/install` gets QEMU and the guest. A program in the guest prints ten ticks a second
//! on a serial line, and verifies 64 MiB of its memory all the time. This program prints and runs
//! the commands of an operator. With arguments it is `pageferry` itself, so that nothing has to be
//! installed. The exit status is 0 only if the guest found nothing wrong.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use pageferry_examples::show::{LIMIT, in_folder, mib, number, parse, time};
use pageferry_examples::table::Table;
use pageferry_tests::deadline::{wait_for, wait_until};
use pageferry_tests::linux_guest::console::PATIENCE;
use pageferry_tests::linux_guest::{Console, LinuxGuest, QemuTools, QemuVersion, Sockets, Tick};
use pageferry_tests::process::Process;
use pageferry_tests::{Error, require};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// The guest's memory in bytes.
const SIZE: u64 = 512 << 20;
/// The QEMU that runs it.
const QEMU: QemuVersion = QemuVersion::V11_1;

fn main() -> ExitCode {
    // The processes beside QEMU, their agents and the operator's commands are this program, too.
    if std::env::args_os().len() > 1 {
        return pageferry_agent::cli::main_from(std::env::args_os());
    }
    let Some(tools) = require::qemu() else {
        println!("This example boots Linux under QEMU. To get both, without root, run:");
        println!("    tests/guests/install");
        return ExitCode::SUCCESS;
    };
    match in_folder(|program, folder| Operator::new(program, folder, &tools).show()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", error.sentence());
            ExitCode::FAILURE
        }
    }
}

/// Who types the commands.
struct Operator<'a> {
    /// This program, as `pageferry`.
    program: &'a Path,
    /// The current directory.
    folder: &'a Path,
    tools: &'a QemuTools,
    terminal: Terminal,
}

impl<'a> Operator<'a> {
    fn new(program: &'a Path, folder: &'a Path, tools: &'a QemuTools) -> Self {
        Self { program, folder, tools, terminal: Terminal::default() }
    }

    fn show(&self) -> Result<(), Error> {
        let mut first = self.boot()?;
        let mut second = self.start("vm2", "receive", "--listen tcp:127.0.0.1:0")?;
        self.move_guest(&mut first, &second)?;
        let saved = self.save(&second)?;
        let killed = self.kill(&mut second)?;
        let mut third = self.start("vm3", "receive", "")?;
        self.restore(&third, saved, killed)?;
        self.check(&mut third)
    }

    /// Starts QEMU with the guest, and what the guest does.
    fn boot(&self) -> Result<Vm, Error> {
        let begin = Instant::now();
        let mut vm = self.start("vm1", "run", "")?;
        vm.console.wait_until_ready().map_err(|error| vm.explain(&error))?;
        println!("  Linux has booted under QEMU {QEMU} in {:.1?}", begin.elapsed());
        vm.console.command("check 64M 100")?;
        vm.console.command("tick")?;
        self.wait_for_ticks(&vm, 10)?;
        Ok(vm)
    }

    /// Moves the guest. Its QEMU at the source ends.
    fn move_guest(&self, from: &mut Vm, to: &Vm) -> Result<(), Error> {
        // The last word of `...; it listens at tcp:127.0.0.1:41234`.
        let address = to.report.rsplit(' ').next().unwrap_or_default();
        let job = self.pageferry(&format!("migrate --socket vm1.sock --to {address}"), from)?;
        self.wait_for_ticks(to, 5)?;
        from.wait_for_end()?;
        let ticks = [from.console.ticks(), to.console.ticks()].concat();
        let longest = |gap: fn(&Tick, &Tick) -> Duration| {
            ticks.windows(2).map(|two| gap(&two[0], &two[1])).max().unwrap_or_default().as_millis()
        };
        let of_guest = longest(|one, next| next.monotonic.saturating_sub(one.monotonic));
        let of_host = longest(|one, next| next.arrived.saturating_duration_since(one.arrived));
        let sent = mib(number(&job, "wire_bytes"));
        let mut table = Table::default();
        table.row("moved in", time(&job, "total_us"));
        table.row("the guest was paused for", time(&job, "downtime_us"));
        table.row("on the wire", format!("{sent} of {}", mib(SIZE)));
        table.row("longest time between two ticks", format!("{of_host} ms, usually 100"));
        table.row("the same on the guest's clock", format!("{of_guest} ms"));
        print!("{table}");
        Ok(())
    }

    /// Saves the guest while it runs. Returns its last tick before.
    fn save(&self, vm: &Vm) -> Result<Tick, Error> {
        let before = vm.last_tick()?;
        let job = self.pageferry("snapshot --socket vm2.sock guest.image", vm)?;
        let mut table = Table::default();
        table.row("saved in", time(&job, "total_us"));
        table.row("the guest was paused for", time(&job, "downtime_us"));
        table.row("in the image", mib(number(&job, "image_bytes")));
        print!("{table}");
        Ok(before)
    }

    /// Kills QEMU after some more ticks. Returns the last one.
    fn kill(&self, vm: &mut Vm) -> Result<Tick, Error> {
        self.wait_for_ticks(vm, vm.console.ticks().len() + 10)?;
        let pid = vm.qemu()?;
        println!("$ kill -KILL {}", pid.as_raw_pid());
        kill_process(pid, Signal::KILL).map_err(Error::kernel("kill QEMU"))?;
        vm.wait_for_end()?;
        vm.last_tick()
    }

    /// Restores the guest, which runs before its memory is there.
    fn restore(&self, vm: &Vm, saved: Tick, killed: Tick) -> Result<(), Error> {
        let job = self.pageferry("restore --socket vm3.sock guest.image --lazy", vm)?;
        self.wait_for_ticks(vm, 10)?;
        let Some(first) = vm.console.ticks().first().copied() else { return Ok(()) };
        let mut table = Table::default();
        table.row("the guest ran after", time(&job, "time_to_run_us"));
        table.row("all of its memory was there after", time(&job, "total_us"));
        table.row("saved after tick", saved.number);
        table.row("killed after tick", killed.number);
        table.row("goes on with tick", first.number);
        print!("{table}");
        if saved.number < first.number && first.number <= killed.number {
            return Ok(());
        }
        Err(Error::Mismatch("the guest does not go on from where it was saved".to_owned()))
    }

    /// Asks the guest what it has seen, and powers it off.
    fn check(&self, vm: &mut Vm) -> Result<(), Error> {
        let before = vm.console.status()?.check;
        // All of its memory once more since it was restored.
        let verified = |status: &pageferry_tests::linux_guest::Status| status.check >= before + 2;
        vm.console.wait_for_status("a guest that verifies its memory", verified)?;
        vm.console.command("stop")?;
        let status = vm.console.status()?;
        if let Err(error) = status.verify() {
            let found = [vm.console.text("bad")?, vm.console.text("dmesg")?].concat().join("\n");
            return Err(Error::Mismatch(format!("{}\n{found}", error.sentence())));
        }
        vm.console.command("poweroff")?;
        vm.wait_for_end()?;
        println!(
            "checked: the guest has verified its memory {} times and found nothing wrong",
            status.check
        );
        println!("checked: its kernel has seen no error, and no processor that hung");
        Ok(())
    }

    /// Starts QEMU for `vm`, by `pageferry qemu` and `verb`. The options of QEMU are always the
    /// same.
    fn start(&self, vm: &str, verb: &str, options: &str) -> Result<Vm, Error> {
        let line = format!("qemu {verb} --socket {vm}.sock --name {vm} {options}");
        let line = line.trim_end();
        println!("$ pageferry {line} -- qemu-system-x86_64 -m 512M -kernel ...");
        let sockets = Sockets::new(self.folder, vm);
        sockets.create()?;
        // Without a balloon: a guest that gives memory back cannot be saved in the background.
        let guest = LinuxGuest { balloon: false, ..LinuxGuest::new(SIZE) };
        let mut command = self.command(line);
        command.arg("--").args(guest.command_line(self.tools, QEMU, &sockets));
        let mut process = Process::spawn(vm, &mut command)?;
        let report = process.wait_for_line("; agent at ", PATIENCE)?;
        let console = Console::connect(&sockets.console())?;
        Ok(Vm { process, console, report })
    }

    /// Runs a command of an operator, and shows the ticks of `vm` meanwhile. Returns the job.
    fn pageferry(&self, line: &str, vm: &Vm) -> Result<Value, Error> {
        println!("$ pageferry {line}");
        let mut process = Process::spawn("pageferry", self.command(line).arg("--json"))?;
        wait_until("the end of a command", LIMIT, || {
            self.terminal.show(vm);
            process.has_ended()
        })?;
        self.terminal.clear();
        let status = process.wait(LIMIT)?;
        if !status.success() {
            return Err(vm.explain(&Error::Mismatch(process.lines().join("\n"))));
        }
        parse(&process.lines().pop().unwrap_or_default())
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(self.program);
        command.args(line.split(' ')).current_dir(self.folder).env("RUST_LOG", "warn");
        command
    }

    /// Waits until `count` ticks have arrived from `vm`.
    fn wait_for_ticks(&self, vm: &Vm, count: usize) -> Result<(), Error> {
        let last = wait_for("ticks of the guest", PATIENCE, || {
            self.terminal.show(vm);
            let ticks = vm.console.ticks();
            ticks.last().copied().filter(|_| ticks.len() >= count)
        });
        self.terminal.clear();
        println!("  {}", in_words(&last.map_err(|error| vm.explain(&error))?));
        Ok(())
    }
}

/// A QEMU, and the process beside it.
struct Vm {
    /// `pageferry qemu`.
    process: Process,
    /// The program in the guest.
    console: Console,
    /// What `pageferry qemu` said first.
    report: String,
}

impl Vm {
    /// The process id of QEMU, from `pageferry: QEMU 1234 has 512 MiB ...`.
    fn qemu(&self) -> Result<Pid, Error> {
        let pid = self.report.split(' ').find_map(|word| Pid::from_raw(word.parse().ok()?));
        pid.ok_or_else(|| Error::Mismatch(format!("no process in {:?}", self.report)))
    }

    fn last_tick(&self) -> Result<Tick, Error> {
        let last = self.console.ticks().pop();
        last.ok_or_else(|| Error::Mismatch("the guest has not ticked".to_owned()))
    }

    fn wait_for_end(&mut self) -> Result<(), Error> {
        self.process.wait(PATIENCE).map(drop)
    }

    /// The error with what QEMU and pageferry have said.
    fn explain(&self, error: &Error) -> Error {
        let said = self.process.lines().join("\n");
        Error::Mismatch(format!("{}\n{said}", error.sentence()).trim_end().to_owned())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Ends QEMU, too. It fails only if all has ended.
        if !self.process.has_ended() && self.process.terminate().is_ok() {
            let _ = self.process.wait(PATIENCE);
        }
    }
}

/// The last line of a terminal shows the newest tick.
#[derive(Default)]
struct Terminal {
    shown: Cell<u64>,
}

impl Terminal {
    fn show(&self, vm: &Vm) {
        let Some(tick) = vm.console.ticks().pop() else { return };
        if self.shown.replace(tick.number) != tick.number && std::io::stdout().is_terminal() {
            print!("\r  {}", in_words(&tick));
            let _ = std::io::stdout().flush();
        }
    }

    fn clear(&self) {
        if std::io::stdout().is_terminal() {
            print!("\r\x1b[K");
        }
    }
}

fn in_words(tick: &Tick) -> String {
    format!("guest: tick {}, {:.1} s after its boot", tick.number, tick.monotonic.as_secs_f64())
}
