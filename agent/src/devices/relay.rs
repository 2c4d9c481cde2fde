// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Between a front-end and the library: hands every message on, in both directions.
//!
//! The library keeps the socket by which a device could tell of changes (SET_BACKEND_REQ_FD) to
//! itself, and has no message for a change of the configuration. So a copy is kept here on the
//! way. And before the library reads a ring, its pages must be here: it reads the used index when
//! it gets the addresses of a ring.

use super::back_end::DevicePort;
use super::guest_map::{DeviceMemory, FrontEndTable, GuestMap};
use pageferry_protocol::control::frame::Frame;
use pageferry_protocol::control::vhost_user::{
    FrontendReq, Region, decode_mem_table, decode_single_region,
};
use pageferry_protocol::control::{FrameSocket, SocketError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// How long a page that is missing may take to come.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the other side may leave a message unread.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Hands messages on until one side ends the connection, or `stop` is readable.
///
/// # Errors
/// If a side breaks the framing, or does not read.
pub fn run(
    mut front_end: FrameSocket, mut library: FrameSocket, port: &DevicePort, stop: BorrowedFd<'_>,
) -> Result<(), SocketError> {
    let mut known = Known::default();
    loop {
        let mut polled = [
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(front_end.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(library.as_fd(), PollFlags::IN),
        ];
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let [stopped, from_front_end, from_library] =
            [0, 1, 2].map(|at| !polled[at].revents().is_empty());
        if stopped {
            return Ok(());
        }
        let look_at = |frame: &Frame| known.look_at(frame, port);
        if from_front_end && !hand_on(&mut front_end, &library, look_at)? {
            return Ok(());
        }
        if from_library && !hand_on(&mut library, &front_end, |_| ())? {
            return Ok(());
        }
    }
}

/// Hands on what is here. False if `from` has ended the connection.
fn hand_on(
    from: &mut FrameSocket, to: &FrameSocket, mut look_at: impl FnMut(&Frame),
) -> Result<bool, SocketError> {
    loop {
        match from.try_recv() {
            Ok(Some(frame)) => {
                log::trace!("request {} with {} bytes", frame.request, frame.body.len());
                look_at(&frame);
                to.send(&frame, Instant::now() + SEND_TIMEOUT)?;
            }
            Ok(None) => return Ok(true),
            Err(SocketError::Closed) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

/// What the messages of a front-end have told. A message that is malformed tells nothing here: the
/// library refuses it.
#[derive(Debug, Default)]
struct Known {
    table: FrontEndTable,
    /// The same regions, as the front-end addresses them in its messages.
    addresses: Vec<Region>,
}

impl Known {
    fn look_at(&mut self, frame: &Frame, port: &DevicePort) {
        match FrontendReq::try_from(frame.request) {
            Ok(FrontendReq::SET_MEM_TABLE) => {
                (self.table, self.addresses) = Default::default();
                let regions = decode_mem_table(&frame.body).unwrap_or_default();
                for (region, file) in regions.iter().zip(&frame.fds) {
                    self.add(region, file);
                }
            }
            Ok(FrontendReq::ADD_MEM_REG) => {
                let region = decode_single_region(&frame.body).ok();
                if let Some((region, file)) = region.zip(frame.fds.first()) {
                    self.add(&region, file);
                }
            }
            Ok(FrontendReq::REM_MEM_REG) => {
                if let Ok(region) = decode_single_region(&frame.body) {
                    self.table.remove(region.gpa);
                    self.addresses.retain(|known| known.gpa != region.gpa);
                }
            }
            Ok(FrontendReq::SET_VRING_ADDR) => self.fetch_used_index(&frame.body, port),
            Ok(FrontendReq::SET_BACKEND_REQ_FD) => keep_socket(frame, port),
            _ => {}
        }
    }

    fn add(&mut self, region: &Region, file: impl AsFd) {
        self.table.add(region.gpa, region.length, file, region.fd_offset);
        self.addresses.push(*region);
    }

    /// Fetches the page of the used index, if it is missing.
    fn fetch_used_index(&self, body: &[u8], port: &DevicePort) {
        // Index and flags, then the addresses of descriptors, used ring, available ring and log.
        let Some(used) = body.get(16..24).and_then(|bytes| bytes.try_into().ok()) else { return };
        let address = u64::from_le_bytes(used);
        let region = self.addresses.iter().find(|region| {
            address >= region.vmm_address && address - region.vmm_address < region.length
        });
        let (Some(region), Some(memory)) = (region, port.session().memory()) else { return };
        let gpa = region.gpa + (address - region.vmm_address);
        let mut map = GuestMap::default();
        map.update(&self.table, &memory, true);
        // Flags and index have 16 bits each.
        let pages = DeviceMemory::new(&memory, &map).pages(gpa, 4);
        if !memory.fetch(&pages, FETCH_TIMEOUT) {
            log::warn!("{}: the memory of a queue does not come", port.device().name());
        }
    }
}

fn keep_socket(frame: &Frame, port: &DevicePort) {
    let socket = frame.fds.first().map(|fd| fd.try_clone());
    match socket.transpose() {
        Ok(socket) => port.set_front_end(socket.map(FrameSocket::from)),
        Err(error) => {
            let name = port.device().name();
            log::warn!("{name}: the front-end will not hear of changes: {error}");
        }
    }
}
