// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM whose hooks follow a script.

use super::lock;
use pageferry_client::{
    ClearPages, DirtyLog, GuestOrigin, HookError, Hooks, JobStatus, Ownership, Phase, RunState,
    StatePiece, Tracker,
};
use pageferry_protocol::memory::PageRange;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// The hooks and events that can have a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "named as in the client's trait")]
pub enum At {
    Pause,
    Resume,
    StartTracking,
    StopTracking,
    Sync,
    Clear,
    Throttle,
    SaveState,
    LoadState,
    MemoryPending,
    MemoryComplete,
    MemoryLost,
    /// Refused, unless there is a script.
    AcceptGuest,
    AgentLost,
    Event(u32),
}

impl At {
    /// The event of this phase.
    pub fn phase(phase: Phase) -> Self {
        Self::Event(phase as u32)
    }
}

/// A record of the calls of a VMM's hooks.
#[derive(Debug, Default)]
pub struct Asked {
    /// How often it was paused.
    pub pauses: u64,
    /// How often it was resumed.
    pub resumes: u64,
    /// Whether the guest is paused.
    pub paused: bool,
    /// Whether tracking is on.
    pub tracking: bool,
    /// How often tracking was stopped.
    pub stops_of_tracking: u64,
    /// The last throttle.
    pub throttle: u32,
    /// The state that was loaded.
    pub state: Vec<StatePiece>,
    /// How often the VMM was told that memory is missing.
    pub pending: u64,
    /// How often the VMM was told that all memory is here.
    pub complete: u64,
    /// How often the VMM was told that memory is lost.
    pub lost: u64,
    /// How often another agent was attached by a supervisor.
    pub attached: u64,
    /// What was lost, in order.
    pub losses: Vec<&'static str>,
}

type Script = Box<dyn FnMut() -> Result<(), HookError> + Send>;
/// Runs instead of the clear hook of [`KvmLog`].
type OnClear = Box<dyn FnMut(&mut KvmLog, &BTreeSet<u64>) + Send>;

/// A model of KVM's dirty log with manual protect: a read clears nothing, and a clear clears
/// exactly the given pages.
#[derive(Debug, Default)]
pub struct KvmLog {
    /// Guest page numbers.
    pub dirty: BTreeSet<u64>,
}

/// A VMM whose hooks follow the scripts of a test.
#[derive(Default)]
pub struct ScriptedVmm {
    /// The calls of its hooks.
    pub asked: Mutex<Asked>,
    scripts: Mutex<BTreeMap<At, Script>>,
    /// The log that its sync and clear hooks read and clear.
    pub kvm: Mutex<KvmLog>,
    /// Runs instead of the clear hook, which clears the given pages.
    pub on_clear: Mutex<Option<OnClear>>,
}

impl std::fmt::Debug for ScriptedVmm {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ScriptedVmm").field("asked", &self.asked).finish_non_exhaustive()
    }
}

impl ScriptedVmm {
    /// A VMM without scripts: every hook succeeds.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Runs `script` whenever this hook is called.
    pub fn on(&self, at: At, script: impl FnMut() -> Result<(), HookError> + Send + 'static) {
        lock(&self.scripts).insert(at, Box::new(script));
    }

    /// Removes the script.
    pub fn off(&self, at: At) {
        lock(&self.scripts).remove(&at);
    }

    /// Makes a hook wait until the returned sender is dropped.
    #[must_use]
    pub fn block(&self, at: At) -> std::sync::mpsc::Sender<()> {
        self.block_after(at, 0)
    }

    /// The same, after the hook has been answered `answered` times.
    #[must_use]
    pub fn block_after(&self, at: At, mut answered: u32) -> std::sync::mpsc::Sender<()> {
        let (release, released) = std::sync::mpsc::channel::<()>();
        self.on(at, move || {
            if answered == 0 {
                // Nothing is sent: this returns when the sender is dropped.
                let _ = released.recv();
            }
            answered = answered.saturating_sub(1);
            Ok(())
        });
        release
    }

    fn run(&self, at: At) -> Result<(), HookError> {
        let script = lock(&self.scripts).remove(&at);
        let Some(mut script) = script else { return Ok(()) };
        let outcome = script();
        lock(&self.scripts).entry(at).or_insert(script);
        outcome
    }

