// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The exchange on x86-64: stop a thread, run system calls in it, let it go on.
//!
//! [`super`] says why each step is as it is.

use super::ptrace::{Registers, SignalMask, Stop, Thread};
use super::{InjectionError, Outcome, Seccomp, syscall_instruction};
use crate::process::target::{ProcessError, TargetProcess};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How much longer the caller waits than the exchange. A result that came in time arrives.
const GRACE: Duration = Duration::from_millis(200);

/// How long a stop is waited for without sleeping. The thread is stopped while we sleep.
const SPINNING: Duration = Duration::from_millis(2);

/// Interval of the looks at a thread that takes longer to stop.
const INTERVAL: Duration = Duration::from_micros(100);

/// Length of the `syscall` instruction.
const SYSCALL_LENGTH: u64 = 2;

/// Signals that the kernel forces: SIGTRAP after the step, SIGSYS if a seccomp filter says so.
const FORCED: SignalMask = 1 << (libc::SIGTRAP - 1) | 1 << (libc::SIGSYS - 1);

/// Stops the main thread of `target`, runs `work` with it, and lets it go on. Waits `limit` for the
/// thread to stop, and for each system call.
///
/// Everything happens in a thread of its own, because ptrace belongs to a thread. When that one
/// ends, the kernel detaches.
///
/// # Errors
/// If the thread cannot be stopped, or `work` fails.
pub(in crate::process) fn run<T: Send + 'static>(
    target: &TargetProcess, seccomp: Seccomp, limit: Duration,
    work: impl FnOnce(&mut Stopped) -> Result<T, InjectionError> + Send + 'static,
) -> Result<Outcome<T>, InjectionError> {
    let pid = target.pid();
    let instruction = syscall_instruction(target)?;
    let status = target.status()?;
    if status.ignored_signals & 1 << (libc::SIGTRAP - 1) != 0 {
        return Err(InjectionError::IgnoresTrap { pid });
    }
    let memory = target.memory()?;
    let target = target.try_clone()?;
    let deadline = Instant::now() + limit;
    let exchange = move || {
        let thread = Thread(target.raw_pid());
        let tracee = Tracee { target, thread, memory, instruction, limit, deadline };
        let mut stopped = Stopped::attach(tracee)?;
        if status.seccomp != 0 {
            stopped.tracee.pass_seccomp(status.seccomp, seccomp)?;
        }
        let value = work(&mut stopped)?;
        let since = stopped.parked.since;
        drop(stopped);
        Ok(Outcome { value, stopped: since.elapsed() })
    };
    let (sender, receiver) = mpsc::sync_channel(1);
    let body = move || {
        // Nobody receives it if the caller has given up.
        let _ = sender.send(exchange());
    };
    let tracer = std::thread::Builder::new().name("inject".to_owned()).spawn(body);
    let tracer = tracer.map_err(InjectionError::Thread)?;
    match receiver.recv_timeout(limit + GRACE) {
        Ok(outcome) => {
            // It has nothing more to do. What follows finds the process detached.
            let _ = tracer.join();
            outcome
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(InjectionError::Panicked { pid }),
        Err(mpsc::RecvTimeoutError::Timeout) => Err(InjectionError::DoesNotReturn { pid, limit }),
    }
}

/// The main thread of a process, at a PTRACE_EVENT_STOP with its own registers and signal mask. It
/// goes on when this is dropped.
pub(in crate::process) struct Stopped {
    tracee: Tracee,
    parked: Parked,
}

/// A thread that this thread traces. It is detached when this is dropped.
struct Tracee {
    target: TargetProcess,
    thread: Thread,
    memory: File,
    /// Address of a `syscall` instruction.
    instruction: u64,
    limit: Duration,
    /// When the caller gives up.
    deadline: Instant,
}

/// What a thread had at a PTRACE_EVENT_STOP.
struct Parked {
    registers: Registers,
    mask: SignalMask,
    /// The last moment at which it was seen running.
    since: Instant,
}

/// How a step ended.
enum Step {
    /// With this in `rax`.
    Returned(u64),
    /// A signal came before it. Everything is as before the step, and the signal is not delivered
    /// yet.
    Before(i32),
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // Fails if the thread is gone or does not stop. Then the end of this thread detaches.
        let _ = self.thread.detach();
    }
}

impl Stopped {
    fn attach(tracee: Tracee) -> Result<Self, InjectionError> {
        let attach = "attach to the main thread of";
        tracee.thread.seize().map_err(|source| tracee.target.refused(attach, source))?;
        // ptrace took the number of the process. It was the right one if the process is still
        // there.
        if tracee.target.has_exited()? {
            return Err(ProcessError::Gone { pid: tracee.target.pid() }.into());
        }
        let parked = tracee.park(None)?;
        let mut stopped = Self { tracee, parked };
        stopped.leave_restartable_sequence()?;
        Ok(stopped)
    }

