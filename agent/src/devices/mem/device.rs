// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state machine of a virtio-mem device.
//!
//! # Order
//!
//! One thread at a time has the device: the caller holds a lock around it. A request is complete
//! when [`VirtioMem::handle`] returns, so the caller writes the response after the memory has
//! changed, never before.
//!
//! # Sizes
//!
//! - The *requested size* is the operator's. The driver may plug no more than that.
//! - The *usable region* is where the driver may plug blocks. It grows with the requested size and
//!   shrinks only when all blocks are unplugged, because the driver may rely on what it has read.
//! - The *plugged size* is counted from the memory once, and then changed by each request.
//!
//! A reset of the device changes none of them and no block.

use super::region::{FieldError, MemoryRefused, PluggableMemory, Region};
use super::wire::{
    BlockRun, BlockState, Config, DEVICE_FEATURES, FEATURE_ACPI_PXM,
    FEATURE_UNPLUGGED_INACCESSIBLE, RESPONSE_SIZE, Request, Response, WireError,
};
use pageferry_protocol::control::codec::{DecodeError, Decoder, Encoder};
use pageferry_protocol::memory::{PageRange, pages_in};

/// The version of the saved state that this code reads and writes.
pub const STATE_VERSION: u32 = 1;

/// Why a driver's features are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FeaturesError {
    /// The driver would read unplugged memory.
    #[error(
        "the driver accepts features {accepted:#x}, allowed: \
         with VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (bit 1), because unplugged memory is discarded \
         and must not be read"
    )]
    ReadsUnplugged {
        /// The features that the driver accepts.
        accepted: u64,
    },
    /// The driver accepts a feature that is not offered.
    #[error("the driver accepts features {accepted:#x}, allowed: those of {offered:#x}")]
    NotOffered {
        /// The features of a device that the driver accepts.
        accepted: u64,
        /// The features that are offered.
        offered: u64,
    },
}

/// Why a saved state cannot be loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// It was saved by a device that differs from this one.
    #[error(
        "{field} is {saved:#x} in the saved state, allowed: {configured:#x} as configured here"
    )]
    Differs {
        /// The field.
        field: &'static str,
        /// Its value in the saved state.
        saved: u64,
        /// Its value in this device.
        configured: u64,
    },
    /// A size is not valid.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The state is malformed, or of another version.
    #[error("state of virtio-mem")]
    Decode(#[from] DecodeError),
}

/// A virtio-mem device on memory `M`.
#[derive(Debug)]
pub struct VirtioMem<M> {
    region: Region,
    memory: M,
    requested_size: u64,
    usable_region_size: u64,
    plugged_size: u64,
    /// True until the first request after [`VirtioMem::connected`].
    may_be_replay: bool,
    /// See [`VirtioMem::forget_sizes`]. True until the operator or a saved state sets sizes.
    sizes_are_lost: bool,
}

impl<M: PluggableMemory> VirtioMem<M> {
    /// A device whose requested size is what is plugged in `memory`. That is nothing for a guest
    /// that starts, whose memory is handed over as discarded. Otherwise an agent before this one
    /// has died, and with it the size that the operator wants. A smaller size would have the guest
    /// unplug its memory.
    ///
    /// # Errors
    /// If a field of `region` is not valid.
    pub fn new(region: Region, memory: M) -> Result<Self, FieldError> {
        region.check()?;
        let mut device = Self {
            region,
            memory,
            requested_size: 0,
            usable_region_size: 0,
            plugged_size: 0,
            may_be_replay: false,
            sizes_are_lost: false,
        };
        device.recount();
        device.requested_size = device.plugged_size;
        device.usable_region_size =
            device.usable_region_size.max(region.usable_for(device.requested_size));
        Ok(device)
    }

    /// Counts again which blocks are plugged. Call this whenever the memory has changed by other
    /// means than requests: it has arrived, was restored, or is there only now.
    ///
    /// If a plugged block is outside the usable region, the whole region becomes usable. The sizes
    /// of the agent before were lost then. It is not known how much the driver takes for usable,
    /// and it must not become less.
    pub fn recount(&mut self) {
        let usable = PageRange::new(0, pages_in(self.usable_region_size));
        let rest = PageRange::new(usable.count, self.region.all().count - usable.count);
        let outside = self.region.plugged_in(&self.memory, rest);
        if outside > 0 {
            self.usable_region_size = self.region.region_size;
        }
        self.plugged_size = self.region.plugged_in(&self.memory, usable) + outside;
    }

    /// Call this if there may have been an agent before this one, whose sizes are lost: the whole
    /// region becomes usable. The driver may know a larger region than what is plugged needs, and
    /// gives up the device if it gets an error for a block in it.
    pub fn forget_sizes(&mut self) {
        self.sizes_are_lost = true;
        self.usable_region_size = self.region.region_size;
    }

