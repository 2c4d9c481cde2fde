// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ends agents at random moments, one after the other.

use pageferry_client::WeakClient;
use pageferry_tests::process::program;
use pageferry_tests::random::Random;
use rustix::process::{Pid, Signal, kill_process};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// The command of an agent that ends with its VMM.
pub fn agent() -> Command {
    let mut command = Command::new(program());
    command.args(["agent", "--stdin"]);
    command
}

/// How the agents of a client end.
#[derive(Debug, Clone, Copy)]
pub struct Deaths {
    /// How many of them end.
    pub count: u64,
    /// Longest time between two ends.
    pub apart: Duration,
    pub by: By,
}

/// What ends an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    Kill,
    /// Some are frozen. The client finds that, and kills them.
    KillOrFreeze,
    /// The process executes the program again, and is the next agent.
    Upgrade,
}

/// A thread that kills agents. On drop it stops.
#[derive(Debug)]
pub struct Killer {
    ends: Arc<AtomicBool>,
    count: u64,
    deaths: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Killer {
    /// Kills agents of this client, which a supervisor replaces.
    pub fn start(client: WeakClient, deaths: Deaths, seed: u64) -> Self {
        let (ends, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stop, died) = (ends.clone(), count.clone());
        let thread = std::thread::spawn(move || {
            let mut chance = Random::new(seed);
            let micros = deaths.apart.as_micros() as u64;
            while died.load(Ordering::Relaxed) < deaths.count && !stop.load(Ordering::Relaxed) {
                // The moment is chance, and nothing is waited for. Sometimes two die in a row: the
                // next one may be just being attached.
                if !chance.one_in(4) {
                    std::thread::sleep(Duration::from_micros(chance.below(micros)));
                }
                let signal = match deaths.by {
                    By::KillOrFreeze if chance.one_in(10) => Signal::STOP,
                    By::Kill | By::KillOrFreeze => Signal::KILL,
                    By::Upgrade => Signal::USR2,
                };
                let Some(client) = client.upgrade() else { return };
                let process = client.agent_pid();
                drop(client);
                if is_child(process) && kill_process(pid(process), signal).is_ok() {
                    died.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { ends, count: deaths.count, deaths: count, thread: Some(thread) }
    }

    /// How many agents have died.
    pub fn deaths(&self) -> u64 {
        self.deaths.load(Ordering::SeqCst)
    }

    /// True if no more will die.
    pub fn has_ended(&self) -> bool {
        self.deaths() == self.count
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pid(process: u32) -> Pid {
    Pid::from_raw(process as i32).unwrap()
}

/// False for a process that was reaped, whose number may be another's by now.
fn is_child(process: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let parent = format!("PPid:\t{}\n", std::process::id());
    status.contains(&parent) && !status.contains("State:\tZ")
}
