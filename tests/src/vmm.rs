// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A mock VMM: memory, a guest, devices and a client. Its hooks record their calls and fail on
//! demand.

use crate::Error;
use crate::deadline::wait_for;
use crate::device::Device;
use crate::guest::{Guest, IdleGuest};
use crate::memory::TestMemory;
use crate::usage::Usage;
use pageferry_client::{
    ClearPages, Client, Config, DirtyLog, GuestOrigin, HookChannel, HookError, Hooks, JobStatus,
    Ownership, Phase, StatePiece, Supervisor, Target, Trackers,
};
use pageferry_client::{
    IncomingOptions, OutgoingOptions, RestoreOptions, RunState, SnapshotOptions,
};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Timeout for anything that normally takes milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The hooks of an agent, without their arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "named as in the client's trait")]
pub enum HookName {
    Pause,
    Resume,
    StayPaused,
    StartTracking,
    StopTracking,
    SyncTracker,
    ClearTracker,
    Throttle,
    SaveState,
    LoadState,
}

/// A fault that a test injects into a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The hook fails with this sentence, and does nothing.
    Fail(String),
    /// The hook panics with this message, and does nothing.
    Panic(String),
    /// The hook works, but only after this time.
    Slow(Duration),
    /// The hook does not answer until the fault is removed or the VMM is dropped, and then fails.
    Never,
}

/// Which tracker reports the guest's writes, besides the shared log.
#[derive(Default)]
pub enum Tracker {
    /// No other tracker: the guest marks the log itself.
    #[default]
    Log,
    /// A tracker of the VMM's own.
    Hooks(Box<dyn pageferry_client::Tracker + Send>),
    /// The agent scans the VMM's mapping.
    WriteProtect,
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Log => "Log",
            Self::Hooks(_) => "Hooks",
            Self::WriteProtect => "WriteProtect",
        })
    }
}

/// What the hooks act on.
struct Parts {
    usage: Arc<Usage>,
    guest: Mutex<Box<dyn Guest>>,
    devices: Mutex<Vec<Device>>,
    tracker: Mutex<Tracker>,
    faults: Mutex<BTreeMap<HookName, Fault>>,
    fault_changed: Condvar,
    before_pause: Mutex<Option<BeforePause>>,
    /// The run state that the operator wants.
    run_state: Mutex<RunState>,
    record: Mutex<Record>,
}

/// An action that runs when the agent asks for the pause.
type BeforePause = Box<dyn FnOnce() -> Result<(), Error> + Send>;

/// The calls and events of a VMM so far.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// The hooks that were called, in order.
    pub calls: Vec<HookName>,
    /// The events that came, in order.
    pub events: Vec<JobStatus>,
    /// The last throttle.
    pub throttle: u32,
    /// Whether the guest runs.
    pub runs: bool,
    /// Bytes allocated when the state was loaded. At the destination this is before its guest
    /// writes anything.
    pub allocated_at_load: Option<u64>,
    /// Words that were compared with the ledgers when the state was loaded.
    pub words_checked: u64,
    /// The hooks that panicked, and their messages.
    pub panics: Vec<(String, String)>,
    /// The ownership at the time when the agent was lost.
    pub agent_lost: Option<Ownership>,
    /// An operator may bring another guest.
    pub takes_guests: bool,
    /// The guest may run before its memory is here.
    pub memory_pending: bool,
    /// All memory is here, after some was missing.
    pub memory_complete: bool,
    /// When the agent was lost while memory was missing.
    pub memory_lost: Option<Instant>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Parts {
    fn new(usage: Arc<Usage>) -> Arc<Self> {
        Arc::new(Self {
            usage,
            guest: Mutex::new(Box::new(IdleGuest)),
            devices: Mutex::default(),
            tracker: Mutex::new(Tracker::Log),
            faults: Mutex::default(),
            fault_changed: Condvar::new(),
            before_pause: Mutex::default(),
            run_state: Mutex::default(),
            record: Mutex::default(),
        })
    }

    fn called(&self, name: HookName) -> Result<(), HookError> {
        lock(&self.record).calls.push(name);
        let fault = lock(&self.faults).get(&name).cloned();
        match fault {
            None => Ok(()),
            Some(Fault::Fail(sentence)) => Err(HookError::new(sentence)),
            Some(Fault::Panic(message)) => panics(message),
            Some(Fault::Slow(duration)) => {
                std::thread::sleep(duration);
                Ok(())
            }
            Some(Fault::Never) => {
                let held = |faults: &mut BTreeMap<HookName, Fault>| {
                    faults.get(&name) == Some(&Fault::Never)
                };
                drop(self.fault_changed.wait_while(lock(&self.faults), held));
                Err(HookError::new("the fault was taken away"))
            }
        }
    }

    fn run(&self) -> Result<(), Error> {
        self.usage.freeze(false);
        lock(&self.guest).resume()?;
        lock(&self.devices).iter_mut().try_for_each(Device::resume)?;
        lock(&self.record).runs = true;
        Ok(())
    }

    fn stop(&self) -> Result<(), Error> {
        self.usage.freeze(true);
        lock(&self.guest).pause()?;
        lock(&self.devices).iter_mut().try_for_each(Device::pause)?;
        lock(&self.record).runs = false;
        Ok(())
    }
}

