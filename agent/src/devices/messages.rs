// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the agent has to know of the messages of a front-end before the library handles them.
//!
//! - The library keeps the socket by which a device could tell of changes (SET_BACKEND_REQ_FD) to
//!   itself, and has no message for a change of the configuration. So a copy is kept here.
//! - It reads the used index when it gets the addresses of a ring, so that page must be here.
//! - It reads and writes the events of a queue without a limit. So they are made non-blocking: two
//!   queues may share one, and a driver may leave one full.
//! - It maps the dirty log, and nobody can guard that mapping. So the log must not shrink.

use super::guest_map::{DeviceMemory, FrontEndTable, GuestMap};
use super::port::DevicePort;
use pageferry_protocol::control::FrameSocket;
use pageferry_protocol::control::frame::Frame;
use pageferry_protocol::control::vhost_user::{
    FrontendReq, Region, decode_mem_table, decode_single_region,
};
use pageferry_protocol::memory::MAX_MEM_SLOTS;
use rustix::fs::{OFlags, SealFlags, fcntl_get_seals, fcntl_getfl, fcntl_setfl};
use std::os::fd::AsFd;
use std::time::Duration;

/// How long a page that is missing may take to come.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);

/// What the messages of a front-end have told. A message that is malformed tells nothing here: the
/// library refuses it.
#[derive(Debug, Default)]
pub(super) struct Messages {
    table: FrontEndTable,
    /// The same regions, as the front-end addresses them in its messages.
    addresses: Vec<Region>,
}

impl Messages {
    /// Looks at a message before the library gets it. A wait for memory ends when `go_on` is false.
    ///
    /// # Errors
    /// Why the library must not get it, in words.
    pub(super) fn look_at(
        &mut self, frame: &Frame, port: &DevicePort, go_on: impl Fn() -> bool,
    ) -> Result<(), String> {
        match FrontendReq::try_from(frame.request) {
            Ok(FrontendReq::SET_MEM_TABLE) => {
                (self.table, self.addresses) = Default::default();
                let regions = decode_mem_table(&frame.body).unwrap_or_default();
                check_count(regions.len())?;
                for (region, file) in regions.iter().zip(&frame.fds) {
                    self.add(region, file);
                }
            }
            Ok(FrontendReq::ADD_MEM_REG) => {
                let region = decode_single_region(&frame.body).ok();
                check_count(self.addresses.len() + 1)?;
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
            Ok(FrontendReq::SET_VRING_ADDR) => {
                self.check_used_index(&frame.body, port, go_on)?;
            }
            Ok(FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL) => {
                frame.fds.iter().try_for_each(make_nonblocking)?;
            }
            Ok(FrontendReq::SET_LOG_BASE) => frame.fds.iter().try_for_each(check_log)?,
            Ok(FrontendReq::SET_BACKEND_REQ_FD) => keep_socket(frame, port),
            _ => {}
        }
        Ok(())
    }

    fn add(&mut self, region: &Region, file: impl AsFd) {
        self.table.add(region.gpa, region.length, file, region.fd_offset);
        self.addresses.push(*region);
    }

    /// Has the page of the used index here.
    fn check_used_index(
        &self, body: &[u8], port: &DevicePort, go_on: impl Fn() -> bool,
    ) -> Result<(), String> {
        // Index and flags, then the addresses of descriptors, used ring, available ring and log.
        let Some(used) = body.get(16..24).and_then(|bytes| bytes.try_into().ok()) else {
            return Ok(());
        };
        let address = u64::from_le_bytes(used);
        let region = self.addresses.iter().find(|region| {
            address >= region.vmm_address && address - region.vmm_address < region.length
        });
        let (Some(region), Some(memory)) = (region, port.session().memory()) else {
            return Ok(());
        };
        let Some(gpa) = region.gpa.checked_add(address - region.vmm_address) else {
            return Ok(());
        };
        let mut map = GuestMap::default();
        map.update(&self.table, &memory, true);
        // Flags and index have 16 bits each.
        let pages = DeviceMemory::new(&memory, &map).pages(gpa, 4);
        if memory.are_discarded(&pages) {
            return Err(format!("the used ring at {gpa:#x} lies in discarded memory"));
        }
        if !memory.fetch(&pages, FETCH_TIMEOUT, go_on) {
            return Err(format!("the memory of the used ring at {gpa:#x} does not come"));
        }
        Ok(())
    }
}

/// Each region takes one of the guards against files that shrink, so there must not be any number.
fn check_count(regions: usize) -> Result<(), String> {
    if regions <= MAX_MEM_SLOTS {
        return Ok(());
    }
    Err(format!("its table has {regions} regions, allowed: {MAX_MEM_SLOTS}"))
}

fn make_nonblocking(fd: impl AsFd) -> Result<(), String> {
    fcntl_getfl(&fd)
        .and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK))
        .map_err(|errno| format!("the event of a queue cannot be made non-blocking: {errno}"))
}

fn check_log(fd: impl AsFd) -> Result<(), String> {
    let seals = fcntl_get_seals(fd).unwrap_or(SealFlags::empty());
    if seals.contains(SealFlags::SHRINK) {
        return Ok(());
    }
    Err("the file of the dirty log can shrink, allowed: a memfd with F_SEAL_SHRINK".to_owned())
}

fn keep_socket(frame: &Frame, port: &DevicePort) {
    let socket = frame.fds.first().map(|fd| fd.try_clone());
    match socket.transpose() {
        Ok(socket) => port.set_front_end(socket.map(FrameSocket::from)),
        Err(error) => {
            log::warn!("{}: the front-end will not hear of changes: {error}", port.name());
        }
    }
}
