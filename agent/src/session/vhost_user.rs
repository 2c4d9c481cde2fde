// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The vhost-user requests, by which any front-end can hand over its memory. Their numbers, layouts
//! and meaning are those of the vhost-user specification.
//!
//! If the specification defines a reply to a request, the agent sends that reply. To any other
//! request it replies only if the front-end asked for a reply (`REPLY_ACK`); zero means success.
//! The agent is not a device, so it refuses requests for virtqueues.

use super::registry::NewBlock;
use super::shared::SharedSession;
use super::{Session, check_fds, take_fds};
use crate::hooks::Hooks;
use crate::transport::unix_socket::not_connected;
use pageferry_protocol::control::frame::Frame;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use pageferry_protocol::control::vhost_user::{
    FrontendReq, Region, VhostUserProtocolFeatures, VhostUserVirtioFeatures, decode_log,
    decode_mem_table, decode_single_region, decode_u64,
};
use pageferry_protocol::memory::{BlockGeometry, MAX_MEM_SLOTS, PAGE_SIZE};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// `VIRTIO_F_VERSION_1`.
const VIRTIO_VERSION_1: u64 = 1 << 32;

/// The negotiated features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    virtio: u64,
    protocol: u64,
}

/// The reply that the front-end expects to a request, also if the request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpectedReply {
    /// No reply. The front-end would take one for the reply to its next request.
    None,
    /// A number of 64 bits; zero means success.
    Ack,
    /// The size and offset of the log that the back-end has mapped.
    Log,
}

impl ExpectedReply {
    /// The reply that the front-end expects to `frame`.
    pub fn of(frame: &Frame) -> Self {
        Self::to_request(frame.request, frame.needs_reply(), !frame.fds.is_empty())
    }

    /// As [`ExpectedReply::of`], from the parts of the request. `has_fds` is true if the request
    /// has descriptors.
    pub fn to_request(request: u32, needs_reply: bool, has_fds: bool) -> Self {
        // SET_LOG_BASE without a descriptor has no reply of its own.
        if request == FrontendReq::SET_LOG_BASE as u32 && has_fds {
            Self::Log
        } else if needs_reply || request == FrontendReq::GET_VRING_BASE as u32 {
            Self::Ack
        } else {
            Self::None
        }
    }

    /// The reply that refuses request `code`; `None` if the front-end expects no reply.
    pub fn refusal_reply(self, code: u32, error: &RemoteError) -> Option<Frame> {
        log::warn!("vhost-user request {code} refused: {error}");
        let number = u64::from(error.code as u32).to_le_bytes();
        match self {
            Self::None => None,
            Self::Ack => Some(Frame::reply(code, number.to_vec())),
            // The reply has the layout of the log: size, then offset. The size is zero, which no
            // front-end can take for success. The error code is in the place of the offset.
            Self::Log => Some(Frame::reply(code, [[0; 8], number].concat())),
        }
    }
}

impl Features {
    fn offered_virtio() -> u64 {
        let ours = VhostUserVirtioFeatures::LOG_ALL | VhostUserVirtioFeatures::PROTOCOL_FEATURES;
        ours.bits() | VIRTIO_VERSION_1
    }

    fn offered_protocol() -> u64 {
        let ours = VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        ours.bits()
    }
}

impl SharedSession {
    /// Handles a vhost-user request. Returns the reply; `None` if the front-end expects none.
    pub fn handle_vhost_user(&self, frame: Frame) -> Option<Frame> {
        let expected = ExpectedReply::of(&frame);
        let code = frame.request;
        match self.answer_vhost_user(frame) {
            Ok(Some(body)) => Some(Frame::reply(code, body)),
            Ok(None) => (expected == ExpectedReply::Ack)
                .then(|| Frame::reply(code, 0u64.to_le_bytes().to_vec())),
            Err(error) => expected.refusal_reply(code, &error),
        }
    }

