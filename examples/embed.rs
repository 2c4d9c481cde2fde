// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A KVM VMM that embeds the client: it moves its guest, saves it while it runs, resets it while a
//! job runs, and survives the death of its agent in each.
//!
//! The virtual machine is `KvmGuest`, which knows nothing of pageferry: one vCPU that counts in all
//! pages of its memory. What a VMM has to add is between the marks "glue begins" and "glue ends".
//!
//! `cargo run --release --example embed`
#![allow(clippy::print_stdout, clippy::print_stderr)]

use pageferry_client::error::chain;
use pageferry_client::tracking::kvm::KvmDirtyLog;
use pageferry_client::{
    Client, Config, HookError, Hooks, IncomingOptions, LogBitmap, MIN_BANDWIDTH, OutgoingOptions,
    Ownership, Parameters, Phase, RunState, SnapshotMode, SnapshotOptions, StatePiece, Supervisor,
    Target, Tracker, Trackers,
};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::kvm::{KvmGuest, Sweep, check_consistent, counters};
use rustix::process::{Pid, Signal, kill_process};
use std::error::Error;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Size of the guest's memory in bytes.
const SIZE: usize = 64 << 20;
/// How long anything here may take.
const LONG: Duration = Duration::from_secs(60);

// glue begins

/// The machine, which the hooks and the rest of the VMM share.
struct Machine {
    vcpu: Mutex<Vcpu>,
    /// Notified when `paused` or `resets` has changed.
    changed: Condvar,
}

struct Vcpu {
    guest: KvmGuest,
    /// A hook has paused the guest. Only a hook may run it then.
    paused: bool,
    /// The VMM is resetting the guest.
    resets: bool,
}

impl Machine {
    fn lock(&self) -> MutexGuard<'_, Vcpu> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `busy` is false.
    fn wait_while(&self, busy: impl Fn(&Vcpu) -> bool) -> MutexGuard<'_, Vcpu> {
        let waited = self.changed.wait_while(self.lock(), |vcpu| busy(vcpu));
        waited.unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the agent asks of the VMM.
struct VmmHooks {
    machine: Arc<Machine>,
    dirty_log: KvmDirtyLog,
}

impl Hooks for VmmHooks {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        let runs = self.machine.lock().guest.is_running();
        Ok(if runs { RunState::Running } else { RunState::Paused })
    }

    fn pause(&mut self) -> Result<(), HookError> {
        let mut vcpu = self.machine.wait_while(|vcpu| vcpu.resets);
        vcpu.paused = true;
        Ok(vcpu.guest.pause()?)
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.stay_paused()?;
        Ok(self.machine.lock().guest.resume()?)
    }

    fn stay_paused(&mut self) -> Result<(), HookError> {
        self.machine.lock().paused = false;
        self.machine.changed.notify_all();
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        let bytes = self.machine.lock().guest.save()?;
        Ok(vec![StatePiece { name: "vcpu0".into(), bytes }])
    }

    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        let vcpu = state.first().ok_or_else(|| HookError::new("there is no state"))?;
        Ok(self.machine.lock().guest.load(&vcpu.bytes)?)
    }

    fn tracker(&mut self) -> Option<&mut dyn Tracker> {
        Some(&mut self.dirty_log)
    }
}

/// Starts an agent for this machine, hands the memory over, and replaces the agent if it dies.
fn attach(
    name: &str, guest: KvmGuest, memory: &GuestMemoryMmap<LogBitmap>, agent: fn() -> Command,
) -> Outcome<(Client, Arc<Machine>)> {
    let dirty_log = guest.dirty_log()?;
    let vcpu = Mutex::new(Vcpu { guest, paused: false, resets: false });
    let machine = Arc::new(Machine { vcpu, changed: Condvar::new() });
    let hooks = VmmHooks { machine: machine.clone(), dirty_log };
    let config = Config { name: name.into(), ..Config::default() };
    let (client, _supervisor) = Supervisor::spawn(agent, config, hooks)?;
    client.add_guest_memory(memory)?;
    Ok((client, machine))
}

/// Resets the guest, also while a job runs. All memory is freed, and the firmware written anew.
fn reset(client: &Client, machine: &Machine) -> Outcome<()> {
    let mut vcpu = machine.wait_while(|vcpu| vcpu.paused || vcpu.resets);
    if client.ownership() != Ownership::Ours {
        return Err("the guest is not here".into());
    }
    vcpu.guest.pause()?;
    vcpu.resets = true;
    // A hook may wait for the machine while the agent carries this out.
    drop(vcpu);
    let freed = client.free(&client.guest_ranges(0, SIZE as u64)?);
    let mut vcpu = machine.lock();
    vcpu.resets = false;
    machine.changed.notify_all();
    freed?;
    vcpu.guest.boot()?;
    Ok(vcpu.guest.resume()?)
}

// glue ends

/// Guest memory is a file, so that the VMM can hand it to the agent. `LogBitmap` marks every write
/// of an emulated device as dirty.
fn guest_memory() -> Outcome<GuestMemoryMmap<LogBitmap>> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::memfd_create("guest", flags)?);
    file.set_len(SIZE as u64)?;
    let range = (GuestAddress(0), SIZE, Some(FileOffset::new(file, 0)));
    Ok(GuestMemoryMmap::from_ranges_with_files([range])?)
}

/// A VMM, and what this example knows of it.
struct Vmm {
    memory: GuestMemoryMmap<LogBitmap>,
    machine: Arc<Machine>,
    client: Client,
}

