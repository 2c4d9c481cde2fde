// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! System calls that the main thread of another process runs for us.
//!
//! A userfaultfd belongs to the address space of the process that creates it. An unmodified VMM
//! creates none, so this makes its main thread create one, by ptrace. The thread is stopped for a
//! fraction of a millisecond and notices nothing. The other threads, and so the vCPUs, run on.
//!
//! # The exchange
//!
//! 1. PTRACE_SEIZE and PTRACE_INTERRUPT. Signals that arrive first are passed on. The thread comes
//!    to a PTRACE_EVENT_STOP, even if it waits in a system call or is stopped by SIGSTOP.
//! 2. For each system call: block signals, point the registers at a `syscall` instruction of the
//!    vDSO, single-step, restore the registers and the mask. Then the thread is led to the next
//!    PTRACE_EVENT_STOP, without running anything.
//! 3. PTRACE_DETACH.
//!
//! # What the thread was doing
//!
//! *In a system call*: the kernel has ended it with -ERESTARTNOHAND, -ERESTART_RESTARTBLOCK or the
//! like in `rax`. Whether to start it again is decided at the end of get_signal() in
//! kernel/signal.c, from `rax` and `orig_rax`. Both kinds of stop used here are inside that
//! function. `orig_rax` is -1 during the step, so nothing is restarted then; both registers are
//! back before the thread goes on, so the kernel restarts the call with the time that was left.
//!
//! The kernel ends some calls with EINTR after any stop, also after SIGSTOP and SIGCONT:
//! epoll_wait, rt_sigtimedwait, semop, io_uring_enter and others (signal(7), last section). A
//! program must expect that, and VMMs do. This does not hide it.
//!
//! *In a call with a signal mask of its own* (ppoll, sigsuspend): PTRACE_SETSIGMASK makes the
//! kernel forget the mask that it would set afterwards. PTRACE_GETSIGMASK gives that very mask, and
//! it is what is restored. The restarted call sets its own mask again.
//!
//! *Signals*: all are blocked during the step, so that no handler sees our registers. They stay
//! pending. SIGTRAP and SIGSYS are not blocked: the kernel forces them, and would reset their
//! handlers if they were. SIGSTOP cannot be blocked. If one of these is delivered before the step,
//! everything is restored, the signal is passed on, and the exchange begins again. A process that
//! ignores SIGTRAP is refused, because a forced one resets that.
//!
//! *In a restartable sequence* (rseq(2)): a step elsewhere would make the kernel forget that it has
//! to be restarted. The thread is let go and stopped again until it is outside.
//!
//! # If something fails
//!
//! Errors and panics restore and detach. If the thread does not come back from a step in time, the
//! caller gets an error, and the thread that traces stays: it restores the registers when it can.
//!
//! If *our process is killed*, the kernel detaches the thread as it is. Between two system calls
//! that is harmless: the thread has its own registers, and a PTRACE_EVENT_STOP leaves no trace. In
//! one step it is not. Until the registers are restored, the VMM would crash in the vDSO; until the
//! thread is at the next PTRACE_EVENT_STOP, SIGTRAP would be delivered to it. These some ten
//! microseconds contain nothing but the step. PTRACE_O_EXITKILL is never set: it would kill the VMM
//! whenever we die.
//!
//! # Seccomp
//!
//! The filters of the target apply to the call, and one that kills would kill the VMM. Where this
//! process has CAP_SYS_ADMIN, the filters are switched off for the exchange
//! (PTRACE_O_SUSPEND_SECCOMP). Otherwise there is no way to ask a filter first: reading it needs
//! the same capability. Then the caller must know it ([`Seccomp`]); by default the call is refused.
//!
//! Only x86-64 is supported. Elsewhere the result is [`InjectionError::Architecture`].

use super::target::{ProcessError, TargetProcess};
use rustix::io::Errno;
use std::time::Duration;

// The exchange, for x86-64.
#[cfg(target_arch = "x86_64")]
mod exchange;
// The requests of ptrace, unsafe.
#[cfg(target_arch = "x86_64")]
mod ptrace;

#[cfg(target_arch = "x86_64")]
pub(super) use exchange::{Stopped, run};
#[cfg(not(target_arch = "x86_64"))]
pub(super) use other::{Stopped, run};

/// What is known about the seccomp filters of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Seccomp {
    /// Nothing. If the process has a filter that cannot be switched off, it is left alone.
    #[default]
    Unknown,
    /// They do not kill the process for the call. For example those of QEMU's `-sandbox on`, which
    /// lists what is denied, and denies neither userfaultfd nor close.
    Harmless,
}

