// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU on its own thread, and the request that it leaves the guest.
#![allow(unsafe_code)]

use super::error::{GuestError, kvm_error};
use kvm_ioctls::VcpuFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// The vCPU, and the byte that tells KVM to leave it. Both are in one mapping and are dropped
/// together.
pub(super) struct Vcpu {
    fd: Mutex<VcpuFd>,
    immediate_exit: *mut u8,
}

// SAFETY: the pointer leads into the mapping of `fd`, which lives as long, and is only used for
// atomic accesses.
unsafe impl Send for Vcpu {}
// SAFETY: as above.
unsafe impl Sync for Vcpu {}

impl Vcpu {
    pub(super) fn new(mut fd: VcpuFd) -> Result<Self, GuestError> {
        register_kick()?;
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
        Ok(Self { fd: Mutex::new(fd), immediate_exit })
    }

    /// The vCPU, for access to its registers. Waits until it is paused.
    pub(super) fn registers(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs it.
    pub(super) fn start(
        this: &Arc<Self>,
    ) -> Result<JoinHandle<Result<(), GuestError>>, GuestError> {
        let vcpu = Arc::clone(this);
        let thread = std::thread::Builder::new().name("vcpu0".into()).spawn(move || vcpu.run());
        thread.map_err(|error| GuestError::Thread(error.to_string()))
    }

    /// Makes it leave the guest, and returns the result.
    pub(super) fn stop(
        &self, thread: JoinHandle<Result<(), GuestError>>,
    ) -> Result<(), GuestError> {
        // The byte stops a vCPU that has not entered the kernel yet, and the signal one that has.
        // With both there is no gap.
        self.immediate_exit().store(1, Ordering::SeqCst);
        if let Err(error) = thread.kill(SIGRTMIN()) {
            log::debug!("the vCPU thread has ended already ({error})");
        }
        let ended = thread.join();
        self.immediate_exit().store(0, Ordering::SeqCst);
        ended.unwrap_or_else(|_| Err(GuestError::Thread("panicked".into())))
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: valid as long as `self`, aligned as any byte is, and meant to be written while
        // the kernel reads it.
        unsafe { AtomicU8::from_ptr(self.immediate_exit) }
    }

    /// Runs until the request to leave.
    fn run(&self) -> Result<(), GuestError> {
        let mut fd = self.registers();
        loop {
            match fd.run() {
                Ok(exit) => return Err(GuestError::Exit(format!("{exit:?}"))),
                Err(error) => match std::io::Error::from(error).kind() {
                    std::io::ErrorKind::Interrupted
                        if self.immediate_exit().load(Ordering::SeqCst) != 0 =>
                    {
                        return Ok(());
                    }
                    // A signal that was not meant for the vCPU.
                    std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock => {}
                    _ => return Err(kvm_error("run the vCPU")(error)),
                },
            }
        }
    }
}

/// Installs a handler, so that the signal interrupts a system call instead of ending the process.
/// Once for each process.
fn register_kick() -> Result<(), GuestError> {
    extern "C" fn nothing<T, U>(_: i32, _: *mut T, _: *mut U) {}
    static REGISTERED: OnceLock<Result<(), i32>> = OnceLock::new();
    let registered = REGISTERED
        .get_or_init(|| register_signal_handler(SIGRTMIN(), nothing).map_err(|e| e.errno()));
    registered.map_err(|errno| GuestError::Thread(format!("cannot handle SIGRTMIN: errno {errno}")))
}