/// Panics like a VMM with a defect. The client must survive it.
#[allow(clippy::panic, reason = "the fault that a test asked for")]
fn panics(message: String) -> Result<(), HookError> {
    std::panic::panic_any(message)
}

/// The hooks of a mock VMM.
struct VmmHooks(Arc<Parts>);

impl Hooks for VmmHooks {
    fn pause(&mut self) -> Result<(), HookError> {
        self.0.called(HookName::Pause)?;
        if let Some(last_minute) = lock(&self.0.before_pause).take() {
            last_minute()?;
        }
        Ok(self.0.stop()?)
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.0.called(HookName::Resume)?;
        *lock(&self.0.run_state) = RunState::Running;
        Ok(self.0.run()?)
    }

    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(*lock(&self.0.run_state))
    }

    fn stay_paused(&mut self) -> Result<(), HookError> {
        self.0.called(HookName::StayPaused)?;
        *lock(&self.0.run_state) = RunState::Paused;
        Ok(())
    }

    fn tracker(&mut self) -> Option<&mut dyn pageferry_client::Tracker> {
        Some(self)
    }

    fn throttle(&mut self, percent: u32) -> Result<(), HookError> {
        self.0.called(HookName::Throttle)?;
        lock(&self.0.guest).throttle(percent)?;
        lock(&self.0.record).throttle = percent;
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        self.0.called(HookName::SaveState)?;
        let mut state = lock(&self.0.guest).save_state()?;
        state.extend(self.0.usage.save());
        Ok(state)
    }

    /// Compares the memory with what the source's guest wrote, before anything runs. In postcopy
    /// the memory is not here yet, so nothing is compared.
    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        self.0.called(HookName::LoadState)?;
        self.0.usage.load(&state)?;
        lock(&self.0.guest).load_state(&state)?;
        if lock(&self.0.record).memory_pending {
            return Ok(());
        }
        let (words_checked, allocated) =
            (self.0.usage.check()?, self.0.usage.memory().allocated()?);
        let mut record = lock(&self.0.record);
        record.words_checked = words_checked;
        record.allocated_at_load = Some(allocated);
        Ok(())
    }

    fn expect_guest(&mut self, origin: &GuestOrigin) -> Result<(), HookError> {
        if !lock(&self.0.record).takes_guests {
            return Err(HookError::new(format!(
                "this VMM does not wait for a guest, such as {origin}"
            )));
        }
        Ok(())
    }

    fn accept_guest(&mut self, origin: &GuestOrigin) -> Result<(), HookError> {
        self.expect_guest(origin)?;
        Ok(self.0.stop()?)
    }

    fn memory_pending(&mut self) -> Result<(), HookError> {
        lock(&self.0.record).memory_pending = true;
        Ok(())
    }

    fn memory_complete(&mut self) {
        let mut record = lock(&self.0.record);
        record.memory_pending = false;
        record.memory_complete = true;
    }

    fn memory_lost(&mut self) {
        lock(&self.0.record).memory_lost = Some(Instant::now());
    }

    fn event(&mut self, status: &JobStatus) {
        lock(&self.0.record).events.push(status.clone());
    }

    fn hook_panicked(&mut self, hook: &'static str, message: &str) {
        lock(&self.0.record).panics.push((hook.to_owned(), message.to_owned()));
    }

    fn agent_lost(&mut self, ownership: Ownership) {
        lock(&self.0.record).agent_lost = Some(ownership);
    }
}

/// The tracker of a mock VMM: its calls are recorded and fail like those of hooks.
impl pageferry_client::Tracker for VmmHooks {
    fn start(&mut self) -> Result<(), HookError> {
        self.0.called(HookName::StartTracking)?;
        match &mut *lock(&self.0.tracker) {
            Tracker::Hooks(tracker) => tracker.start(),
            _ => Ok(()),
        }
    }

