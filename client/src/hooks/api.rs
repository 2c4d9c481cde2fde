//! The hooks: what a VMM implements for its agent.

use super::error::HookError;
use crate::ownership::Ownership;
use pageferry_protocol::control::job::{JobStatus, RunState};
use pageferry_protocol::shm::DirtyLog;
use std::path::Path;

/// A named piece of the VMM's state, such as a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatePiece {
    /// At most 255 bytes.
    pub name: String,
    /// In whatever format the VMM likes.
    pub bytes: Vec<u8>,
}

/// Pages to clear in the VMM's tracker.
#[derive(Debug, Clone, Copy)]
pub struct ClearPages<'a> {
    /// The block.
    pub block: u32,
    /// First page within the block; a multiple of 64.
    pub first: u64,
    /// One bit per page from `first`: those to clear. No bit is set after the end of the block.
    pub bitmap: &'a [u64],
    /// The same page as `first`, as the page number in the guest: its place in the dirty log.
    pub log_first_page: u64,
}

/// What a VMM does for its agent. The run state, pausing, resuming and the state have no default: a
/// wrong guess would run a guest that its operator had paused, or lose it.
///
/// Each hook has a deadline, by default 10 seconds, after which the agent gives up and the
/// migration fails. Hooks are called one at a time, in the order that the agent asked in. They may
/// use the [`Client`](crate::Client), but must not wait for a job.
///
/// After [`Client::reattach`](crate::Client::reattach) there are two hook channels for a while.
/// Hooks that pause, resume or replace the guest take turns between them, and so do those of the
/// tracker. So a hook must not wait for another channel, such as by
/// [`HookThread::join`](crate::HookThread::join);
/// `agent_lost` may. What a lost agent had asked and was not called yet is refused, unless it ends
/// something or says whose the guest is.
///
/// A hook that panics is caught, and fails: the job fails and says so, and a guest that was paused
/// is resumed. What the hook had changed before is as the panic left it, so the VMM is told by
/// [`Hooks::hook_panicked`]. In a program that is built with `panic = "abort"` nothing can be
/// caught: the VMM ends with its guest.
pub trait Hooks: Send {
    /// Whether the guest runs, as far as its operator is concerned: [`RunState::Paused`] if an
    /// operator has paused it, or has not started it yet. A pause by [`Hooks::pause`] does not
    /// count. Called just before that, and before [`Hooks::save_state`] of a guest that the VMM has
    /// stopped by itself for a snapshot of mode [`Stopped`](crate::SnapshotMode::Stopped).
    ///
    /// A guest that is paused is moved and saved as one that runs is, and is paused afterwards,
    /// here and where it arrives: [`Hooks::stay_paused`] is then called in place of
    /// [`Hooks::resume`]. An operator who wants to change the run state between the pause and that
    /// has to wait for it.
    ///
    /// # Errors
    /// If the VMM cannot tell. The guest is not paused then, and the migration or snapshot fails.
    fn run_state(&mut self) -> Result<RunState, HookError>;

    /// Stops the guest and all that writes its memory: vCPUs, emulated devices, other back-ends.
    /// When it returns, every write is in the trackers or will be after the next sync.
    ///
    /// # Errors
    /// If the guest does not stop. Nothing relies on its pause then; it is resumed all the same,
    /// since a part of it may have stopped.
    fn pause(&mut self) -> Result<(), HookError>;

    /// Lets the guest run: at the source after a failure, at the destination after the commit,
    /// after a restore, and when a snapshot needs it to stand still no more, but for one of mode
    /// [`Stopped`](crate::SnapshotMode::Stopped). Also called when the agent dies while the guest
    /// is paused, or a pause of it failed, and it is still ours. May be called for a guest that
    /// runs. Not called for a guest that stays paused: see [`Hooks::stay_paused`].
    ///
    /// While writes are watched ([`Hooks::writes_watched`]) other processes that write guest
    /// memory, such as vhost-user back-ends, are not resumed with it.
    ///
    /// # Errors
    /// If the guest cannot run.
    fn resume(&mut self) -> Result<(), HookError>;

