// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages of a front-end on their way to the library of a device.

use super::heap::within;
use pageferry_agent::devices::access::SessionMemory;
use pageferry_agent::devices::balloon::Balloon;
use pageferry_agent::devices::port::DevicePort;
use pageferry_agent::devices::relay;
use pageferry_agent::memory::GuestMemory;
use pageferry_protocol::control::vhost_user::FrontendReq;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// Longest input: more would not fit into a socket, whose other end nobody reads.
const MOST: usize = 32 << 10;
/// Most memory for one message: the largest body of a frame, and what it is decoded to.
const FAIR: usize = 2 << 20;

#[derive(Debug)]
struct NoMemory;

impl SessionMemory for NoMemory {
    fn with_memory(&self, _: &mut dyn FnMut(&Arc<GuestMemory>)) -> bool {
        false
    }

    fn memory(&self) -> Option<Arc<GuestMemory>> {
        None
    }
}

/// What is handed on is what came, byte for byte, and whole messages. Accepted is an input of which
/// all is handed on. The first byte says how many descriptors come with it.
pub fn device_messages(data: &[u8]) -> bool {
    let (descriptors, data) = super::choice(data);
    let data = &data[..data.len().min(MOST)];
    relayed(descriptors % 3, data).is_ok_and(|passed| {
        assert!(data.starts_with(&passed), "other bytes are handed on: {passed:02x?}");
        passed.len() == data.len()
    })
}

fn relayed(descriptors: u8, data: &[u8]) -> std::io::Result<Vec<u8>> {
    let (front_end, agent) = UnixStream::pair()?;
    let (mut library, agent_to_library) = UnixStream::pair()?;
    let port = DevicePort::new(Arc::new(Balloon::default()), Arc::new(NoMemory))?;
    let files = (0..descriptors).map(|_| crate::files::memfd(4096));
    let files: Vec<OwnedFd> = files.collect::<Result<_, _>>().map_err(std::io::Error::other)?;
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    if !data.is_empty() {
        sendmsg(&front_end, &[IoSlice::new(data)], &mut ancillary, SendFlags::empty())?;
    }
    front_end.shutdown(Shutdown::Write)?;
    let (never, _open) = rustix::pipe::pipe()?;
    let (agent, agent_to_library) = (OwnedFd::from(agent), OwnedFd::from(agent_to_library));
    let _ =
        within(FAIR, || relay::run(agent.into(), agent_to_library.into(), &port, never.as_fd()));
    let mut passed = Vec::new();
    library.read_to_end(&mut passed)?;
    Ok(passed)
}

/// Messages of each form, alone and one after another.
pub fn device_message_seeds() -> Vec<Vec<u8>> {
    let message = |request: FrontendReq, body: &[u64]| {
        let mut bytes = u32::from(request).to_le_bytes().to_vec();
        bytes.extend_from_slice(&1u32.to_le_bytes());
        bytes.extend_from_slice(&(8 * body.len() as u32).to_le_bytes());
        bytes.extend(body.iter().flat_map(|word| word.to_le_bytes()));
        bytes
    };
    let one = |descriptors: u8, message: Vec<u8>| [vec![descriptors], message].concat();
    let features = message(FrontendReq::GET_FEATURES, &[]);
    let table = message(FrontendReq::SET_MEM_TABLE, &[1, 0, 4096, 1 << 40, 0]);
    vec![
        one(0, features.clone()),
        one(1, table.clone()),
        one(1, message(FrontendReq::ADD_MEM_REG, &[0, 0, 4096, 1 << 40, 0])),
        one(1, message(FrontendReq::SET_VRING_KICK, &[0])),
        one(1, message(FrontendReq::SET_VRING_CALL, &[1])),
        one(0, message(FrontendReq::SET_VRING_ADDR, &[0, 1 << 40, 1 << 40, 1 << 40, 0])),
        one(0, message(FrontendReq::GET_VRING_BASE, &[2])),
        one(0, [features.clone(), features].concat()),
    ]
}
