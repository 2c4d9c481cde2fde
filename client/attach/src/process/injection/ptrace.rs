// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The requests of ptrace(2) that an injection needs, one function each, for x86-64.
//!
//! All of them concern one thread that *this* thread traces. Their effect on our own memory is what
//! the types say; what they do to the other process is decided in [`super::exchange`].
#![allow(unsafe_code)]

use rustix::io::Errno;
use std::ffi::{c_int, c_long, c_void};
use std::ptr::without_provenance_mut;

/// The registers of a thread: `struct user_regs_struct` of `sys/user.h`.
pub(super) type Registers = libc::user_regs_struct;

/// A set of blocked signals; bit 0 is signal 1.
pub(super) type SignalMask = u64;

// Requests, and what belongs to them, from the kernel's `linux/ptrace.h`.
const SEIZE: u32 = 0x4206;
const INTERRUPT: u32 = 0x4207;
const CONT: u32 = 7;
const SINGLESTEP: u32 = 9;
const DETACH: u32 = 17;
const SETOPTIONS: u32 = 0x4200;
const GETSIGINFO: u32 = 0x4202;
const GETREGSET: u32 = 0x4204;
const SETREGSET: u32 = 0x4205;
const GETSIGMASK: u32 = 0x420a;
const SETSIGMASK: u32 = 0x420b;
const GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const EVENT_STOP: c_int = 128;
const O_SUSPEND_SECCOMP: usize = 1 << 21;
const NT_PRSTATUS: usize = 1;

/// At which kind of stop a thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// `PTRACE_EVENT_STOP`: after an interrupt, or a group-stop.
    Event,
    /// A signal is about to be delivered.
    Signal(c_int),
}

/// `struct ptrace_rseq_configuration`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct RseqConfiguration {
    pointer: u64,
    size: u32,
    signature: u32,
    flags: u32,
    reserved: u32,
}

/// A thread, by its id.
#[derive(Debug, Clone, Copy)]
pub(super) struct Thread(pub(super) i32);

impl Thread {
    /// # Safety
    /// `address` and `argument` must be what `request` takes: numbers, or pointers to memory that
    /// is valid for what the kernel reads or writes there.
    unsafe fn request(
        self, request: u32, address: usize, argument: *mut c_void,
    ) -> Result<c_long, Errno> {
        let address: *mut c_void = without_provenance_mut(address);
        // SAFETY: by the contract of this function.
        let result = unsafe { libc::ptrace(request as _, self.0, address, argument) };
        if result == -1 {
            let error = std::io::Error::last_os_error();
            return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
        }
        Ok(result)
    }

    /// A request that takes numbers only.
    fn plain(self, request: u32, argument: usize) -> Result<(), Errno> {
        // SAFETY: the callers below use requests whose arguments are numbers.
        unsafe { self.request(request, 0, without_provenance_mut(argument)) }.map(drop)
    }

    /// Attaches without stopping it. No option is set: PTRACE_O_EXITKILL would kill the VMM when
    /// this thread ends.
    pub(super) fn seize(self) -> Result<(), Errno> {
        self.plain(SEIZE, 0)
    }

    /// Asks it to stop.
    pub(super) fn interrupt(self) -> Result<(), Errno> {
        self.plain(INTERRUPT, 0)
    }

    /// Lets it go on; a signal other than 0 is delivered.
    pub(super) fn go_on(self, signal: c_int) -> Result<(), Errno> {
        self.plain(CONT, signal.unsigned_abs() as usize)
    }

    /// Lets it run one instruction.
    pub(super) fn single_step(self) -> Result<(), Errno> {
        self.plain(SINGLESTEP, 0)
    }

    /// Lets it go for good.
    pub(super) fn detach(self) -> Result<(), Errno> {
        self.plain(DETACH, 0)
    }

    /// Switches its seccomp filters off until it is detached.
    pub(super) fn suspend_seccomp(self) -> Result<(), Errno> {
        self.plain(SETOPTIONS, O_SUSPEND_SECCOMP)
    }

    /// At which stop it is. None if it runs, or has ended.
    ///
    /// This asks the thread itself. The result of a wait could be taken away by any other thread of
    /// this process that waits for children.
    pub(super) fn stop(self) -> Result<Option<Stop>, Errno> {
        // SAFETY: all fields of the struct are numbers or bytes, for which zero is valid.
        let mut signal: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: the request writes one struct of this type.
        match unsafe { self.request(GETSIGINFO, 0, (&raw mut signal).cast()) } {
            Ok(_) if signal.si_code >> 8 == EVENT_STOP => Ok(Some(Stop::Event)),
            Ok(_) => Ok(Some(Stop::Signal(signal.si_signo))),
            Err(Errno::SRCH) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Its registers. None if it runs 32-bit code, which has others.
    pub(super) fn registers(self) -> Result<Option<Registers>, Errno> {
        // SAFETY: all fields are numbers.
        let mut registers: Registers = unsafe { std::mem::zeroed() };
        let mut place =
            libc::iovec { iov_base: (&raw mut registers).cast(), iov_len: size_of::<Registers>() };
        // SAFETY: the kernel writes at most `iov_len` bytes there.
        unsafe { self.request(GETREGSET, NT_PRSTATUS, (&raw mut place).cast()) }?;
        Ok((place.iov_len == size_of::<Registers>()).then_some(registers))
    }

    /// Sets all its registers.
    pub(super) fn set_registers(self, registers: &Registers) -> Result<(), Errno> {
        let start = std::ptr::from_ref(registers).cast_mut().cast();
        let mut place = libc::iovec { iov_base: start, iov_len: size_of::<Registers>() };
        // SAFETY: the kernel reads `iov_len` bytes there and writes none.
        unsafe { self.request(SETREGSET, NT_PRSTATUS, (&raw mut place).cast()) }.map(drop)
    }

    /// The signals that it blocks. In a call like ppoll, which blocks others for a while, these are
    /// the ones that it blocks afterwards.
    pub(super) fn signal_mask(self) -> Result<SignalMask, Errno> {
        let mut mask: SignalMask = 0;
        // SAFETY: the kernel writes 8 bytes, the size that is given.
        unsafe { self.request(GETSIGMASK, size_of::<SignalMask>(), (&raw mut mask).cast()) }?;
        Ok(mask)
    }

    /// Sets the signals that it blocks.
    pub(super) fn set_signal_mask(self, mask: SignalMask) -> Result<(), Errno> {
        let mut mask = mask;
        // SAFETY: the kernel reads 8 bytes, the size that is given.
        unsafe { self.request(SETSIGMASK, size_of::<SignalMask>(), (&raw mut mask).cast()) }
            .map(drop)
    }

    /// Address of its `struct rseq`. None if it has none, or the kernel is older than 5.13.
    pub(super) fn rseq(self) -> Option<u64> {
        let mut rseq = RseqConfiguration::default();
        let size = size_of::<RseqConfiguration>();
        // SAFETY: the kernel writes at most `size` bytes.
        unsafe { self.request(GET_RSEQ_CONFIGURATION, size, (&raw mut rseq).cast()) }.ok()?;
        (rseq.pointer != 0).then_some(rseq.pointer)
    }
}