    /// True if it has this region.
    pub fn is_on(&self, region: &Region) -> bool {
        self.region == *region
    }

    /// The features that the device offers.
    ///
    /// `VIRTIO_MEM_F_PERSISTENT_SUSPEND` is not among them: only the VMM knows whether the memory
    /// outlasts a suspend.
    pub fn features(&self) -> u64 {
        let node = if self.region.node_id.is_some() { FEATURE_ACPI_PXM } else { 0 };
        FEATURE_UNPLUGGED_INACCESSIBLE | node
    }

    /// Checks the features that the driver accepts. Bits that do not belong to the type of the
    /// device are ignored.
    ///
    /// A driver that does not accept `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` is refused, which the
    /// specification allows (5.15.5.2) and QEMU and Firecracker do. Without this feature the driver
    /// may read unplugged blocks, and each read would allocate a page that the agent has discarded.
    /// Linux accepts it since version 5.16. The caller refuses `SET_FEATURES`, or `FEATURES_OK`.
    ///
    /// # Errors
    /// If the feature is not accepted, or one that is not offered is.
    pub fn check_features(&self, accepted: u64) -> Result<(), FeaturesError> {
        let (accepted, offered) = (accepted & DEVICE_FEATURES, self.features());
        if accepted & !offered != 0 {
            return Err(FeaturesError::NotOffered { accepted, offered });
        }
        if accepted & FEATURE_UNPLUGGED_INACCESSIBLE == 0 {
            return Err(FeaturesError::ReadsUnplugged { accepted });
        }
        Ok(())
    }

    /// The configuration space. The driver can only read it: the caller ignores a write.
    pub fn config(&self) -> Config {
        Config {
            block_size: self.region.block_size,
            node_id: self.region.node_id.unwrap_or(0),
            addr: self.region.addr,
            region_size: self.region.region_size,
            usable_region_size: self.usable_region_size,
            plugged_size: self.plugged_size,
            requested_size: self.requested_size,
        }
    }

    /// Sets the plugged memory that the operator wants, in bytes. Returns true if the configuration
    /// has changed. Then the caller sends a configuration interrupt: Linux repeats a request that
    /// was answered with NACK at once and without end until it has read the new size.
    ///
    /// # Errors
    /// If the size is not a multiple of the block size, or larger than the region. Nothing is
    /// changed then.
    pub fn set_requested_size(&mut self, size: u64) -> Result<bool, FieldError> {
        self.region.check_size("requested_size", size, 0..=self.region.region_size)?;
        let before = (self.requested_size, self.usable_region_size);
        self.requested_size = size;
        self.sizes_are_lost = false;
        self.usable_region_size = self.usable_region_size.max(self.region.usable_for(size));
        Ok(before != (self.requested_size, self.usable_region_size))
    }

    /// Call this when a front-end has connected. The next request may be one that an agent before
    /// this one has carried out and not answered.
    ///
    /// If the sizes of that agent were lost, also send a configuration interrupt: the driver may
    /// know others.
    pub fn connected(&mut self) {
        self.may_be_replay = true;
    }

    /// Call this when the driver resets the device. The queue is empty then, so no request is a
    /// replay.
    pub fn reset(&mut self) {
        self.may_be_replay = false;
    }

    /// Unplugs all blocks, and shrinks the usable region to what the requested size needs. For a
    /// guest that starts, and for a reset of the whole guest.
    ///
    /// # Errors
    /// If the memory is not there. Nothing is changed then.
    pub fn unplug_all(&mut self) -> Result<(), MemoryRefused> {
        self.memory.unplug(self.region.all())?;
        self.plugged_size = 0;
        if !self.sizes_are_lost {
            self.usable_region_size = self.region.usable_for(self.requested_size);
        }
        Ok(())
    }

    /// Handles a request from its bytes. `response_length` is the length of the driver's buffer for
    /// the response.
    ///
    /// # Errors
    /// If a buffer is too short. Nothing is changed then: a request that cannot be answered must
    /// not be carried out.
    pub fn handle(
        &mut self, request: &[u8], response_length: usize,
    ) -> Result<[u8; RESPONSE_SIZE], WireError> {
        let request = Request::decode(request)?;
        if response_length < RESPONSE_SIZE {
            return Err(WireError::ShortResponse { length: response_length });
        }
        Ok(self.process(request).encode())
    }

    /// Handles a request.
    pub fn process(&mut self, request: Request) -> Response {
        let replay = std::mem::take(&mut self.may_be_replay);
        let answer = match request {
            Request::Plug(blocks) => self.plug(blocks, replay),
            Request::Unplug(blocks) => self.unplug(blocks, replay),
            // The specification has no ERROR for this request. With BUSY the driver tries again,
            // and the memory may be there by then.
            Request::UnplugAll => {
                self.unplug_all().map(|()| Response::Ack).map_err(|_| Response::Busy)
            }
            Request::State(blocks) => self.state(blocks),
            Request::Unknown(_) => Err(Response::Error),
        };
        answer.unwrap_or_else(|rejected| rejected)
    }

