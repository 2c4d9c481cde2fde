// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hooks: what a VMM implements for its agent.

use super::error::HookError;
use crate::ownership::Ownership;
use crate::tracking::Tracker;
use pageferry_protocol::control::hook::GuestOrigin;
use pageferry_protocol::control::job::{JobStatus, RunState};

/// A named piece of the state of the VMM, such as a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatePiece {
    /// At most 255 bytes.
    pub name: String,
    /// In any format.
    pub bytes: Vec<u8>,
}

/// What a VMM does for its agent. The hooks for the run state, pausing, resuming and the state have
/// no default: a wrong guess would run a guest that its operator had paused, or lose it.
///
/// Each hook has a deadline, by default 10 seconds. If the VMM misses it, the migration fails.
/// Hooks are called one at a time, in the order in which the agent asked. They may use the
/// [`Client`](crate::Client), but must not wait for a job. An implementation that keeps a client
/// keeps a [`WeakClient`](crate::WeakClient): with a `Client` of its own it would never see the end
/// of the agent, since that comes when the last `Client` is dropped.
///
/// After [`Client::reattach`](crate::Client::reattach) two hook channels exist for a while. The
/// hooks that pause, resume or replace the guest never run on both at the same time, and neither do
/// those of the tracker. So a hook must not wait for another channel, for example by
/// [`HookThread::join`](crate::HookThread::join); only `agent_lost` may. A request of the lost
/// agent that was not handled yet is refused, unless it ends something or says whether the guest is
/// ours.
///
/// A panic in a hook is caught, and the hook fails. The job fails with it, and a guest that was
/// paused is resumed. The panic leaves the state of the VMM as it was at that moment, so the VMM is
/// told by [`Hooks::hook_panicked`]. In a program that is built with `panic = "abort"` nothing can
/// be caught: the VMM ends with its guest.
pub trait Hooks: Send {
    /// Whether the guest runs, from the view of its operator: [`RunState::Paused`] if an operator
    /// has paused it or has not started it yet. A pause by [`Hooks::pause`] does not count. Called
    /// just before that pause, and before [`Hooks::save_state`] of a guest that the VMM has stopped
    /// by itself for a snapshot of mode [`Stopped`](crate::SnapshotMode::Stopped).
    ///
    /// A paused guest is moved and saved like a running one, and is paused afterwards, here and at
    /// the destination: then [`Hooks::stay_paused`] is called instead of [`Hooks::resume`]. An
    /// operator who wants to change the run state in between has to wait until then.
    ///
    /// # Errors
    /// If the VMM cannot tell. The guest is then not paused, and the migration or snapshot fails.
    fn run_state(&mut self) -> Result<RunState, HookError>;

    /// Pauses the guest and everything that writes its memory: vCPUs, emulated devices, other
    /// back-ends. When this returns, every write is in the trackers or will be after the next sync.
    ///
    /// # Errors
    /// If the guest cannot be paused. The job fails, and the guest is resumed, since a part of it
    /// may be paused.
    fn pause(&mut self) -> Result<(), HookError>;

    /// Resumes the guest: at the source after a failure, at the destination after the commit, after
    /// a restore, and when a snapshot no longer needs the pause, except one of mode
    /// [`Stopped`](crate::SnapshotMode::Stopped). Also called when the agent dies while a guest
    /// that is ours is paused, or after its pause failed. May be called for a guest that runs. Not
    /// called for a guest that stays paused: see [`Hooks::stay_paused`].
    ///
    /// While writes are watched ([`Hooks::writes_watched`]), other processes that write guest
    /// memory, such as vhost-user back-ends, must not be resumed with it.
    ///
    /// # Errors
    /// If the guest cannot run.
    fn resume(&mut self) -> Result<(), HookError>;

