// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-mem as a device of the agent: finds its block, and hands requests to the state machine.

use super::device::VirtioMem;
use super::plugged::{PluggedBlock, region_of};
use super::wire::{CONFIG_SIZE, REQUEST_SIZE, RESPONSE_SIZE};
use crate::devices::access::SessionMemory;
use crate::devices::buffer::Buffer;
use crate::devices::device::{Device, Handled};
use crate::devices::guest_map::DeviceMemory;
use crate::lock::lock;
use crate::memory::GuestMemory;
use pageferry_protocol::control::devices::MemStatus;
use std::sync::{Arc, Mutex};

/// How the device is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemOptions {
    /// The name of the block that is its region.
    pub block: String,
    /// The unit in which the guest plugs and unplugs, in bytes.
    pub block_size: u64,
}

/// The device.
#[derive(Debug)]
pub struct MemDevice {
    options: MemOptions,
    session: Arc<dyn SessionMemory>,
    state: Mutex<State>,
    /// The configuration, as every request that was answered has left it. It is locked after the
    /// state, or alone.
    config: Mutex<Vec<u8>>,
}

#[derive(Debug, Default)]
struct State {
    /// The features that the driver has chosen.
    features: Option<u64>,
    /// The state machine, once the block is there, and the id of the block.
    device: Option<(VirtioMem<PluggedBlock>, u32)>,
    block: PluggedBlock,
    /// What was said about the block last, so that it is said once.
    complaint: String,
    /// A front-end has connected while there was no state machine: the first request may be a
    /// replay.
    may_be_replay: bool,
    /// The state machine was just made. An agent before this one may have told the driver other
    /// sizes.
    sizes_are_new: bool,
}

impl MemDevice {
    /// A device on the memory of `session`.
    pub fn new(options: MemOptions, session: Arc<dyn SessionMemory>) -> Self {
        let config = Mutex::new(vec![0; CONFIG_SIZE]);
        Self { options, session, state: Mutex::default(), config }
    }

    /// How it is configured.
    pub fn options(&self) -> &MemOptions {
        &self.options
    }

    /// Sets how much memory the guest is to have plugged, in bytes. True if that has changed: then
    /// the driver must hear of it.
    ///
    /// # Errors
    /// If there is no region, or the size does not fit it.
    pub fn set_requested_size(&self, size: u64) -> Result<bool, String> {
        let set = |device: &mut VirtioMem<PluggedBlock>| {
            device.set_requested_size(size).map_err(|error| error.to_string())
        };
        self.with_device(set).unwrap_or_else(|| Err(self.why_not()))
    }

    /// Why there is no region.
    fn why_not(&self) -> String {
        let name = &self.options.block;
        let memory = self.session.memory().unwrap_or_default();
        let blocks = memory.blocks();
        let names: Vec<&str> = blocks.iter().map(|block| &*block.geometry.name).collect();
        match region_of(&memory, name, self.options.block_size) {
            Some(Err(complaint)) => format!("block {name:?}: {complaint}"),
            _ if names.is_empty() => "the VMM has handed over no memory yet".to_owned(),
            _ => {
                let names = names.join(", ");
                format!("the VMM has handed over no block named {name:?}; its blocks: {names}")
            }
        }
    }

    /// What operators see.
    pub fn status(&self) -> MemStatus {
        let driver = lock(&self.state).features.is_some();
        let config = self.with_device(|device| device.config());
        config.map_or_else(MemStatus::default, |config| MemStatus {
            driver,
            block_size: config.block_size,
            addr: config.addr,
            region_size: config.region_size,
            usable_size: config.usable_region_size,
            plugged: config.plugged_size,
            requested: config.requested_size,
        })
    }

    /// Runs `act` on the state machine. `None` if the block is not there, or cannot be the region.
    fn with_device<T>(&self, act: impl FnOnce(&mut VirtioMem<PluggedBlock>) -> T) -> Option<T> {
        let memory = self.session.memory()?;
        self.on(&mut lock(&self.state), &memory, act)
    }

    /// As [`State::on`]. Publishes the configuration before the driver can hear of the outcome:
    /// Linux compares it with what it was told.
    fn on<T>(
        &self, state: &mut State, memory: &Arc<GuestMemory>,
        act: impl FnOnce(&mut VirtioMem<PluggedBlock>) -> T,
    ) -> Option<T> {
        let done = state.on(&self.options, memory, |device| {
            let done = act(device);
            (done, device.config().encode().to_vec())
        });
        // Without a block there is nothing to plug.
        let (done, config) = done
            .map_or_else(|| (None, vec![0; CONFIG_SIZE]), |(done, config)| (Some(done), config));
        *lock(&self.config) = config;
        done
    }
}

