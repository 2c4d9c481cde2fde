// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an agent asks of a VMM, carried out by QMP.
//!
//! A missing page is never waited for here: QEMU may touch one while it loads its devices, and the
//! agent answers that by itself.

use super::device_state::{self, DeviceStateError, Saving};
use super::guard::{Duty, Guard};
use super::machine::{Guest, Machine};
use super::migration_settings::Settings;
use super::monitor::{Monitor, MonitorError};
use pageferry_client::{GuestOrigin, HookError, Hooks, JobKind, JobStatus, Phase, RunState};
use pageferry_client::{Ownership, StatePiece};
use rustix::process::Signal;
use serde_json::Value;
use std::sync::Arc;

/// Answers the hooks of an agent.
#[derive(Debug)]
pub(super) struct QemuHooks {
    machine: Arc<Machine>,
    guard: Guard,
    /// As QEMU said it last.
    run_state: RunState,
    /// The save that has begun. It is kept until the guest runs again, here or elsewhere.
    saving: Option<Saving>,
    /// What is to be set back in QEMU when the guest runs again.
    settings: Option<Settings>,
    /// The state of a guest that its operator has paused. QEMU does not save it twice.
    saved: Option<Vec<StatePiece>>,
    /// A destination has loaded the guest, or may have.
    is_loaded_elsewhere: bool,
}

impl QemuHooks {
    pub(super) fn new(machine: Arc<Machine>, guard: Guard) -> Self {
        Self {
            machine,
            guard,
            run_state: RunState::Paused,
            saving: None,
            settings: None,
            saved: None,
            is_loaded_elsewhere: false,
        }
    }

    /// Has QEMU begin to save its state, which pauses the guest.
    fn begin_save(&mut self, monitor: &mut Monitor) -> Result<(), HookError> {
        // Of a job whose end this side has missed.
        self.set_back(monitor);
        let settings = Settings::for_save(monitor)?;
        self.change(settings, monitor)?;
        self.saving = Some(Saving::begin(monitor)?);
        Ok(())
    }

    /// Sets in QEMU what a load needs. Called early, since each command costs a millisecond, and
    /// once more when it must be done.
    fn prepare_load(&mut self, monitor: &mut Monitor) -> Result<(), HookError> {
        if self.settings.is_none() {
            let settings = Settings::for_load(monitor)?;
            self.change(settings, monitor)?;
        }
        Ok(())
    }

    /// Changes settings of QEMU. The guard hears before what is to be set back.
    fn change(&mut self, settings: Settings, monitor: &mut Monitor) -> Result<(), MonitorError> {
        self.remember(Some(&settings));
        let changed = settings.apply(monitor);
        self.settings = Some(settings);
        if changed.is_err() {
            self.set_back(monitor);
        }
        changed
    }

    /// After a save or a load: QEMU is as it was before, except for the run state.
    fn set_back(&mut self, monitor: &mut Monitor) {
        if let Some(mut saving) = self.saving.take() {
            saving.cancel(monitor);
        }
        if let Some(settings) = self.settings.take() {
            settings.restore(monitor);
            self.remember(None);
        }
    }

    /// Has the guard set these back if this process dies.
    fn remember(&mut self, settings: Option<&Settings>) {
        if let Err(error) = self.guard.remember(settings) {
            log::warn!("nobody sets QEMU's migration settings back if this process dies: {error}");
        }
    }

    /// Refuses if the guest runs, although a job has paused it.
    fn check_still_paused(&self, monitor: &mut Monitor) -> Result<(), HookError> {
        if self.saving.is_some() && device_state::is_running(monitor)? {
            let error = DeviceStateError::Resumed;
            log::error!("{error}");
            return Err(HookError::new(error.to_string()));
        }
        Ok(())
    }

    /// Tells the guard what to do if this process dies.
    fn set_guard(&mut self, duty: Duty) {
        if let Err(error) = self.guard.set(duty) {
            log::warn!("nobody resumes the guest if this process dies while it is paused: {error}");
        }
    }

    fn ask_run_state(&mut self) -> Result<RunState, HookError> {
        let answer = self.machine.monitor().command("query-status", Value::Null)?;
        let status = answer.get("status").and_then(Value::as_str);
        if status != Some("postmigrate") {
            // It has run since.
            self.saved = None;
        }
        match status {
            // A guest that sleeps wakes by itself.
            Some("running" | "suspended") => Ok(RunState::Running),
            Some(ended @ ("shutdown" | "guest-panicked" | "internal-error")) => {
                Err(HookError::new(format!("the guest has ended: QEMU is {ended}")))
            }
            // `paused`, `prelaunch`, `io-error`, ...: it does not run, and may later. `inmigrate`:
            // there is none, which does not run either.
            _ => Ok(RunState::Paused),
        }
    }
}