    /// The guest is this VMM's, and stays paused. Called in place of [`Hooks::resume`] for a guest
    /// that its operator had paused ([`Hooks::run_state`]), or that is not to run where it arrives
    /// ([`ResumePolicy::Never`](crate::ResumePolicy::Never)). From now on it is the operator's to
    /// resume, by the VMM's own means. What [`Hooks::pause`] has stopped besides the vCPUs, and
    /// would run beside a paused guest, may run again.
    ///
    /// # Errors
    /// As for [`Hooks::resume`].
    fn stay_paused(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    /// Starts the VMM's own tracker. Called for [`Trackers::HOOKS`](crate::Trackers::HOOKS) only. A
    /// tracker that is on already starts anew.
    ///
    /// # Errors
    /// If it does not start, and by default: whoever declares a tracker has to have one. The
    /// migration fails.
    fn start_tracking(&mut self) -> Result<(), HookError> {
        Err(no_tracker("start_tracking"))
    }

    /// Stops the VMM's own tracker. Also called when the agent is lost that had it started.
    ///
    /// # Errors
    /// If it does not stop.
    fn stop_tracking(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    /// Marks in `log` what the VMM's own tracker knows as dirty. Called for
    /// [`Trackers::HOOKS`](crate::Trackers::HOOKS) only.
    ///
    /// # Errors
    /// If the tracker cannot be read, and by default; the migration fails.
    fn sync_tracker(&mut self, log: &DirtyLog) -> Result<(), HookError> {
        let _ = log;
        Err(no_tracker("sync_tracker"))
    }

    /// Clears pages in the VMM's own tracker, so that their next write is reported. When it
    /// returns, it must be so. The default is for a tracker that is cleared by each sync.
    ///
    /// # Errors
    /// If the tracker cannot be changed; the migration fails.
    fn clear_tracker(&mut self, pages: ClearPages<'_>) -> Result<(), HookError> {
        let _ = pages;
        Ok(())
    }

    /// Holds the guest back for `percent` of its time, 0 to 99. 0 lets it go.
    ///
    /// # Errors
    /// If it cannot; the migration goes on without.
    fn throttle(&mut self, percent: u32) -> Result<(), HookError> {
        let _ = percent;
        Ok(())
    }

    /// Hands over the state of the VMM and its devices. The guest stands still: it was paused, or
    /// for a snapshot of mode [`Stopped`](crate::SnapshotMode::Stopped) the VMM stopped it, and no
    /// hook did. May still write guest memory: the last pass, or what is saved of memory, comes
    /// after it.
    ///
    /// # Errors
    /// If the state cannot be saved; the migration or snapshot fails, and a guest that was paused
    /// is resumed.
    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError>;

    /// Takes the state that the source, or whoever made the image, saved, in the same order. All
    /// memory is here, or in postcopy and lazy restore ([`Hooks::memory_pending`]) comes when it is
    /// touched. The guest does not run yet. Only called for an incoming migration or a restore that
    /// this client started, or that [`Hooks::prepare_restore`] allowed.
    ///
    /// # Errors
    /// If the state does not fit; the migration fails and the guest runs on at the source, or the
    /// restore fails.
    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError>;

    /// An operator asks that this VMM's memory be filled from `image`, a path from the root. What
    /// the memory holds is lost by that: the VMM must have stopped its guest, if it had one, with
    /// all that writes its memory, and forget its state, before it says yes.
    ///
    /// After that the guest is not this VMM's, as after
    /// [`Client::start_restore`](crate::Client::start_restore): [`Ownership::Awaiting`]. The
    /// restored one is brought by [`Hooks::load_state`] and run by [`Hooks::resume`]. If the
    /// restore fails, none is. That also holds if this takes longer than the agent waits for a
    /// hook, or the job is cancelled meanwhile: then the guest was given up for nothing, the job's
    /// end comes by [`Hooks::event`], and the VMM has to start over. Not called while a guest that
    /// was given up may have to run here again ([`Ownership::Relinquished`]).
    ///
    /// # Errors
    /// If the VMM does not want that, and by default. Nothing changes then.
    fn prepare_restore(&mut self, image: &Path) -> Result<(), HookError> {
        let _ = image;
        Err(HookError::new("this VMM takes no restore from an operator"))
    }

    /// From now on the guest's memory is not all here, until [`Hooks::memory_complete`]: a touch
    /// through the mappings that were handed over as
    /// [`BlockSpec::vmm_address`](crate::BlockSpec::vmm_address) waits until the page has come.
    /// Comes before the state is loaded. `read` and `write` of the file, and other mappings of it,
    /// as those of other processes, do not wait but find holes: nobody may use them meanwhile.
    ///
    /// Nobody writes to the memory before this has returned, and to look at it is of no use: what
    /// is there by then, where something is still to come, is made a hole once more.
    ///
    /// # Errors
    /// If this VMM cannot do that; the migration fails and the guest runs on at the source.
    fn memory_pending(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    /// All memory is here, after [`Hooks::memory_pending`]; or none will come, since the migration
    /// failed before the guest was resumed here.
    fn memory_complete(&mut self) {}

    /// What is missing of the guest, which runs before its memory was here, never comes: the agent
    /// died or hangs, or it lives, and the image turned out to be damaged. So the guest is lost,
    /// and can be neither sent nor saved. Stop it: a vCPU that waits for a page in KVM_RUN is
    /// interrupted by a signal, as when it is paused (on x86). Do not wait for other threads, which
    /// are not.
    ///
    /// Who still touches a missing page when this returned gets SIGBUS, or EFAULT from the kernel;
    /// until then it waits, but five seconds at most. Comes at once when the agent dies or finds
    /// damage, and within [`Config::request_timeout`](crate::Config::request_timeout) and half a
    /// second if it hangs. A hook that waits for a page itself is let go by those five seconds, and
    /// this comes after it.
    fn memory_lost(&mut self) {
        log::error!("memory of the guest is missing and will not come: it cannot go on");
    }

    /// A background snapshot begins: from now on until [`Hooks::writes_unwatched`] the agent
    /// watches the writes through the mappings that were handed over as
    /// [`BlockSpec::vmm_address`](crate::BlockSpec::vmm_address), and only those: a write by
    /// another way, to a page that is not saved yet, is in the image. So from the
    /// [pause](Hooks::pause) that follows on, and also when the guest is [resumed](Hooks::resume),
    /// until [`Hooks::writes_unwatched`], whoever writes otherwise stands still: other processes
    /// that map the memory, such as vhost-user back-ends, and devices that write by pages which
    /// were pinned before. Comes while the guest runs, and before anything is watched.
    ///
    /// # Errors
    /// If this VMM has a device that cannot stand still without its guest, such as one that is
    /// passed through (VFIO). The snapshot fails, nothing is watched, and the guest runs on;
    /// [`SnapshotMode::Paused`](crate::SnapshotMode::Paused) is for such a guest.
    fn writes_watched(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    /// No write is watched any more, after [`Hooks::writes_watched`]: the snapshot has ended,
    /// however it did, or its agent is lost. What stood still for it goes on, but if the guest is
    /// still paused, only with the guest. After [`Client::reattach`](crate::Client::reattach) it
    /// comes by the old channel, unless the new agent watches writes by then: that one announces it
    /// once more by [`Hooks::writes_watched`], and ends it.
    fn writes_unwatched(&mut self) {}

    /// A hook panicked, the one of this name, and was caught. Who can tell what is left of the
    /// VMM's state may say so in a log, save what there is, or end the process. A panic in here is
    /// caught as well.
    fn hook_panicked(&mut self, hook: &'static str, message: &str) {
        let _ = (hook, message);
    }

    /// Something to know about a job.
    fn event(&mut self, status: &JobStatus) {
        let _ = status;
    }

    /// The agent is lost; nothing more comes. A guest that the agent had paused and is ours was
    /// resumed just before, or left paused ([`Hooks::stay_paused`]) if its operator had paused it.
    ///
    /// Its process may live for a moment yet, and read guest memory.
    /// [`Client::remove_block`](crate::Client::remove_block) and
    /// [`Client::end_agent`](crate::Client::end_agent) wait for its end.
    fn agent_lost(&mut self, ownership: Ownership) {
        let _ = ownership;
    }
}

/// Why a tracker that the VMM declared, and does not implement, is no tracker: each write that the
/// guest makes would be lost.
fn no_tracker(hook: &str) -> HookError {
    HookError::new(format!(
        "this VMM declared Trackers::HOOKS, a tracker of its own, and does not implement Hooks::{hook}"
    ))
}
