// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What happens when a thread makes a system call that its filter refuses: the call fails with
//! EPERM, and the agent says so in its log.
//!
//! The kernel sends SIGSYS to the thread. The handler makes the call fail, and writes which it was
//! into a pipe, since it may do nothing else. The reactor's thread reads the pipe.
#![allow(unsafe_code)]

use rustix::pipe::{PipeFlags, pipe_with};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use vmm_sys_util::signal::register_signal_handler;

/// The writing end of the pipe, which is never closed.
static PIPE: AtomicI32 = AtomicI32::new(-1);

/// Bytes of a note: the number of the system call, and the name of the thread.
const NOTE: usize = 8 + NAME;
/// Longest name of a thread in bytes, with a zero at its end.
const NAME: usize = 16;

/// The reading end of the pipe.
#[derive(Debug)]
pub struct Refusals(OwnedFd);

/// Begins to note refused system calls.
///
/// # Errors
/// If the kernel refuses a pipe or the handler.
pub(super) fn note() -> io::Result<Refusals> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    PIPE.store(writer.as_raw_fd(), Ordering::Relaxed);
    std::mem::forget(writer);
    register_signal_handler(libc::SIGSYS, handler)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    Ok(Refusals(reader))
}

/// Makes all threads share one arena of the library's allocator. For a second one it would count
/// processors, and before it gives memory of that back it would read a setting: both in files that
/// no thread may open. Threads allocate little, and have a cache of their own before the arena.
#[cfg(target_env = "gnu")]
pub(super) fn share_arena() {
    // SAFETY: it sets a number of the allocator. No other thread runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

#[cfg(not(target_env = "gnu"))]
pub(super) fn share_arena() {}

impl Refusals {
    /// The descriptor that is readable when there is one.
    pub fn fd(&self) -> &OwnedFd {
        &self.0
    }

    /// Writes what was noted into the log.
    pub fn log(&self) {
        let mut note = [0; NOTE];
        while rustix::io::read(&self.0, &mut note).is_ok_and(|count| count == NOTE) {
            let (number, name) = note.split_at(8);
            let number = i64::from_ne_bytes(number.try_into().unwrap_or_default());
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            log::error!(
                "the sandbox has refused system call {number} of thread {}: a defect, or somebody \
                 has taken this agent over",
                String::from_utf8_lossy(name)
            );
        }
    }
}

/// Makes the system call fail. Only what a signal handler may do happens here.
extern "C" fn handler(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let mut note = [0u8; NOTE];
    // SAFETY: the kernel passes valid pointers to a handler with SA_SIGINFO, which is that of
    // SIGSYS. The number of the call is in `si_syscall`, behind `si_call_addr`, in the part of
    // `siginfo_t` that begins 16 bytes after its start. The registers are those of the thread when
    // the handler returns: nobody else uses them meanwhile. PR_GET_NAME writes 16 bytes, which the
    // note has behind the first 8. `write` is safe in a handler.
    unsafe {
        let number: libc::c_int = *info.cast::<u8>().add(24).cast();
        note[..8].copy_from_slice(&i64::from(number).to_ne_bytes());
        let context = &mut *context.cast::<libc::ucontext_t>();
        #[cfg(target_arch = "x86_64")]
        {
            context.uc_mcontext.gregs[libc::REG_RAX as usize] = i64::from(-libc::EPERM);
        }
        #[cfg(target_arch = "aarch64")]
        {
            context.uc_mcontext.regs[0] = i64::from(-libc::EPERM) as u64;
        }
        libc::prctl(libc::PR_GET_NAME, note.as_mut_ptr().add(8));
        let pipe: RawFd = PIPE.load(Ordering::Relaxed);
        // If the pipe is full, there is enough to log.
        libc::write(pipe, note.as_ptr().cast(), NOTE);
    }
}
