// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VMM's side of the vhost-user protocol, by the crate `vhost`.

use super::PATIENCE;
use super::queue::{DriverQueue, Rings};
use crate::memory::TestMemory;
use pageferry_protocol::control::vhost_user::FrontendReq;
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{
    Error, VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData,
};

/// `VIRTIO_F_VERSION_1`, which every driver here chooses.
pub const VERSION_1: u64 = 1 << 32;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;
/// The longest that a front-end of a test is there.
const LONGEST: Duration = Duration::from_secs(90);

/// A connection to a device of an agent.
pub struct FrontEnd {
    /// The VMM's side.
    pub frontend: Frontend,
    /// The same connection, for messages that the VMM's side would not send.
    pub raw: UnixStream,
    /// What the device sends by itself.
    changes: FrameSocket,
    memory: Arc<TestMemory>,
    _watch: Sender<()>,
}

/// Ends a connection that is there for too long, because the library waits for ever for an agent
/// that does not answer.
fn watch(connection: UnixStream) -> Sender<()> {
    let (ended, end) = channel();
    std::thread::spawn(move || {
        if end.recv_timeout(LONGEST) == Err(RecvTimeoutError::Timeout) {
            log::error!("a front-end is there for {LONGEST:?}");
            let _ = connection.shutdown(Shutdown::Both);
        }
    });
    ended
}

impl FrontEnd {
    /// Connects to the device at `socket`, and says nothing but which memory the guest has.
    pub fn connect(socket: &Path, memory: &Arc<TestMemory>) -> Self {
        Self::over(UnixStream::connect(socket).unwrap(), memory)
    }

    /// Like [`FrontEnd::connect`], over an existing connection.
    pub fn over(stream: UnixStream, memory: &Arc<TestMemory>) -> Self {
        let mut front_end = Self::before_handshake(stream, memory);
        front_end.shake_hands();
        front_end.set_memory();
        front_end
    }