    fn stop(&mut self) -> Result<(), HookError> {
        self.0.called(HookName::StopTracking)?;
        match &mut *lock(&self.0.tracker) {
            Tracker::Hooks(tracker) => tracker.stop(),
            _ => Ok(()),
        }
    }

    fn sync(&mut self, log: &DirtyLog) -> Result<(), HookError> {
        self.0.called(HookName::SyncTracker)?;
        match &mut *lock(&self.0.tracker) {
            Tracker::Hooks(tracker) => tracker.sync(log),
            _ => Ok(()),
        }
    }

    fn clear(&mut self, pages: ClearPages<'_>) -> Result<(), HookError> {
        self.0.called(HookName::ClearTracker)?;
        match &mut *lock(&self.0.tracker) {
            Tracker::Hooks(tracker) => tracker.clear(pages),
            _ => Ok(()),
        }
    }
}

/// A mock VMM with an agent. Dropping it ends its guest and the connection.
pub struct MockVmm {
    client: Client,
    parts: Arc<Parts>,
    /// Another agent comes when one is lost.
    is_supervised: bool,
}

impl MockVmm {
    /// Hands `usage`'s memory to the agent behind `client`. The guest is [`IdleGuest`] until
    /// [`MockVmm::set_guest`].
    ///
    /// # Errors
    /// If the agent refuses a block or the tracker.
    pub fn new(
        client: Client, channel: HookChannel, usage: Arc<Usage>, tracker: Tracker,
    ) -> Result<Self, Error> {
        let parts = Parts::new(usage);
        channel.spawn(VmmHooks(parts.clone()))?;
        Self::of(client, parts, false, tracker)
    }

    fn of(
        client: Client, parts: Arc<Parts>, is_supervised: bool, tracker: Tracker,
    ) -> Result<Self, Error> {
        let vmm = Self { client, parts, is_supervised };
        vmm.memory().add_to(&vmm.client)?;
        vmm.set_tracker(tracker)?;
        Ok(vmm)
    }

    /// Like [`MockVmm::new`], with the agent at `socket`. Waits a few seconds for it to listen,
    /// because it may have just been started.
    ///
    /// # Errors
    /// If there is none, or it refuses.
    pub fn connect(socket: &Path, usage: Arc<Usage>, tracker: Tracker) -> Result<Self, Error> {
        // If it still does not listen, the client's error is the best one.
        let _ = crate::deadline::wait_until("the agent's socket", Duration::from_secs(5), || {
            socket.exists()
        });
        let (client, channel) = Client::connect(socket, Config::default())?;
        Self::new(client, channel, usage, tracker)
    }

    /// Hands everything to another agent after the agent was lost.
    ///
    /// # Errors
    /// If there is none at `socket`, or it refuses.
    pub fn reattach(&mut self, socket: &Path) -> Result<(), Error> {
        let channel = self.client.reattach(socket)?;
        channel.spawn(VmmHooks(self.parts.clone()))?;
        Ok(())
    }

    /// Like [`MockVmm::connect`]. When the agent is lost, connects to the next one there.
    ///
    /// # Errors
    /// As there.
    pub fn supervised(socket: &Path, usage: Arc<Usage>, tracker: Tracker) -> Result<Self, Error> {
        let parts = Parts::new(usage);
        let hooks = VmmHooks(parts.clone());
        let (client, _) = Supervisor::connect(socket, Config::default(), hooks)?;
        Self::of(client, parts, true, tracker)
    }

    /// True if memory of the guest is missing, and the next agent would bring it if this one were
    /// lost.
    pub fn awaits_memory_of_next_agent(&self) -> bool {
        let record = lock(&self.parts.record);
        let is_awaited = record.memory_pending && record.memory_lost.is_none();
        is_awaited && self.is_supervised
    }

    /// Declares another tracker.
    ///
    /// # Errors
    /// If it refuses.
    pub fn set_tracker(&self, tracker: Tracker) -> Result<(), Error> {
        let trackers = match &tracker {
            Tracker::Log => Trackers::LOG_IS_COMPLETE,
            Tracker::Hooks(_) => Trackers::HOOKS,
            Tracker::WriteProtect => Trackers::WRITE_PROTECT,
        };
        self.client.set_trackers(trackers)?;
        *lock(&self.parts.tracker) = tracker;
        Ok(())
    }

    /// Replaces the guest. The old one ends.
    pub fn set_guest(&self, guest: impl Guest + 'static) {
        *lock(&self.parts.guest) = Box::new(guest);
    }

    /// Adds an emulated device. It runs while the guest runs.
    pub fn add_device(&self, device: Device) {
        lock(&self.parts.devices).push(device);
    }