    fn answer_vhost_user(&self, frame: Frame) -> Result<Option<Vec<u8>>, RemoteError> {
        let number = |value: u64| Ok(Some(value.to_le_bytes().to_vec()));
        let malformed = |error| RemoteError::new(ErrorCode::Invalid, error);
        let Frame { request, body, fds, .. } = frame;
        let Ok(code) = FrontendReq::try_from(request) else {
            return Err(RemoteError::new(
                ErrorCode::Unsupported,
                format!("request {request} is unknown"),
            ));
        };
        match code {
            FrontendReq::GET_FEATURES => number(Features::offered_virtio()),
            FrontendReq::SET_FEATURES => {
                let value = decode_u64(&body).map_err(malformed)?;
                self.lock().vhost_user.virtio =
                    negotiate("features", value, Features::offered_virtio())?;
                Ok(None)
            }
            FrontendReq::GET_PROTOCOL_FEATURES => number(Features::offered_protocol()),
            FrontendReq::SET_PROTOCOL_FEATURES => {
                let value = decode_u64(&body).map_err(malformed)?;
                self.lock().vhost_user.protocol =
                    negotiate("protocol features", value, Features::offered_protocol())?;
                Ok(None)
            }
            FrontendReq::SET_OWNER | FrontendReq::RESET_OWNER => Ok(None),
            // There are no virtqueues.
            FrontendReq::GET_QUEUE_NUM => number(0),
            FrontendReq::GET_MAX_MEM_SLOTS => number(MAX_MEM_SLOTS as u64),
            FrontendReq::SET_MEM_TABLE => {
                self.set_mem_table(&decode_mem_table(&body).map_err(malformed)?, fds)?;
                Ok(None)
            }
            FrontendReq::ADD_MEM_REG => {
                check_fds("ADD_MEM_REG", &fds, 1)?;
                self.add_regions(&[decode_single_region(&body).map_err(malformed)?], fds)?;
                Ok(None)
            }
            FrontendReq::REM_MEM_REG => {
                // A front-end may send a descriptor with this request. It is not needed.
                self.lock().remove_region(decode_single_region(&body).map_err(malformed)?)?;
                self.wait_for_devices();
                Ok(None)
            }
            FrontendReq::SET_LOG_BASE => {
                let [file] = take_fds("SET_LOG_BASE", fds)?;
                let log = decode_log(&body).map_err(malformed)?;
                self.set_log(file, log.mmap_offset, log.mmap_size)?;
                Ok(Some(body))
            }
            // A back-end would signal on it that it has marked pages. The agent marks no pages, so
            // it does not keep the descriptor.
            FrontendReq::SET_LOG_FD => check_fds("SET_LOG_FD", &fds, 1).map(|()| None),
            FrontendReq::SET_BACKEND_REQ_FD => {
                let [socket] = take_fds("SET_BACKEND_REQ_FD", fds)?;
                check_hook_socket(&socket)?;
                self.lock().set_hook_socket(socket)?;
                Ok(None)
            }
            _ => {
                let sentence = format!(
                    "{code:?}: the agent is not a device, it has no virtqueues and no configuration"
                );
                Err(RemoteError::new(ErrorCode::Unsupported, sentence))
            }
        }
    }

    fn set_mem_table(&self, regions: &[Region], fds: Vec<OwnedFd>) -> Result<(), RemoteError> {
        check_fds("SET_MEM_TABLE", &fds, regions.len())?;
        let mut session = self.lock();
        let before = session.memory.clone();
        session.clear_blocks()?;
        drop(session);
        self.wait_for_devices();
        self.add_regions(regions, fds).inspect_err(|_| self.lock().memory = before)
    }

    fn add_regions(&self, regions: &[Region], fds: Vec<OwnedFd>) -> Result<(), RemoteError> {
        let mut taken: Vec<u32> =
            self.lock().memory.table().blocks().iter().map(|block| block.id).collect();
        let new = regions.iter().zip(fds).map(|(region, memory)| {
            // A vhost-user region has no id, so it gets the lowest free one. Two sides that add the
            // same regions in the same order give them the same ids.
            let id = (0..).find(|id| !taken.contains(id)).unwrap_or_default();
            taken.push(id);
            let geometry = BlockGeometry {
                id,
                name: format!("region@{:#x}", region.gpa),
                gpa: region.gpa,
                length: region.length,
                granularity: PAGE_SIZE,
            };
            NewBlock {
                geometry,
                memory,
                fd_offset: region.fd_offset,
                vmm_address: region.vmm_address,
                bitmap: None,
                owed: None,
                clone: None,
            }
        });
        let new = new.collect();
        self.add_blocks(new).map(drop)
    }
}

impl Session {
    fn remove_region(&mut self, region: Region) -> Result<(), RemoteError> {
        let same =
            |block: &&BlockGeometry| block.gpa == region.gpa && block.length == region.length;
        match self.memory.table().blocks().iter().find(same).map(|block| block.id) {
            Some(id) => self.remove_block(id),
            None => {
                let sentence =
                    format!("no region at {:#x} of {:#x} bytes", region.gpa, region.length);
                Err(RemoteError::new(ErrorCode::NotFound, sentence))
            }
        }
    }

    fn set_hook_socket(&mut self, socket: OwnedFd) -> Result<(), RemoteError> {
        self.check_idle("the socket for hooks cannot be changed")?;
        let failed = |error| {
            RemoteError::new(ErrorCode::System, format!("cannot duplicate the socket: {error}"))
        };
        self.end_checkpoint("the socket for hooks was replaced");
        self.hook_socket = Some(socket.try_clone().map_err(failed)?);
        self.hooks = Arc::new(Hooks::new(Some(socket)));
        Ok(())
    }
}

/// Refuses a descriptor that is not a connected socket: no hook on it would ever be answered.
fn check_hook_socket(socket: &OwnedFd) -> Result<(), RemoteError> {
    not_connected(socket).map_or(Ok(()), |found| {
        let sentence =
            format!("SET_BACKEND_REQ_FD: the descriptor is {found}, allowed is a connected UNIX stream socket");
        Err(RemoteError::new(ErrorCode::Invalid, sentence))
    })
}

fn negotiate(what: &str, value: u64, offered: u64) -> Result<u64, RemoteError> {
    match value & !offered {
        0 => Ok(value),
        unknown => {
            let sentence = format!("{what} {value:#x}: bits {unknown:#x} were not offered");
            Err(RemoteError::new(ErrorCode::Invalid, sentence))
        }
    }
}
