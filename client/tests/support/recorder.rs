// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM that records its hook calls, on a fake agent.

use super::*;
use pageferry_client::{
    ClearPages, DirtyLog, HookError, HookThread, Hooks, IncomingOptions, JobStatus,
};
use pageferry_client::{Ownership, RunState, StatePiece, Target, Tracker};
use pageferry_protocol::control::hook::GuestOrigin;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// A VMM that records the calls of its hooks. They fail or panic if the test asks for it.
#[derive(Default, Clone)]
pub(crate) struct Vmm {
    pub(crate) calls: Arc<Mutex<Vec<String>>>,
    pub(crate) fails: &'static str,
    /// The prefixes of calls that panic, separated by commas.
    pub(crate) panics: &'static str,
    pub(crate) state: Vec<StatePiece>,
    pub(crate) run_state: RunState,
}

impl Vmm {
    fn called(&self, what: impl Into<String>) -> Result<(), HookError> {
        let what = what.into();
        let fails = !self.fails.is_empty() && what.starts_with(self.fails);
        self.calls.lock().unwrap().push(what.clone());
        let panics =
            self.panics.split(',').any(|start| !start.is_empty() && what.starts_with(start));
        assert!(!panics, "vCPU 3 is gone");
        if fails { Err(HookError::new("vCPU 3 does not stop")) } else { Ok(()) }
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl Hooks for Vmm {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        // This call is not recorded, because it changes nothing.
        assert!(!self.panics.split(',').any(|start| start == "run state"), "vCPU 3 is gone");
        Ok(self.run_state)
    }
    fn pause(&mut self) -> Result<(), HookError> {
        self.called("pause")
    }
    fn resume(&mut self) -> Result<(), HookError> {
        self.called("resume")
    }
    fn tracker(&mut self) -> Option<&mut dyn Tracker> {
        Some(self)
    }
    fn throttle(&mut self, percent: u32) -> Result<(), HookError> {
        self.called(format!("throttle {percent}"))
    }
    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        self.called("save")?;
        Ok(self.state.clone())
    }
    fn stay_paused(&mut self) -> Result<(), HookError> {
        self.called("stay paused")
    }
    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        self.state = state;
        self.called("load")
    }
    fn expect_guest(&mut self, origin: &GuestOrigin) -> Result<(), HookError> {
        self.called(format!("expect {origin}"))
    }
    fn accept_guest(&mut self, origin: &GuestOrigin) -> Result<(), HookError> {
        self.called(format!("accept {origin}"))
    }
    fn writes_watched(&mut self) -> Result<(), HookError> {
        self.called("watched")
    }
    fn writes_unwatched(&mut self) {
        self.called("unwatched").unwrap();
    }
    fn event(&mut self, status: &JobStatus) {
        self.called(format!("event {}", status.phase.name())).unwrap();
    }
    fn hook_panicked(&mut self, hook: &'static str, message: &str) {
        self.called(format!("panicked: {hook}: {message}")).unwrap();
    }
    fn agent_lost(&mut self, ownership: Ownership) {
        self.called(format!("lost {ownership:?}")).unwrap();
    }
}

impl Tracker for Vmm {
    fn start(&mut self) -> Result<(), HookError> {
        self.called("start")
    }
    fn stop(&mut self) -> Result<(), HookError> {
        self.called("stop")
    }
    fn sync(&mut self, log: &DirtyLog) -> Result<(), HookError> {
        log.mark(PageRange::new(5, 1));
        self.called("sync")
    }
    fn clear(&mut self, pages: ClearPages<'_>) -> Result<(), HookError> {
        self.called(format!(
            "clear {} {} {:x?} {:#x}",
            pages.block, pages.first, pages.bitmap, pages.log_first_page
        ))
    }
}

/// A client and its hook channel. The test plays the agent.
pub(crate) fn connected() -> (Client, HookChannel, FakeAgent) {
    let (client, channel, agent) = client(|agent| agent);
    (client, channel, agent.join().unwrap())
}

/// A VMM that answers hooks on a thread. The test plays the agent.
pub(crate) struct Attached {
    pub(crate) client: Client,
    pub(crate) vmm: Vmm,
    pub(crate) thread: HookThread<Vmm>,
    pub(crate) agent: FakeAgent,
}

impl Attached {
    pub(crate) fn new(vmm: Vmm) -> Self {
        let (client, channel, agent) = connected();
        Self::over(client, channel, agent, vmm)
    }

    pub(crate) fn over(client: Client, channel: HookChannel, agent: FakeAgent, vmm: Vmm) -> Self {
        let thread = channel.spawn(vmm.clone()).unwrap();
        Self { client, vmm, thread, agent }
    }

    /// Adds a block of this many pages, with the id 2.
    pub(crate) fn add_block(&mut self, gpa: u64, pages: u64) {
        let adding = self.client.clone();
        let added =
            std::thread::spawn(move || adding.add_block(spec(2, gpa, &written(pages))).unwrap());
        self.agent.accept_block();
        added.join().unwrap();
    }

    /// Starts an incoming migration.
    pub(crate) fn start_incoming(&mut self) {
        let starting = self.client.clone();
        let started = std::thread::spawn(move || {
            starting
                .start_incoming(Target::Address("tcp:[::]:0".into()), &IncomingOptions::default())
                .unwrap()
        });
        let (request, _) = self.agent.request().unwrap();
        self.agent.started(&request);
        started.join().unwrap();
    }

    pub(crate) fn hook(&mut self, hook: &Hook) -> Reply<()> {
        self.agent.hook(hook)
    }

    #[track_caller]
    pub(crate) fn refused(&mut self, hook: &Hook) -> ErrorCode {
        self.hook(hook).unwrap_err().code
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.vmm.calls()
    }

    /// Drops the agent. Returns the client and the VMM when the hook thread has ended.
    pub(crate) fn lose_agent(self) -> (Client, Vmm) {
        drop(self.agent);
        (self.client, self.thread.join())
    }
}

/// Attaches another agent.
pub(crate) fn attach_next(client: &Client) -> (HookChannel, FakeAgent) {
    let (ours, agents) = UnixStream::pair().unwrap();
    let next = std::thread::spawn(move || FakeAgent::shake_hands(agents.into(), MAX_RANGES));
    let channel = client.reattach_socket(ours.into()).unwrap();
    (channel, next.join().unwrap())
}

/// Sends these hooks without waiting for replies. The VMM may not have read them when the agent
/// ends.
pub(crate) fn queue(agent: &mut FakeAgent, hooks: &[Hook]) {
    for hook in hooks {
        agent.send_hook(hook, Vec::new());
    }
}
