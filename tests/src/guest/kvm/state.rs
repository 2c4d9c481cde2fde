// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The vCPU's state as bytes. It has only registers, because the guest uses no FPU, no MSR and no
//! interrupt.
#![allow(unsafe_code)]

use super::error::{GuestError, kvm_error};
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;

/// Bytes of a saved state.
pub(super) const SAVED_LENGTH: usize = size_of::<kvm_regs>() + size_of::<kvm_sregs>();

/// The registers of a paused vCPU.
pub(super) fn save(fd: &VcpuFd) -> Result<Vec<u8>, GuestError> {
    let regs = fd.get_regs().map_err(kvm_error("read registers"))?;
    let sregs = fd.get_sregs().map_err(kvm_error("read control registers"))?;
    Ok([bytes_of(&regs), bytes_of(&sregs)].concat())
}

/// Sets the registers of a paused vCPU to those of another one.
pub(super) fn load(fd: &VcpuFd, saved: &[u8]) -> Result<(), GuestError> {
    if saved.len() != SAVED_LENGTH {
        return Err(GuestError::State { length: saved.len() });
    }
    let (regs, sregs) = saved.split_at(size_of::<kvm_regs>());
    fd.set_sregs(&from_bytes(sregs)).map_err(kvm_error("set control registers"))?;
    fd.set_regs(&from_bytes(regs)).map_err(kvm_error("set registers"))
}

/// Structs of `linux/kvm.h` for which any bytes are a valid value, and which have no padding.
///
/// # Safety
/// The type is such a struct.
unsafe trait Plain: Default {}
// SAFETY: 18 registers of 8 bytes.
unsafe impl Plain for kvm_regs {}
const _: () = assert!(size_of::<kvm_regs>() == 18 * 8);
// SAFETY: 8 segments of 24 bytes and 2 tables of 16 with their padding named, 7 registers and 4
// words of interrupts of 8.
unsafe impl Plain for kvm_sregs {}
const _: () = assert!(size_of::<kvm_sregs>() == 8 * 24 + 2 * 16 + 7 * 8 + 4 * 8);

fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: every byte of a plain struct is initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// A value of the bytes that [`bytes_of`] gave; missing ones are zero.
fn from_bytes<T: Plain>(bytes: &[u8]) -> T {
    let mut value = T::default();
    // SAFETY: any bytes are a valid plain struct, and no more are copied than either side has.
    unsafe {
        let count = bytes.len().min(size_of::<T>());
        std::ptr::copy_nonoverlapping(
            bytes.as_ptr(),
            std::ptr::from_mut(&mut value).cast::<u8>(),
            count,
        );
    }
    value
}