impl Vmm {
    fn new(name: &str, agent: fn() -> Command) -> Outcome<Self> {
        let memory = guest_memory()?;
        let guest = KvmGuest::new(memory.clone(), Sweep::all(&memory))?;
        let (client, machine) = attach(name, guest, &memory, agent)?;
        Ok(Self { memory, machine, client })
    }

    /// Checks that the guest counts, and that all its pages are of one moment.
    fn counts(&self) -> Outcome<()> {
        self.machine.lock().guest.wait_for_sweeps(2, LONG)?;
        let mut vcpu = self.machine.wait_while(|vcpu| vcpu.paused);
        vcpu.guest.pause()?;
        let found = counters(&self.memory, vcpu.guest.sweep());
        vcpu.guest.resume()?;
        check_consistent(found?)?;
        Ok(())
    }

    /// Kills the agent while its job runs. The guest goes on, and the next agent comes.
    fn lose_agent(&self, job: u64) -> Outcome<()> {
        let agent = self.client.agent()?.pid;
        wait_until("the job", LONG, || {
            self.client.status().is_ok_and(|status| {
                status.job == job && status.phase > Phase::Connecting && !status.phase.is_final()
            })
        })?;
        kill_process(Pid::from_raw(agent.try_into()?).ok_or("pid")?, Signal::KILL)?;
        wait_until("the next agent", LONG, || {
            self.client.agent().is_ok_and(|next| next.pid != agent && !next.blocks.is_empty())
        })?;
        self.counts()
    }

    fn save(&self, image: &Path, bandwidth: u64) -> Outcome<u64> {
        // A background snapshot needs userfaultfd.
        let probe = SnapshotOptions { bandwidth, replace: true, ..SnapshotOptions::default() };
        let mode = if pageferry_tests::require::uffd() {
            SnapshotMode::Background
        } else {
            SnapshotMode::Paused
        };
        Ok(self.client.start_snapshot(image, &SnapshotOptions { mode, ..probe })?.job)
    }

    fn completes(&self, job: u64) -> Outcome<()> {
        let status = self.client.wait(job, LONG)?;
        match status.phase {
            Phase::Completed => Ok(()),
            phase => Err(format!("job {job} {}: {}", phase.name(), status.error_text()).into()),
        }
    }
}

/// `agent` is the command that starts an agent: in a VMM `pageferry agent --stdin`.
pub fn run(agent: fn() -> Command) -> Outcome<()> {
    let folder = tempfile::tempdir()?;
    let (here, there) = (Vmm::new("here", agent)?, Vmm::new("there", agent)?);
    here.machine.lock().guest.boot()?;
    here.machine.lock().guest.resume()?;
    let to = || Target::Address(format!("unix:{}", folder.path().join("stream").display()));
    let slow = OutgoingOptions { bandwidth: MIN_BANDWIDTH, ..OutgoingOptions::default() };

    // Nobody has said yet who reports the guest's writes. A default could only guess.
    match here.client.start_outgoing(to(), &OutgoingOptions::default()) {
        Err(error) => println!("without trackers: {}", chain(&error)),
        Ok(_) => return Err("a migration started without trackers".into()),
    }
    here.client.set_trackers(Trackers::HOOKS)?;
    there.client.set_trackers(Trackers::HOOKS)?;

    let image = folder.path().join("image");
    here.lose_agent(here.save(&image, MIN_BANDWIDTH)?)?;
    here.completes(here.save(&image, 0)?)?;
    here.counts()?;
    println!("saved while it ran, after an agent died in a save");

    // Each time the destination listens anew.
    for resets in [false, true] {
        let arrives = there.client.start_incoming(to(), &IncomingOptions::default())?.job;
        let job = here.client.start_outgoing(to(), &slow)?.job;
        if resets {
            reset(&here.client, &here.machine)?;
        }
        here.lose_agent(job)?;
        // It waits for another source if this one died early. Refused if it has ended.
        let _ = there.client.cancel();
        there.client.wait(arrives, LONG)?;
    }
    println!("the guest went on here, after an agent died in a migration, and in one with a reset");

    let arrives = there.client.start_incoming(to(), &IncomingOptions::default())?.job;
    let job = here.client.start_outgoing(to(), &slow)?.job;
    reset(&here.client, &here.machine)?;
    // The guest writes all its memory all the time: one pass, then it is paused for the rest.
    let stop = Parameters {
        policy: Some(pageferry_client::NonConvergence::StopAnyway),
        max_passes: Some(1),
        ..Parameters::bandwidth(0)
    };
    // Just after the reset it has written little, and the passes may be over.
    if here.client.set_parameters(&stop).is_err() {
        here.client.set_parameters(&Parameters::bandwidth(0))?;
    }
    here.completes(job)?;
    there.completes(arrives)?;
    there.counts()?;
    if here.machine.lock().guest.is_running() || here.client.ownership() != Ownership::Gone {
        return Err("the guest runs twice".into());
    }
    println!("the guest was reset while it moved, and counts on at the destination");
    Ok(())
}

/// This program is its own agent, so that you need not install anything.
fn own_agent() -> Command {
    let program = std::env::current_exe().unwrap_or_else(|_| "pageferry".into());
    let mut command = Command::new(program);
    command.args(["agent", "--stdin"]).env("RUST_LOG", "off");
    command
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("agent") {
        return pageferry_agent::cli::main_from(std::env::args_os());
    }
    if !pageferry_tests::require::kvm() {
        println!("this example is a VMM for KVM, and /dev/kvm cannot be used here");
        return ExitCode::SUCCESS;
    }
    match run(own_agent) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // An error prints only what failed. The chain also says why.
            eprintln!("{}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}