impl Hooks for QemuHooks {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        self.run_state = self.ask_run_state()?;
        Ok(self.run_state)
    }

    fn pause(&mut self) -> Result<(), HookError> {
        let machine = Arc::clone(&self.machine);
        let mut monitor = machine.monitor();
        // Memory that is not served would go into the state, while the guest is paused.
        self.machine.check_unchanged(&mut monitor)?;
        if self.run_state == RunState::Running {
            self.set_guard(Duty::Resume);
        }
        if self.saved.is_none() {
            self.begin_save(&mut monitor)?;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        let machine = Arc::clone(&self.machine);
        let mut monitor = machine.monitor();
        let still_paused = self.check_still_paused(&mut monitor);
        if let Some(saving) = &mut self.saving {
            saving.cancel(&mut monitor);
        }
        if machine.state().guest != Guest::Awaited {
            resume_patiently(&mut monitor)?;
        }
        self.set_guard(Duty::Nothing);
        machine.guest_arrived();
        // The guest runs, and does not wait for this.
        if std::mem::take(&mut self.is_loaded_elsewhere) {
            device_state::announce(&mut monitor);
        }
        self.set_back(&mut monitor);
        still_paused
    }

    fn stay_paused(&mut self) -> Result<(), HookError> {
        self.set_guard(Duty::Nothing);
        let machine = Arc::clone(&self.machine);
        self.set_back(&mut machine.monitor());
        machine.guest_arrived();
        Ok(())
    }

    fn check_saved_guest(&mut self) -> Result<(), HookError> {
        let machine = Arc::clone(&self.machine);
        self.check_still_paused(&mut machine.monitor())
    }

    fn guest_given_up(&mut self) {
        self.set_guard(Duty::Nothing);
    }

    fn throttle(&mut self, _: u32) -> Result<(), HookError> {
        Err(HookError::new("QEMU has no throttle for others: use --mode hybrid for a busy guest"))
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        let machine = Arc::clone(&self.machine);
        let mut monitor = machine.monitor();
        if self.saving.is_none() {
            // A snapshot of a guest that its operator has paused may come without a pause.
            self.machine.check_unchanged(&mut monitor)?;
        }
        if let Some(saved) = &self.saved {
            return Ok(saved.clone());
        }
        if self.saving.is_none() {
            // For a snapshot of a guest that is paused by its operator.
            self.begin_save(&mut monitor)?;
        }
        let Some(saving) = &mut self.saving else {
            return Err(HookError::new("no save has begun"));
        };
        let saved = saving.finish(&mut monitor)?;
        if self.run_state == RunState::Paused {
            self.saved = Some(saved.clone());
        }
        Ok(saved)
    }

    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        let machine = Arc::clone(&self.machine);
        let mut monitor = machine.monitor();
        self.prepare_load(&mut monitor)?;
        let loaded = device_state::load(&mut monitor, &state);
        drop(monitor);
        self.machine.state().guest = Guest::Loaded;
        loaded.map_err(|error| {
            let sentence = pageferry_client::error::chain(&error);
            // QEMU takes no second guest after a failed one.
            self.machine.set_useless(format!("the guest could not be loaded: {sentence}"));
            HookError::new(sentence)
        })
    }

    fn expect_guest(&mut self, origin: &GuestOrigin) -> Result<(), HookError> {
        self.accept_guest(origin)
    }

    fn check_guest(&mut self) -> Result<(), HookError> {
        match self.machine.state().guest {
            Guest::Here => Ok(()),
            Guest::Awaited | Guest::Loaded => {
                Err(HookError::new("this QEMU waits for a guest: listen or restore first"))
            }
        }
    }

    fn accept_guest(&mut self, origin: &GuestOrigin) -> Result<(), HookError> {
        // There is nothing to stop.
        if self.machine.state().guest == Guest::Awaited {
            return Ok(());
        }
        Err(HookError::new(format!(
            "this QEMU has a guest, so it takes no other ({origin}): start one for it with `pageferry qemu receive`"
        )))
    }

    fn memory_lost(&mut self) {
        log::error!("memory of the guest is missing and will not come: its QEMU is killed");
        if let Err(error) = self.machine.process.signal(Signal::KILL) {
            log::error!("cannot kill QEMU: {}", pageferry_client::error::chain(&error));
        }
        self.machine.set_useless("memory of the guest was missing, and its agent was lost");
    }

    fn event(&mut self, status: &JobStatus) {
        if status.kind == JobKind::Incoming && status.phase == Phase::Passes {
            let machine = Arc::clone(&self.machine);
            // The guest still runs at its source. If this fails, so will the load, which tells.
            let _ = self.prepare_load(&mut machine.monitor());
        }
        if status.kind == JobKind::Outgoing {
            self.is_loaded_elsewhere |= status.phase == Phase::Loading;
        }
        if status.phase.is_final() {
            let machine = Arc::clone(&self.machine);
            self.set_back(&mut machine.monitor());
            self.machine.state().ended.push(status.clone());
            self.machine.notify();
        }
    }

    fn agent_lost(&mut self, ownership: Ownership) {
        log::debug!("the agent is lost; the guest is {ownership:?}");
        // The next agent does not listen by itself, and QEMU loads devices only once.
        let guest = self.machine.state().guest;
        let waits = guest == Guest::Awaited && self.machine.state().listens;
        if ownership == Ownership::Awaiting && (waits || guest == Guest::Loaded) {
            self.machine.set_useless("the agent was lost before the guest had arrived");
        }
        let machine = Arc::clone(&self.machine);
        self.set_back(&mut machine.monitor());
        self.machine.notify();
    }

    fn agent_attached(&mut self) {
        log::debug!("another agent is attached");
        self.machine.notify();
    }
}

/// Resumes the guest. A QEMU that does not answer in time, or whose connection breaks, is asked
/// once more: it may have resumed the guest meanwhile, and nobody else has this guest.
fn resume_patiently(monitor: &mut Monitor) -> Result<(), MonitorError> {
    match device_state::resume(monitor) {
        Err(error @ (MonitorError::Silent { .. } | MonitorError::Broken { .. })) => {
            log::warn!("the guest is to be resumed, and QEMU is asked once more: {error}");
            device_state::resume(monitor)
        }
        resumed => resumed,
    }
}

/// True if this is the end of a migration that took the guest away.
pub(super) fn has_left(status: &JobStatus) -> bool {
    status.kind == JobKind::Outgoing && status.phase == Phase::Completed
}
