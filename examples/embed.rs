// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The least that a VMM must write to be migrated: five hooks, and its memory handed over once.
//!
//! This program is two VMMs in one process, each with an agent of its own. It migrates a guest from
//! the first to the second: `cargo run --example embed`
#![allow(clippy::print_stdout, clippy::print_stderr)]

use pageferry_client::error::chain;
use pageferry_client::{
    BlockRange, Client, Config, HookError, HookThread, Hooks, IncomingOptions, LogBitmap,
    OutgoingOptions, Phase, Punch, RunState, StatePiece, Target, Trackers,
};
use std::error::Error;
use std::process::{Child, Command, ExitCode};
use std::time::Duration;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const SIZE: usize = 64 << 20;

/// The smallest possible virtual machine: it runs or it does not, and its whole state is one
/// number.
struct Vm {
    runs: bool,
    register: u64,
}

impl Hooks for Vm {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running) // or Paused, if the VMM's operator has paused it
    }

    fn pause(&mut self) -> Result<(), HookError> {
        self.runs = false; // here: stop the vCPUs and whatever else writes guest memory
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.runs = true;
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(vec![StatePiece { name: "cpu".into(), bytes: self.register.to_le_bytes().to_vec() }])
    }

    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        let cpu = state.first().ok_or_else(|| HookError::new("there is no state"))?;
        self.register = u64::from_le_bytes(cpu.bytes.as_slice().try_into()?);
        Ok(())
    }
}

/// Guest memory is a file, so that the VMM can hand it to the agent. `LogBitmap` marks every write
/// of an emulated device as dirty.
fn guest_memory() -> Result<GuestMemoryMmap<LogBitmap>, Box<dyn Error>> {
    let file =
        std::fs::File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.set_len(SIZE as u64)?;
    Ok(GuestMemoryMmap::from_ranges_with_files([(
        GuestAddress(0),
        SIZE,
        Some(FileOffset::new(file, 0)),
    )])?)
}

/// Starts an agent and hands the memory over.
fn attach(
    vm: Vm, memory: &GuestMemoryMmap<LogBitmap>,
) -> Result<(Client, HookThread<Vm>, Child), Box<dyn Error>> {
    // A VMM starts Command::new("pageferry"). This example is its own agent, so that you need not
    // install anything.
    let mut agent = Command::new(std::env::current_exe()?);
    let (client, channel, child) =
        Client::spawn(agent.args(["agent", "--stdin"]).env("RUST_LOG", "warn"), Config::default())?;
    client.add_guest_memory(memory)?;
    // Who writes? Here only devices do, and `LogBitmap` marks their writes. For vCPUs, declare
    // `Trackers::HOOKS` (KVM's dirty log) or `Trackers::WRITE_PROTECT`.
    client.set_trackers(Trackers::LOG_IS_COMPLETE)?;
    Ok((client, channel.spawn(vm)?, child))
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("agent") {
        return pageferry_agent::cli::main_from(std::env::args_os());
    }
    run().unwrap_or_else(|error| {
        // An error prints only what failed. The chain also says why.
        eprintln!("{}", chain(&*error));
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode, Box<dyn Error>> {
    let (here, there) = (guest_memory()?, guest_memory()?);
    let (source, source_hooks, mut source_agent) = attach(Vm { runs: true, register: 42 }, &here)?;
    let (destination, destination_hooks, mut destination_agent) =
        attach(Vm { runs: false, register: 0 }, &there)?;

    // A device writes. Then the guest gives 16 MiB back, and the agent frees them. They are not
    // sent.
    here.write_slice(b"hello", GuestAddress(0x1000))?;
    here.write_slice(b"stale", GuestAddress(32 << 20))?;
    source.discard(&[BlockRange { block: 0, offset: 32 << 20, length: 16 << 20 }], Punch::Yes)?;

    let listen = Target::Address("tcp:127.0.0.1:0".into());
    let listening = destination.start_incoming(listen, &IncomingOptions::default())?;
    let job =
        source.start_outgoing(Target::Address(listening.address), &OutgoingOptions::default())?.job;
    let status = source.wait(job, Duration::from_secs(60))?;
    if status.phase != Phase::Completed {
        return Err(
            format!("the migration {}: {}", status.phase.name(), status.error_text()).into()
        );
    }

    let mut words = [[0; 5]; 2];
    there.read_slice(&mut words[0], GuestAddress(0x1000))?;
    there.read_slice(&mut words[1], GuestAddress(32 << 20))?;
    // The agents end with their clients, and the hooks with their agents.
    drop((source, destination));
    let (old, new) = (source_hooks.join(), destination_hooks.join());
    let ended = source_agent.wait()?.success() && destination_agent.wait()?.success();
    let counters = status.counters;
    println!(
        "{} pages sent, the guest was paused for {} us",
        counters.pages_sent, counters.downtime_us
    );
    let right =
        words == [*b"hello", [0; 5]] && !old.runs && new.runs && new.register == 42 && ended;
    println!("{}", if right { "the guest runs at the destination" } else { "something is wrong" });
    Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
