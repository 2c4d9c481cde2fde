// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The requests of vhost-user that hand over memory: codes, feature bits, and the payloads of the
//! vhost crate.

use super::Role;
use super::codec::{DecodeError, Decoder};
pub use vhost::vhost_user::message::{
    FrontendReq, VhostUserLog, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};

/// The least role whose connection may send this request. If no connection owns the memory yet, the
/// one that sends a request of [`Role::Vmm`] becomes the VMM.
pub fn required_role(request: FrontendReq) -> Role {
    match request {
        FrontendReq::SET_OWNER
        | FrontendReq::SET_MEM_TABLE
        | FrontendReq::ADD_MEM_REG
        | FrontendReq::REM_MEM_REG
        | FrontendReq::SET_LOG_BASE
        | FrontendReq::SET_LOG_FD
        | FrontendReq::SET_BACKEND_REQ_FD => Role::Vmm,
        _ => Role::Operator,
    }
}

/// A memory region of `VHOST_USER_SET_MEM_TABLE`, `ADD_MEM_REG` or `REM_MEM_REG`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// Address at which the VMM has it mapped.
    pub vmm_address: u64,
    /// Offset in the file.
    pub fd_offset: u64,
}

fn decode_region(decoder: &mut Decoder<'_>) -> Result<Region, DecodeError> {
    Ok(Region {
        gpa: decoder.u64("guest_phys_addr")?,
        length: decoder.u64("memory_size")?,
        vmm_address: decoder.u64("user_addr")?,
        fd_offset: decoder.u64("mmap_offset")?,
    })
}

/// Reads the body of `VHOST_USER_SET_MEM_TABLE`.
///
/// # Errors
/// The field that is wrong.
pub fn decode_mem_table(body: &[u8]) -> Result<Vec<Region>, DecodeError> {
    let mut decoder = Decoder::new(body);
    let count = decoder.u32("num_regions")?;
    decoder.u32("padding")?;
    if count as usize > super::frame::MAX_FDS {
        return Err(DecodeError::InvalidValue {
            field: "num_regions",
            value: count.into(),
            allowed: "at most 32",
        });
    }
    let regions = (0..count).map(|_| decode_region(&mut decoder)).collect::<Result<Vec<_>, _>>()?;
    decoder.finish()?;
    Ok(regions)
}

/// Reads the body of `VHOST_USER_ADD_MEM_REG` or `VHOST_USER_REM_MEM_REG`.
///
/// # Errors
/// The field that is wrong.
pub fn decode_single_region(body: &[u8]) -> Result<Region, DecodeError> {
    let mut decoder = Decoder::new(body);
    decoder.u64("padding")?;
    let region = decode_region(&mut decoder)?;
    decoder.finish()?;
    Ok(region)
}

/// Reads the body of a request that is one number.
///
/// # Errors
/// The field that is wrong.
pub fn decode_u64(body: &[u8]) -> Result<u64, DecodeError> {
    let mut decoder = Decoder::new(body);
    let value = decoder.u64("value")?;
    decoder.finish()?;
    Ok(value)
}

/// Reads the body of `VHOST_USER_SET_LOG_BASE`: size and offset of the log in its file, in bytes.
///
/// # Errors
/// The field that is wrong.
pub fn decode_log(body: &[u8]) -> Result<VhostUserLog, DecodeError> {
    let mut decoder = Decoder::new(body);
    let log = VhostUserLog {
        mmap_size: decoder.u64("mmap_size")?,
        mmap_offset: decoder.u64("mmap_offset")?,
    };
    decoder.finish()?;
    Ok(log)
}