    /// The process.
    pub(in crate::process) fn target(&self) -> &TargetProcess {
        &self.tracee.target
    }

    /// The caller has given up: what it will not know about must be undone.
    pub(in crate::process) fn is_late(&self) -> bool {
        Instant::now() > self.tracee.deadline
    }

    /// Runs a system call in the thread.
    ///
    /// # Errors
    /// [`InjectionError::Call`] if the call itself fails.
    pub(in crate::process) fn system_call(
        &mut self, number: i64, arguments: [u64; 6],
    ) -> Result<u64, InjectionError> {
        /// `MAX_ERRNO` of the kernel.
        const MAX_ERRNO: i64 = 4095;
        let result = loop {
            match self.tracee.step(&self.parked, number, arguments)? {
                Step::Returned(result) => {
                    let since = self.parked.since;
                    self.parked = Parked { since, ..self.tracee.park(Some(0))? };
                    break result.cast_signed();
                }
                Step::Before(signal) => {
                    self.parked = self.tracee.park(Some(signal))?;
                    self.leave_restartable_sequence()?;
                }
            }
        };
        if (-MAX_ERRNO..0).contains(&result) {
            let source = Errno::from_raw_os_error(-result as i32);
            return Err(InjectionError::Call { pid: self.tracee.target.pid(), number, source });
        }
        Ok(result.cast_unsigned())
    }

    /// Lets the thread go on until it is in no restartable sequence.
    fn leave_restartable_sequence(&mut self) -> Result<(), InjectionError> {
        while self.tracee.in_restartable_sequence(self.parked.registers.rip) {
            if self.is_late() {
                return Err(self.tracee.does_not_stop());
            }
            // On its way to user mode the kernel aborts the sequence. So it must get there.
            self.tracee.go_on(0)?;
            self.parked = self.tracee.park(None)?;
        }
        Ok(())
    }
}

impl Tracee {
    /// Leads the thread to a PTRACE_EVENT_STOP. A thread that is at a stop for a signal goes on
    /// with `signal`; 0 delivers none. Signals that come first are delivered.
    fn park(&self, signal: Option<i32>) -> Result<Parked, InjectionError> {
        self.thread.interrupt().map_err(|source| self.failed("interrupt", source))?;
        // From a stop for a signal it comes to the next stop without running anything.
        if let Some(signal) = signal {
            self.go_on(signal)?;
        }
        let since = loop {
            match self.wait_for_stop(Some(self.limit))? {
                Some((Stop::Event, since)) => break since,
                Some((Stop::Signal(signal), _)) => self.go_on(signal)?,
                None => return Err(self.does_not_stop()),
            }
        };
        let mask = self.thread.signal_mask().map_err(|source| self.failed("read", source))?;
        let registers = self.thread.registers().map_err(|source| self.failed("read", source))?;
        let pid = self.target.pid();
        let registers = registers.ok_or(InjectionError::Not64Bit { pid })?;
        Ok(Parked { registers, mask, since })
    }

    /// Steps over the system call, and restores the registers and the mask. The thread is then at a
    /// stop for a signal.
    fn step(
        &self, parked: &Parked, number: i64, arguments: [u64; 6],
    ) -> Result<Step, InjectionError> {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let registers = Registers {
            rip: self.instruction,
            rax: number.cast_unsigned(),
            // In no system call: there is none to restart.
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..parked.registers
        };
        // From here on the thread is not as it was, until it is restored: nothing but the step.
        let blocked = self.thread.set_signal_mask(!FORCED);
        let set = blocked.and_then(|()| self.thread.set_registers(&registers));
        let stepped = set
            .and_then(|()| self.thread.single_step())
            .map_err(|source| self.failed("step", source))
            .and_then(|()| self.wait_for_step());
        let restored = self.thread.set_registers(&parked.registers);
        let unblocked = self.thread.set_signal_mask(parked.mask);
        let step = stepped?;
        restored.and(unblocked).map_err(|source| self.failed("restore", source))?;
        Ok(step)
    }