/// Why no system call could be run in another process.
#[derive(Debug, thiserror::Error)]
pub enum InjectionError {
    /// The process cannot be looked at, or traced.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// This program cannot do it on this kind of machine.
    #[error(
        "system calls can be run in another process on x86-64 only, and this machine is {}",
        std::env::consts::ARCH
    )]
    Architecture,
    /// The process runs 32-bit code.
    #[error("process {pid} runs 32-bit code; only 64-bit VMMs are supported")]
    Not64Bit {
        /// Its id.
        pid: u32,
    },
    /// No system call instruction is found.
    #[error(
        "process {pid} has no vDSO with a syscall instruction: start the kernel without vdso=0"
    )]
    NoVdso {
        /// Its id.
        pid: u32,
    },
    /// The process ignores SIGTRAP.
    #[error(
        "process {pid} ignores SIGTRAP, and a single step would reset that: start it with the \
         default action of the signal"
    )]
    IgnoresTrap {
        /// Its id.
        pid: u32,
    },
    /// The process has a seccomp filter that could kill it.
    #[error(
        "process {pid} has a seccomp filter (mode {mode}) that may kill it for a system call, and \
         switching it off for a moment needs CAP_SYS_ADMIN: give this program the capability, or \
         say that the filter is harmless (as that of QEMU -sandbox on)"
    )]
    Seccomp {
        /// Its id.
        pid: u32,
        /// 1 strict, 2 filter.
        mode: u32,
    },
    /// The thread did not stop in time. It was not touched.
    #[error(
        "the main thread of process {pid} did not stop within {limit:?} (state {state}; D is a \
         wait for a disk or a frozen process): try again"
    )]
    DoesNotStop {
        /// Its id.
        pid: u32,
        /// How long it was waited for.
        limit: Duration,
        /// Its state in `/proc/PID/status`.
        state: char,
    },
    /// The thread has not come back from the system call.
    #[error(
        "the main thread of process {pid} did not come back from a system call within {limit:?}: \
         this program keeps tracing it and restores its registers when it does; do not end this \
         program before"
    )]
    DoesNotReturn {
        /// Its id.
        pid: u32,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The thread came back too late. The process has no new descriptor.
    #[error("a system call in process {pid} took longer than {limit:?} and was undone: try again")]
    Late {
        /// Its id.
        pid: u32,
        /// How long it may take.
        limit: Duration,
    },
    /// The system call in the process failed.
    #[error("system call {number} failed in process {pid}")]
    Call {
        /// The process.
        pid: u32,
        /// The system call.
        number: i64,
        /// What the kernel said there.
        #[source]
        source: Errno,
    },
    /// A request of ptrace failed.
    #[error("cannot {action} the main thread of process {pid}")]
    Trace {
        /// Its id.
        pid: u32,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// No thread could be started for the exchange.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// The exchange panicked. The process was detached.
    #[error("the thread that traces process {pid} panicked; the process was restored")]
    Panicked {
        /// Its id.
        pid: u32,
    },
}

/// What the exchange returned, and how long it took.
#[derive(Debug)]
pub(super) struct Outcome<T> {
    /// What the exchange returned.
    pub(super) value: T,
    /// How long the main thread was stopped, at most.
    pub(super) stopped: Duration,
}

/// Size of the largest vDSO that is read.
const MAX_VDSO: u64 = 1 << 20;

/// Address of a `syscall` instruction in the vDSO of the process.
///
/// It need not be an instruction of the vDSO: the bytes alone count.
fn syscall_instruction(target: &TargetProcess) -> Result<u64, InjectionError> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    let none = InjectionError::NoVdso { pid: target.pid() };
    let mappings = target.mappings()?;
    let Some(vdso) =
        mappings.iter().find(|mapping| mapping.path.as_deref() == Some("[vdso]".as_ref()))
    else {
        return Err(none);
    };
    let mut code = vec![0; (vdso.end - vdso.start).min(MAX_VDSO) as usize];
    std::os::unix::fs::FileExt::read_exact_at(&target.memory()?, &mut code, vdso.start)
        .map_err(|source| target.refused("read the vDSO of", source))?;
    let at = code.windows(2).position(|bytes| bytes == SYSCALL);
    at.map(|at| vdso.start + at as u64).ok_or(none)
}

/// The exchange on other architectures: there is none.
#[cfg(not(target_arch = "x86_64"))]
mod other {
    use super::*;

    /// The main thread of a process. Nobody can have one.
    pub(in super::super) enum Stopped {}

    impl Stopped {
        pub(in super::super) fn system_call(
            &mut self, _: i64, _: [u64; 6],
        ) -> Result<u64, InjectionError> {
            match *self {}
        }

        pub(in super::super) fn target(&self) -> &TargetProcess {
            match *self {}
        }

        pub(in super::super) fn is_late(&self) -> bool {
            match *self {}
        }
    }

    /// Refuses.
    pub(in super::super) fn run<T: Send + 'static>(
        target: &TargetProcess, _: Seccomp, _: Duration,
        _: impl FnOnce(&mut Stopped) -> Result<T, InjectionError> + Send + 'static,
    ) -> Result<Outcome<T>, InjectionError> {
        let _ = syscall_instruction(target)?;
        Err(InjectionError::Architecture)
    }
}