    /// Starts guest and devices.
    ///
    /// # Errors
    /// If they cannot run.
    pub fn start(&self) -> Result<(), Error> {
        self.parts.run()
    }

    /// Stops guest and devices, as a pause hook would.
    ///
    /// # Errors
    /// If they do not stop.
    pub fn stop(&self) -> Result<(), Error> {
        self.parts.stop()
    }

    /// Pauses the guest for the operator. It stays paused, whatever the agent does with it.
    ///
    /// # Errors
    /// If it does not stop.
    pub fn operator_pauses(&self) -> Result<(), Error> {
        *lock(&self.parts.run_state) = RunState::Paused;
        self.parts.stop()
    }

    /// Resumes the guest for the operator.
    ///
    /// # Errors
    /// If it cannot run.
    pub fn operator_resumes(&self) -> Result<(), Error> {
        *lock(&self.parts.run_state) = RunState::Running;
        self.parts.run()
    }

    /// The run state that the operator wants, as the VMM knows it.
    pub fn run_state(&self) -> RunState {
        *lock(&self.parts.run_state)
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<TestMemory> {
        self.parts.usage.memory()
    }

    /// The pages in use and what was written.
    pub fn usage(&self) -> &Arc<Usage> {
        &self.parts.usage
    }

    /// Injects a fault into a hook, or removes it.
    pub fn inject(&self, hook: HookName, fault: Option<Fault>) {
        let mut faults = lock(&self.parts.faults);
        match fault {
            Some(fault) => drop(faults.insert(hook, fault)),
            None => drop(faults.remove(&hook)),
        }
        drop(faults);
        self.parts.fault_changed.notify_all();
    }

    /// Runs this action once, when the agent asks for the pause and the guest still runs. That is
    /// the last moment of a migration's passes.
    pub fn before_pause(&self, last_minute: impl FnOnce() -> Result<(), Error> + Send + 'static) {
        *lock(&self.parts.before_pause) = Some(Box::new(last_minute));
    }

    /// Allows an operator to bring another guest.
    pub fn take_guests(&self) {
        lock(&self.parts.record).takes_guests = true;
    }

    /// The calls and events so far.
    pub fn record(&self) -> Record {
        lock(&self.parts.record).clone()
    }

    /// Clears the record.
    pub fn clear_record(&self) {
        let mut record = lock(&self.parts.record);
        *record = Record { runs: record.runs, throttle: record.throttle, ..Record::default() };
    }

    /// Starts an outgoing migration. Returns the number of the job.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn start_outgoing(&self, target: &str, options: &OutgoingOptions) -> Result<u64, Error> {
        Ok(self.client.start_outgoing(Target::Address(target.to_owned()), options)?.job)
    }

    /// Starts an incoming migration. Returns the number of the job, and the address with the port
    /// that was chosen.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn start_incoming(
        &self, listen: &str, options: &IncomingOptions,
    ) -> Result<(u64, String), Error> {
        let started = self.client.start_incoming(Target::Address(listen.to_owned()), options)?;
        Ok((started.job, started.address))
    }

    /// Starts a snapshot. Returns the number of the job.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn start_snapshot(&self, image: &Path, options: &SnapshotOptions) -> Result<u64, Error> {
        Ok(self.client.start_snapshot(image, options)?.job)
    }

    /// Starts a restore. Returns the number of the job.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn start_restore(&self, image: &Path, options: &RestoreOptions) -> Result<u64, Error> {
        Ok(self.client.start_restore(image, options)?.job)
    }

    /// Waits until the job is in `phase` or a later one.
    ///
    /// # Errors
    /// If that takes longer than `timeout`, or the agent is lost.
    pub fn wait_phase(&self, phase: Phase, timeout: Duration) -> Result<JobStatus, Error> {
        let what = format!("phase {}", phase.name());
        wait_for(&what, timeout, || match self.client.status() {
            Ok(status) if status.phase >= phase => Some(Ok(status)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        })?
        .map_err(Error::from)
    }

    /// Waits for the end of the job. Returns its final status.
    ///
    /// # Errors
    /// If it did not, or the agent is lost.
    pub fn wait_job(&self, job: u64, timeout: Duration) -> Result<JobStatus, Error> {
        Ok(self.client.wait(job, timeout)?)
    }
}

impl Drop for MockVmm {
    fn drop(&mut self) {
        // A hook that waits until its fault is removed would keep its thread.
        lock(&self.parts.faults).clear();
        self.parts.fault_changed.notify_all();
        if let Err(error) = self.parts.stop() {
            log::warn!("cannot stop the guest: {}", error.sentence());
        }
    }
}