    /// Waits for the end of the step, without bound: to leave would be to leave the thread with our
    /// registers. After the time limit, a call that waits is interrupted.
    fn wait_for_step(&self) -> Result<Step, InjectionError> {
        let (before, after) = (self.instruction, self.instruction + SYSCALL_LENGTH);
        let mut limit = Some(self.limit);
        let mut denied = false;
        loop {
            let Some((stop, _)) = self.wait_for_stop(limit)? else {
                limit = None;
                log::warn!(
                    "process {}: a system call takes longer than {:?}",
                    self.target.pid(),
                    self.limit
                );
                // Fails only if the thread is gone, and the next wait sees that.
                let _ = self.thread.interrupt();
                continue;
            };
            let registers = self.thread.registers().map_err(|e| self.failed("read", e))?;
            let (rip, rax) = registers.map_or((0, 0), |registers| (registers.rip, registers.rax));
            let went_on = match stop {
                // A group-stop, or our interrupt. Both come before a signal.
                Stop::Event if rip == before => self.thread.single_step(),
                Stop::Event if rip == after => self.thread.go_on(0),
                Stop::Signal(libc::SIGTRAP) if rip == after => {
                    let not_permitted = i64::from(-libc::EPERM).cast_unsigned();
                    return Ok(Step::Returned(if denied { not_permitted } else { rax }));
                }
                // A seccomp filter forced it. The signal of the step follows.
                Stop::Signal(libc::SIGSYS) if rip == after => {
                    denied = true;
                    self.thread.go_on(0)
                }
                Stop::Signal(signal) if rip == before => return Ok(Step::Before(signal)),
                Stop::Event | Stop::Signal(_) => Err(Errno::PROTO),
            };
            went_on.map_err(|source| self.failed("step", source))?;
        }
    }

    /// Waits until the thread is at a stop, at most `limit`. Returns the stop, and the last moment
    /// at which the thread was seen running.
    ///
    /// There is nothing that both waits and can be told when to give up: so this looks again and
    /// again, first without a break, then at intervals.
    fn wait_for_stop(
        &self, limit: Option<Duration>,
    ) -> Result<Option<(Stop, Instant)>, InjectionError> {
        let begin = Instant::now();
        loop {
            let now = Instant::now();
            if let Some(stop) = self.thread.stop().map_err(|e| self.failed("look at", e))? {
                return Ok(Some((stop, now)));
            }
            let waited = now - begin;
            if waited < SPINNING {
                std::thread::yield_now();
                continue;
            }
            if self.target.wait(Some(INTERVAL))? || !self.is_ours()? {
                return Err(ProcessError::Gone { pid: self.target.pid() }.into());
            }
            if limit.is_some_and(|limit| waited > limit) {
                return Ok(None);
            }
        }
    }

    /// False if this thread does not trace it any more: the process has become another one by
    /// execve(2) of another of its threads, or its main thread has ended.
    fn is_ours(&self) -> Result<bool, ProcessError> {
        let own = rustix::thread::gettid().as_raw_pid().unsigned_abs();
        Ok(self.target.status()?.tracer == own)
    }

    /// Lets the thread go on from a stop; a signal other than 0 is delivered.
    fn go_on(&self, signal: i32) -> Result<(), InjectionError> {
        self.thread.go_on(signal).map_err(|source| self.failed("continue", source))
    }

    /// Makes sure that no filter kills the process for our system call.
    fn pass_seccomp(&self, mode: u32, seccomp: Seccomp) -> Result<(), InjectionError> {
        match self.thread.suspend_seccomp() {
            Ok(()) => Ok(()),
            // No capability, or a kernel that cannot.
            Err(Errno::PERM | Errno::INVAL) if seccomp == Seccomp::Harmless => Ok(()),
            Err(Errno::PERM | Errno::INVAL) => {
                Err(InjectionError::Seccomp { pid: self.target.pid(), mode })
            }
            Err(source) => Err(self.failed("suspend the seccomp filters of", source)),
        }
    }

    /// True if `rip` is in the restartable sequence that the thread has announced.
    fn in_restartable_sequence(&self, rip: u64) -> bool {
        /// Offset of `rseq_cs` in `struct rseq`.
        const SEQUENCE: u64 = 8;
        /// Offset of `start_ip` and, after it, `post_commit_offset` in `struct rseq_cs`.
        const START: u64 = 8;
        let read = |address: u64| {
            let mut bytes = [0; 8];
            self.memory.read_exact_at(&mut bytes, address).ok()?;
            Some(u64::from_le_bytes(bytes))
        };
        let inside = || {
            let sequence = read(self.thread.rseq()?.checked_add(SEQUENCE)?)?;
            let start = read(sequence.checked_add(START)?)?;
            let length = read(sequence.checked_add(START + 8)?)?;
            Some(sequence != 0 && rip.wrapping_sub(start) < length)
        };
        inside().unwrap_or(false)
    }

    fn does_not_stop(&self) -> InjectionError {
        let (pid, limit) = (self.target.pid(), self.limit);
        match self.target.status() {
            Ok(status) => InjectionError::DoesNotStop { pid, limit, state: status.state },
            Err(error) => error.into(),
        }
    }

    fn failed(&self, action: &'static str, source: Errno) -> InjectionError {
        let pid = self.target.pid();
        match source {
            Errno::SRCH => ProcessError::Gone { pid }.into(),
            source => InjectionError::Trace { pid, action, source },
        }
    }
}