    /// How often it was resumed.
    pub fn resumes(&self) -> u64 {
        lock(&self.asked).resumes
    }

    /// Whether the guest is paused.
    pub fn is_paused(&self) -> bool {
        lock(&self.asked).paused
    }
}

/// The hooks of a scripted VMM.
#[derive(Debug)]
pub struct ScriptedHooks(pub Arc<ScriptedVmm>);

impl Hooks for ScriptedHooks {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }

    fn pause(&mut self) -> Result<(), HookError> {
        self.0.run(At::Pause)?;
        let mut asked = lock(&self.0.asked);
        asked.pauses += 1;
        asked.paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.0.run(At::Resume)?;
        let mut asked = lock(&self.0.asked);
        asked.resumes += 1;
        asked.paused = false;
        Ok(())
    }

    fn tracker(&mut self) -> Option<&mut dyn Tracker> {
        Some(self)
    }

    fn throttle(&mut self, percent: u32) -> Result<(), HookError> {
        self.0.run(At::Throttle)?;
        lock(&self.0.asked).throttle = percent;
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        self.0.run(At::SaveState)?;
        Ok(vec![StatePiece { name: "vcpu".into(), bytes: vec![5; 3000] }])
    }

    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        self.0.run(At::LoadState)?;
        lock(&self.0.asked).state = state;
        Ok(())
    }

    fn expect_guest(&mut self, origin: &GuestOrigin) -> Result<(), HookError> {
        if !lock(&self.0.scripts).contains_key(&At::AcceptGuest) {
            return Err(HookError::new(format!("this VMM does not wait for {origin}")));
        }
        Ok(())
    }

    fn accept_guest(&mut self, origin: &GuestOrigin) -> Result<(), HookError> {
        self.expect_guest(origin)?;
        self.0.run(At::AcceptGuest)
    }

    fn memory_pending(&mut self) -> Result<(), HookError> {
        self.0.run(At::MemoryPending)?;
        lock(&self.0.asked).pending += 1;
        Ok(())
    }

    fn memory_complete(&mut self) {
        // This hook cannot fail.
        let _ = self.0.run(At::MemoryComplete);
        lock(&self.0.asked).complete += 1;
    }

    fn memory_lost(&mut self) {
        lock(&self.0.asked).losses.push("memory");
        let _ = self.0.run(At::MemoryLost);
        lock(&self.0.asked).lost += 1;
    }

    fn agent_attached(&mut self) {
        lock(&self.0.asked).attached += 1;
    }

    fn agent_lost(&mut self, _: Ownership) {
        lock(&self.0.asked).losses.push("agent");
        // Nobody hears whether it fails.
        let _ = self.0.run(At::AgentLost);
    }

    fn event(&mut self, status: &JobStatus) {
        // The handling of an event cannot fail.
        let _ = self.0.run(At::phase(status.phase));
    }
}

impl Tracker for ScriptedHooks {
    fn start(&mut self) -> Result<(), HookError> {
        self.0.run(At::StartTracking)?;
        lock(&self.0.asked).tracking = true;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), HookError> {
        self.0.run(At::StopTracking)?;
        let mut asked = lock(&self.0.asked);
        asked.tracking = false;
        asked.stops_of_tracking += 1;
        Ok(())
    }

    fn sync(&mut self, log: &DirtyLog) -> Result<(), HookError> {
        self.0.run(At::Sync)?;
        for page in &lock(&self.0.kvm).dirty {
            log.mark(PageRange::new(*page, 1));
        }
        Ok(())
    }

    fn clear(&mut self, pages: ClearPages<'_>) -> Result<(), HookError> {
        self.0.run(At::Clear)?;
        let set = |bit: &u64| pages.bitmap[(*bit / 64) as usize] >> (*bit % 64) & 1 == 1;
        let bits = (0..pages.bitmap.len() as u64 * 64).filter(set);
        let given: BTreeSet<u64> = bits.map(|bit| pages.log_first_page + bit).collect();
        let mut kvm = lock(&self.0.kvm);
        match lock(&self.0.on_clear).as_mut() {
            Some(on_clear) => on_clear(&mut kvm, &given),
            None => kvm.dirty.retain(|page| !given.contains(page)),
        }
        Ok(())
    }
}