    fn plug(&mut self, blocks: BlockRun, replay: bool) -> Result<Response, Response> {
        let range = self.usable_pages(blocks)?;
        let plugged = self.region.plugged_in(&self.memory, range);
        if plugged == range.bytes() && replay {
            return Ok(Response::Ack);
        }
        if plugged > 0 && !replay {
            return Err(Response::Error);
        }
        let missing = range.bytes() - plugged;
        let answer = if self.plugged_size.saturating_add(missing) > self.requested_size {
            Err(Response::Nack)
        } else {
            self.memory.plug(range).map_err(Response::from)
        };
        match answer {
            Ok(()) => self.plugged_size += missing,
            // The agent before this one has plugged a part of the blocks. The driver never saw an
            // ACK for them and does not use them. After this answer it takes all for unplugged.
            Err(_) if plugged > 0 => self.unplug_pages(range, plugged)?,
            Err(_) => {}
        }
        answer.map(|()| Response::Ack)
    }

    fn unplug(&mut self, blocks: BlockRun, replay: bool) -> Result<Response, Response> {
        let range = self.usable_pages(blocks)?;
        let plugged = self.region.plugged_in(&self.memory, range);
        if plugged < range.bytes() && !replay {
            return Err(Response::Error);
        }
        self.unplug_pages(range, plugged)?;
        Ok(Response::Ack)
    }

    /// Unplugs `range`, of which `plugged` bytes are plugged.
    fn unplug_pages(&mut self, range: PageRange, plugged: u64) -> Result<(), MemoryRefused> {
        self.memory.unplug(range)?;
        self.plugged_size = self.plugged_size.saturating_sub(plugged);
        Ok(())
    }

    fn state(&self, blocks: BlockRun) -> Result<Response, Response> {
        let range = self.usable_pages(blocks)?;
        Ok(Response::State(match self.region.plugged_in(&self.memory, range) {
            0 => BlockState::Unplugged,
            plugged if plugged == range.bytes() => BlockState::Plugged,
            _ => BlockState::Mixed,
        }))
    }

    fn usable_pages(&self, blocks: BlockRun) -> Result<PageRange, Response> {
        self.region.pages_of(blocks, self.usable_region_size).ok_or(Response::Error)
    }

    /// The state of the device for a migration or a snapshot. Which blocks are plugged is not part
    /// of it, because it travels with the memory.
    ///
    /// A version of 32 bits, and then 64 bits each: the fields of [`Region`], the requested size,
    /// and the size of the usable region.
    pub fn save(&self) -> Vec<u8> {
        let head = Encoder::new().u32(STATE_VERSION);
        let fields = configured(&self.region).into_iter().map(|(_, value)| value);
        let sizes = [self.requested_size, self.usable_region_size];
        fields.chain(sizes).fold(head, Encoder::u64).finish()
    }

    /// Loads a state that [`Self::save`] has returned, and counts again which blocks are plugged.
    /// The device must be configured as the one that was saved.
    ///
    /// # Errors
    /// If the state is malformed, a size is not valid, or the configuration differs. Nothing is
    /// changed then.
    pub fn load(&mut self, state: &[u8]) -> Result<(), LoadError> {
        let mut decoder = Decoder::new(state);
        match decoder.u32("version")? {
            STATE_VERSION => {}
            version => {
                let (field, value, allowed) = ("version", version.into(), "1");
                return Err(DecodeError::InvalidValue { field, value, allowed }.into());
            }
        }
        for (field, configured) in configured(&self.region) {
            let saved = decoder.u64(field)?;
            if saved != configured {
                return Err(LoadError::Differs { field, saved, configured });
            }
        }
        let requested = decoder.u64("requested_size")?;
        let usable = decoder.u64("usable_region_size")?;
        decoder.finish()?;
        let size = self.region.region_size;
        self.region.check_size("requested_size", requested, 0..=size)?;
        self.region.check_size("usable_region_size", usable, requested..=size)?;
        self.requested_size = requested;
        self.sizes_are_lost = false;
        self.usable_region_size = usable;
        self.recount();
        Ok(())
    }
}

impl From<MemoryRefused> for Response {
    fn from(refused: MemoryRefused) -> Self {
        match refused {
            MemoryRefused::Busy => Self::Busy,
            MemoryRefused::Missing => Self::Error,
        }
    }
}

/// The fields of a region that must be the same where a state is loaded.
fn configured(region: &Region) -> [(&'static str, u64); 5] {
    [
        ("block_size", region.block_size),
        ("addr", region.addr),
        ("region_size", region.region_size),
        ("has_node_id", region.node_id.is_some().into()),
        ("node_id", region.node_id.unwrap_or(0).into()),
    ]
}