    /// The guest belongs to this VMM and stays paused. Called instead of [`Hooks::resume`] for a
    /// guest that its operator had paused ([`Hooks::run_state`]), or that must not run where it
    /// arrives ([`ResumePolicy::Never`](crate::ResumePolicy::Never)). From now on the operator may
    /// resume it, by the means of the VMM. Everything that [`Hooks::pause`] stopped besides the
    /// vCPUs, and that runs beside a paused guest, may run again.
    ///
    /// # Errors
    /// As for [`Hooks::resume`].
    fn stay_paused(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    /// The VMM's own tracker. Called only for [`Trackers::HOOKS`](crate::Trackers::HOOKS), each
    /// time that the agent starts, syncs, clears or stops it. With KVM's dirty log
    /// ([`tracking::kvm`](crate::tracking::kvm), feature `kvm`) this is all that the VMM writes:
    ///
    /// ```
    /// # #[cfg(feature = "kvm")]
    /// # mod vmm {
    /// # use pageferry_client::{Tracker, tracking::kvm::KvmDirtyLog};
    /// # struct Vmm { dirty_log: KvmDirtyLog }
    /// # impl Vmm {
    /// fn tracker(&mut self) -> Option<&mut dyn Tracker> {
    ///     Some(&mut self.dirty_log)
    /// }
    /// # }
    /// # }
    /// ```
    ///
    /// The default is `None`. A migration that needs the tracker then fails, since a VMM that
    /// declares one must have it.
    fn tracker(&mut self) -> Option<&mut dyn Tracker> {
        None
    }

    /// Throttles the guest by `percent` of its time, 0 to 99. 0 ends the throttle. A migration with
    /// [`NonConvergence::Throttle`](crate::NonConvergence::Throttle) begins with 0, to learn
    /// whether the VMM can throttle.
    ///
    /// # Errors
    /// If the VMM cannot, also for 0. A migration with that policy fails before it has begun; one
    /// whose operator asks later goes on without, and its status says so. The throttle is then as
    /// it was before.
    fn throttle(&mut self, percent: u32) -> Result<(), HookError> {
        let _ = percent;
        Ok(())
    }

    /// Saves the state of the VMM and its devices. The guest is paused: by [`Hooks::pause`], or for
    /// a snapshot of mode [`Stopped`](crate::SnapshotMode::Stopped) by the VMM itself. May still
    /// write guest memory, since the last pass, or the save of the memory, comes after it.
    ///
    /// # Errors
    /// If the state cannot be saved. The migration or snapshot fails, and a guest that was paused
    /// is resumed.
    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError>;

    /// Loads the state that was saved at the source or for the image; the pieces come in the same
    /// order. All memory is here, or, in postcopy and lazy restore ([`Hooks::memory_pending`]),
    /// arrives when it is accessed. The guest does not run yet. Called only for an incoming
    /// migration or a restore that this client started or that [`Hooks::accept_guest`] allowed.
    ///
    /// # Errors
    /// If the state does not fit. The migration fails and the guest continues at the source, or the
    /// restore fails.
    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError>;

    /// An operator wants this VMM to wait for a guest (`pageferry listen`). Would
    /// [`Hooks::accept_guest`] agree, as far as is known now? If not, the operator is told at once,
    /// and not only when a source has come. Nothing changes by the answer. Not called for a
    /// restore, which calls [`Hooks::accept_guest`] at once.
    ///
    /// # Errors
    /// If the VMM takes no guest. Say what to do instead. The default refuses, as that of
    /// [`Hooks::accept_guest`]: a VMM that takes guests writes both.
    fn expect_guest(&mut self, origin: &GuestOrigin) -> Result<(), HookError> {
        Err(no_guest(origin))
    }

    /// An operator wants to migrate or save the guest of this VMM. Is there one? If not, the
    /// operator is told at once, and no job begins. Nothing changes by the answer. Not called if
    /// the VMM itself starts the job.
    ///
    /// # Errors
    /// If there is no guest yet. Say what to do first. The default has one.
    fn check_guest(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    /// An operator wants to bring another guest into the memory of this VMM: by a restore, or by a
    /// migration whose source is connected and fits. That destroys the content of the memory.
    /// Before it returns success, the VMM must have stopped its guest, if it has one, together with
    /// everything that writes its memory. It keeps the state of that guest until
    /// [`Hooks::load_state`] or [`Hooks::memory_pending`] is called.
    ///
    /// Afterwards the guest no longer belongs to this VMM, as after
    /// [`Client::start_restore`](crate::Client::start_restore): [`Ownership::Awaiting`]. The other
    /// guest arrives by [`Hooks::load_state`] and runs by [`Hooks::resume`].
    ///
    /// If this hook misses its deadline, or the job ends before it has changed memory, the guest
    /// that was here goes on: [`Hooks::resume`] or [`Hooks::stay_paused`] is called, as after a
    /// pause, with no state loaded before. If the job fails later, there is no guest here, the end
    /// of the job comes by [`Hooks::event`], and the VMM has to start over. Not called while a
    /// guest that was given up may have to run here again ([`Ownership::Relinquished`]).
    ///
    /// # Errors
    /// If the VMM does not allow it. The default refuses. Nothing changes then.
    fn accept_guest(&mut self, origin: &GuestOrigin) -> Result<(), HookError> {
        Err(no_guest(origin))
    }

    /// From now on, until [`Hooks::memory_complete`], pages of the guest may be missing. An access
    /// through the mappings in [`BlockSpec::vmm_address`](crate::BlockSpec::vmm_address) waits
    /// until the page has arrived. `read` and `write` of the file do not wait but find holes, and
    /// neither do other mappings of it, as in other processes: nothing may use them meanwhile.
    /// Comes before the state is loaded.
    ///
    /// No thread may write to the memory before this has returned. Reading it is of no use either:
    /// the content of pages that are still to arrive is discarded once more.
    ///
    /// # Errors
    /// If this VMM cannot do that. The migration fails and the guest continues at the source.
    fn memory_pending(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    /// All memory is here, after [`Hooks::memory_pending`]. Or none will arrive, since the
    /// migration failed before the guest was resumed here.
    fn memory_complete(&mut self) {}

    /// The guest runs, and its missing memory never arrives: the agent found its image damaged, or
    /// it died or hangs and no other continues. The guest is lost and can be neither sent nor
    /// saved. Stop it: interrupt vCPUs that wait for a page in KVM_RUN by a signal, as for a pause
    /// (on x86). Do not wait for other threads, which cannot be interrupted.
    ///
    /// When this has returned, an access to a missing page gets SIGBUS, or EFAULT from the kernel.
    /// Until then it waits, but five seconds at most. This is called at once when the agent finds
    /// damage or dies, and within [`Config::request_timeout`](crate::Config::request_timeout) and
    /// half a second if it hangs. With a [`Supervisor`](crate::Supervisor) it is called only if no
    /// other agent continues within [`Config::continue_within`](crate::Config::continue_within),
    /// and `agent_lost` may come before it. If another hook waits for a missing page itself, the
    /// five seconds end its wait, and this comes after it.
    fn memory_lost(&mut self) {
        log::error!("memory of the guest is missing and will not come: it cannot go on");
    }

    /// A background snapshot begins. From now on, until [`Hooks::writes_unwatched`], the agent
    /// watches the writes through the mappings in
    /// [`BlockSpec::vmm_address`](crate::BlockSpec::vmm_address), and only those. A write by
    /// another way to a page that is not saved yet would be in the image. So from the
    /// [pause](Hooks::pause) that follows until [`Hooks::writes_unwatched`], also after the
    /// [resume](Hooks::resume), all other writers must be stopped: other processes that map the
    /// memory, such as vhost-user back-ends, and devices that write to pinned pages. Comes while
    /// the guest runs, before anything is watched.
    ///
    /// # Errors
    /// If this VMM has a device that cannot be stopped while its guest runs, such as one that is
    /// passed through (VFIO). The snapshot fails, nothing is watched, and the guest continues.
    /// [`SnapshotMode::Paused`](crate::SnapshotMode::Paused) is for such a guest.
    fn writes_watched(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    /// Writes are no longer watched, after [`Hooks::writes_watched`]: the snapshot has ended in any
    /// way, or its agent is lost. The writers that were stopped for it may continue; if the guest
    /// is still paused, only together with the guest. After
    /// [`Client::reattach`](crate::Client::reattach) this comes by the old channel, unless the new
    /// agent already watches writes. Then the new agent announces it once more by
    /// [`Hooks::writes_watched`], and ends it.
    fn writes_unwatched(&mut self) {}

    /// The guest is about to be given up to its destination, where it goes on from the state that
    /// was saved. For a VMM whose guest others may resume: if it has run since then, this is the
    /// last moment to say so.
    ///
    /// # Errors
    /// If the guest has run since its state was saved. The migration fails, and the guest stays.
    fn check_saved_guest(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    /// The guest is given up to its destination, and is [`Ownership::Relinquished`] now. Comes
    /// before the agent may send the commit. From now on the VMM resumes the guest only by
    /// [`Hooks::resume`], which still comes if no commit was sent. For a VMM that has others who
    /// would resume the guest: they must not any more.
    fn guest_given_up(&mut self) {}

    /// The hook with this name panicked, and the panic was caught. A VMM that can tell what is left
    /// of its state may log it, save what there is, or end the process. A panic in this hook is
    /// caught as well.
    fn hook_panicked(&mut self, hook: &'static str, message: &str) {
        let _ = (hook, message);
    }

    /// A job has reached another phase, or has made progress.
    fn event(&mut self, status: &JobStatus) {
        let _ = status;
    }

    /// The agent is lost, and nothing more comes. A guest that the agent had paused and that is
    /// ours was resumed just before, or left paused ([`Hooks::stay_paused`]) if its operator had
    /// paused it.
    ///
    /// The process of the agent may live for a moment longer and read guest memory.
    /// [`Client::remove_block`](crate::Client::remove_block) and
    /// [`Client::end_agent`](crate::Client::end_agent) wait for its exit.
    fn agent_lost(&mut self, ownership: Ownership) {
        let _ = ownership;
    }

    /// A [`Supervisor`](crate::Supervisor) has attached another agent after `agent_lost`, and the
    /// hooks that follow are from that one. It has the same blocks and trackers. A VMM needs this
    /// only if it wants to start something again: a job of the lost agent is not continued, except
    /// one that brings the memory of a guest which runs already. A VMM that awaits a guest has to
    /// start the incoming migration or the restore again. The hook may do that by a
    /// [`WeakClient`](crate::WeakClient).
    fn agent_attached(&mut self) {}
}

/// What a VMM says whose author has not written the hooks for guests of an operator.
fn no_guest(origin: &GuestOrigin) -> HookError {
    HookError::new(format!("this VMM takes no guest that an operator brings: {origin}"))
}