    /// A connection on which nothing was said.
    pub fn before_handshake(stream: UnixStream, memory: &Arc<TestMemory>) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let raw = stream.try_clone().unwrap();
        // The library knows the number of queues only after it has asked.
        let frontend = Frontend::from_stream(stream, 64);
        // Replaced when the features are negotiated.
        let (changes, _) = UnixStream::pair().unwrap();
        let watch = watch(raw.try_clone().unwrap());
        let changes = OwnedFd::from(changes).into();
        Self { frontend, raw, changes, memory: memory.clone(), _watch: watch }
    }

    fn shake_hands(&mut self) {
        // The library would wait for ever.
        self.ask(&Frame::request(FrontendReq::GET_FEATURES.into(), Vec::new()));
        let offered = self.frontend.get_features().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_eq!(offered & protocol, protocol, "offered: {offered:#x}");
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::DEVICE_STATE;
        let protocol_offered = self.frontend.get_protocol_features().unwrap();
        assert!(protocol_offered.contains(wanted), "offered: {protocol_offered:?}");
        self.frontend.set_protocol_features(wanted).unwrap();
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.frontend.set_owner().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.changes = OwnedFd::from(ours).into();
        self.frontend.set_backend_request_fd(&theirs).unwrap();
    }

    /// The regions of the guest's memory.
    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let region = |block: &crate::memory::TestBlock| VhostUserMemoryRegionInfo {
            guest_phys_addr: block.layout().gpa,
            memory_size: block.layout().length,
            userspace_addr: block.address(),
            mmap_offset: block.layout().fd_offset,
            mmap_handle: block.file().as_raw_fd(),
        };
        self.memory.blocks().iter().map(region).collect()
    }

    /// Hands the whole memory to the device.
    pub fn set_memory(&self) {
        assert!(self.frontend.set_mem_table(&self.regions()).unwrap().is_none());
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<TestMemory> {
        &self.memory
    }

    /// Where this process has mapped a guest physical address. An address outside of memory is one
    /// outside here, too.
    pub fn address_of(&self, gpa: u64) -> u64 {
        let holds = |block: &&crate::memory::TestBlock| {
            (block.layout().gpa..block.layout().gpa + block.layout().length).contains(&gpa)
        };
        let block = self.memory.blocks().iter().find(holds);
        block.map_or(gpa, |block| block.address() + (gpa - block.layout().gpa))
    }

    /// The driver chooses these features, and those of the transport that a modern one needs.
    ///
    /// # Errors
    /// If the device refuses them.
    pub fn choose_features(&self, features: u64) -> Result<(), Error> {
        let transport = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(features | VERSION_1 | transport)
    }

    /// Hands queue `index` to the device, which begins at the buffer `base`.
    ///
    /// # Errors
    /// If the device refuses a part.
    pub fn start_queue(
        &mut self, index: usize, queue: &DriverQueue, base: u16,
    ) -> Result<(), Error> {
        self.start_rings(index, queue.rings(), queue, base)
    }

    /// Like [`FrontEnd::start_queue`], with the rings elsewhere.
    ///
    /// # Errors
    /// If the device refuses a part.
    pub fn start_rings(
        &mut self, index: usize, rings: Rings, queue: &DriverQueue, base: u16,
    ) -> Result<(), Error> {
        self.frontend.set_vring_num(index, rings.size)?;
        self.frontend.set_vring_addr(index, &self.addresses(rings))?;
        self.frontend.set_vring_base(index, base)?;
        self.frontend.set_vring_call(index, &queue.call)?;
        self.frontend.set_vring_kick(index, &queue.kick)?;
        self.frontend.set_vring_enable(index, true)
    }

    /// The addresses of a queue in this process.
    pub fn addresses(&self, rings: Rings) -> VringConfigData {
        VringConfigData {
            queue_max_size: rings.size,
            queue_size: rings.size,
            flags: 0,
            desc_table_addr: self.address_of(rings.descriptors),
            used_ring_addr: self.address_of(rings.used),
            avail_ring_addr: self.address_of(rings.available),
            log_addr: None,
        }
    }

    /// Stops a queue. Returns the index of the buffer at which the device would go on.
    pub fn stop_queue(&self, index: usize) -> u16 {
        self.frontend.get_vring_base(index).unwrap() as u16
    }

    /// The driver resets the device.
    pub fn reset(&mut self) {
        self.frontend.reset_device().unwrap();
    }

    /// Reads from the configuration space. `None` if the device has no such bytes: the crate
    /// `vhost` would wait for them.
    pub fn config(&self, offset: u32, size: u32) -> Option<Vec<u8>> {
        let mut body: Vec<u8> = [offset, size, 0].into_iter().flat_map(u32::to_le_bytes).collect();
        body.resize(body.len() + size as usize, 0);
        let reply = self.ask(&Frame::request(FrontendReq::GET_CONFIG.into(), body));
        let (head, bytes) = reply.body.split_at(12);
        let length = u32::from_le_bytes(head[4..8].try_into().unwrap());
        assert_eq!(length as usize, bytes.len());
        (length == size).then(|| bytes.to_vec())
    }

    /// Sends a message that has an answer.
    #[track_caller]
    pub fn ask(&self, frame: &Frame) -> Frame {
        self.send(frame).unwrap();
        self.frames().recv(Instant::now() + PATIENCE).unwrap()
    }

    fn frames(&self) -> FrameSocket {
        OwnedFd::from(self.raw.try_clone().unwrap()).into()
    }

    /// A number of 32 bits in the configuration space.
    pub fn config_u32(&self, offset: u32) -> u32 {
        u32::from_le_bytes(self.config(offset, 4).unwrap().try_into().unwrap())
    }

    /// A number of 64 bits in the configuration space.
    pub fn config_u64(&self, offset: u32) -> u64 {
        u64::from_le_bytes(self.config(offset, 8).unwrap().try_into().unwrap())
    }

    /// Writes to the configuration space.
    ///
    /// # Errors
    /// If the device or the library refuses.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Error> {
        self.frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)
    }

    /// Waits until the device says that its configuration has changed. False if it has not within
    /// `timeout`.
    pub fn config_changes_within(&mut self, timeout: Duration) -> bool {
        match self.changes.recv(Instant::now() + timeout) {
            Ok(frame) => {
                assert_eq!(frame.request, CONFIG_CHANGE);
                true
            }
            Err(SocketError::Timeout { .. }) => false,
            Err(error) => panic!("the device has closed its channel: {error}"),
        }
    }

    /// Waits until the device says that its configuration has changed.
    #[track_caller]
    pub fn wait_for_config_change(&mut self) {
        assert!(self.config_changes_within(PATIENCE), "the configuration has not changed");
    }

    /// Has the device mark what it writes in this log, from byte 0 of the file.
    ///
    /// # Errors
    /// If the device refuses it.
    pub fn set_log(&self, log: &OwnedFd, size: u64) -> Result<(), Error> {
        let region = VhostUserDirtyLogRegion {
            mmap_size: size,
            mmap_offset: 0,
            mmap_handle: log.as_raw_fd(),
        };
        self.frontend.set_log_base(0, Some(region))
    }

    /// Begins to move the state of the device by a pipe, whose other end the caller has.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn move_state(
        &self, direction: VhostTransferStateDirection, end: OwnedFd,
    ) -> Result<Option<File>, Error> {
        self.frontend.set_device_state_fd(direction, VhostTransferStatePhase::STOPPED, end)
    }

    /// Sends a message that the library would not send, and waits for no answer.
    pub fn send(&self, frame: &Frame) -> Result<(), SocketError> {
        self.frames().send(frame, Instant::now() + PATIENCE)
    }

    /// Waits until the agent has closed the connection. False if it has not within `timeout`.
    pub fn is_closed_within(&self, timeout: Duration) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        // An end that sends no more is not enough.
        let mut polled = [PollFd::from_borrowed_fd(self.raw.as_fd(), PollFlags::RDHUP)];
        let timeout = Timespec::try_from(timeout).unwrap();
        poll(&mut polled, Some(&timeout)).unwrap() > 0
    }
}