impl State {
    /// Runs `act` on the state machine, which is made when the block is there. `None` if it is not.
    fn on<T>(
        &mut self, options: &MemOptions, memory: &Arc<GuestMemory>,
        act: impl FnOnce(&mut VirtioMem<PluggedBlock>) -> T,
    ) -> Option<T> {
        let (region, id) = match region_of(memory, &options.block, options.block_size)? {
            Ok(found) => found,
            Err(complaint) => {
                if self.complaint != complaint {
                    log::error!("virtio-mem: block {:?}: {complaint}", options.block);
                    self.complaint = complaint;
                }
                return None;
            }
        };
        let _reach = self.block.reach(memory, id);
        let is_same = |(device, other): &(VirtioMem<_>, u32)| *other == id && device.is_on(&region);
        if !self.device.as_ref().is_some_and(is_same) {
            // Its fields were checked.
            self.device = VirtioMem::new(region, self.block.clone()).ok().map(|made| (made, id));
            if let Some((device, _)) = &mut self.device {
                if std::mem::take(&mut self.may_be_replay) {
                    device.connected();
                }
                device.forget_sizes();
                self.sizes_are_new = true;
            }
        }
        let (device, _) = self.device.as_mut()?;
        // A job may have changed which blocks are plugged.
        device.recount();
        Some(act(device))
    }
}

impl Device for MemDevice {
    fn name(&self) -> &'static str {
        "virtio-mem"
    }

    fn max_queues(&self) -> usize {
        1
    }

    fn features(&self) -> u64 {
        super::wire::FEATURE_UNPLUGGED_INACCESSIBLE
    }

    fn set_driver_features(&self, features: u64) {
        lock(&self.state).features = Some(features);
    }

    fn connected(&self) {
        let mut state = lock(&self.state);
        match &mut state.device {
            Some((device, _)) => device.connected(),
            None => state.may_be_replay = true,
        }
    }

    fn disconnected(&self) {
        lock(&self.state).features = None;
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        state.features = None;
        state.may_be_replay = false;
        if let Some((device, _)) = &mut state.device {
            device.reset();
        }
    }

    fn config(&self) -> Vec<u8> {
        // While a request waits for a disk, the driver reads what held before it.
        if let (Ok(mut state), Some(memory)) = (self.state.try_lock(), self.session.memory()) {
            self.on(&mut state, &memory, |_| ());
        }
        lock(&self.config).clone()
    }

    fn take_config_change(&self) -> bool {
        std::mem::take(&mut lock(&self.state).sizes_are_new)
    }

    fn write_config(&self, _offset: u32, _bytes: &[u8]) {}

    fn handle(
        &self, _queue: usize, _in_use: &[bool], buffer: &mut Buffer<'_>, memory: &DeviceMemory<'_>,
    ) -> Handled {
        let mut state = lock(&self.state);
        let features = state.features.unwrap_or(0);
        let Some(request) = buffer.read(REQUEST_SIZE) else {
            return Handled::Break("a request does not lie in memory");
        };
        let room = buffer.writable().iter().map(|piece| piece.length).sum::<u64>();
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let handled = self.on(&mut state, memory.memory(), |device| {
            device.check_features(features).map_err(|error| error.to_string())?;
            device.handle(&request, room).map_err(|error| error.to_string())
        });
        match handled {
            Some(Ok(response)) => {
                let response: [u8; RESPONSE_SIZE] = response;
                // There is room: the state machine has checked that.
                buffer.set_answer(&response);
                Handled::Return
            }
            Some(Err(error)) => {
                log::warn!("virtio-mem: {error}");
                Handled::Break("a request that cannot be answered")
            }
            None => Handled::Break("the VMM has not handed over the block of the region"),
        }
    }

    fn save(&self) -> Vec<u8> {
        self.with_device(|device| device.save()).unwrap_or_default()
    }

    fn load(&self, state: &[u8]) -> Result<(), String> {
        let loaded = self
            .with_device(|device| device.load(state).map_err(|error| crate::error::chain(&error)));
        // The driver knows the sizes of the state.
        lock(&self.state).sizes_are_new = false;
        loaded.unwrap_or_else(|| Err(self.why_not()))
    }
}
