// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a kind of device has to do. The rest is the same for all: see [`super::back_end`].

use super::buffer::Buffer;
use super::guest_map::DeviceMemory;
use std::fmt::Debug;

/// A device. Its methods are called from the thread of the queues and from the thread of the
/// front-end's messages, so it locks its own state.
pub trait Device: Debug + Send + Sync {
    /// Its name, for people.
    fn name(&self) -> &'static str;

    /// The most queues that a driver can use.
    fn max_queues(&self) -> usize;

    /// The feature bits of this kind of device (`VIRTIO_F_*` of the transport come on top).
    fn features(&self) -> u64;

    /// The driver has chosen these features. A front-end repeats them when it starts and stops the
    /// dirty log. `features` may have bits of the transport.
    fn set_driver_features(&self, features: u64);

    /// A front-end has connected. The driver may repeat the last buffer that an earlier agent has
    /// handled and not returned.
    fn connected(&self) {}

    /// The front-end has gone. The driver goes on with the next one.
    fn disconnected(&self);

    /// The guest has reset the device.
    fn reset(&self);

    /// The configuration space.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the configuration space. What does not fit is ignored.
    fn write_config(&self, offset: u32, bytes: &[u8]);

    /// Handles a buffer that the driver has made available in queue `queue`. `in_use` are the
    /// queues that the driver has set up.
    fn handle(
        &self, queue: usize, in_use: &[bool], buffer: &mut Buffer<'_>, memory: &DeviceMemory<'_>,
    ) -> Handled;

    /// A buffer that was kept and is to be returned now: index of the queue, and head of the
    /// buffer. Asked for after each buffer, and after
    /// [`DevicePort::wake`](super::port::DevicePort::wake).
    fn take_kept(&self) -> Option<(usize, u16)> {
        None
    }

    /// A buffer from [`Device::take_kept`] could not be returned yet.
    fn keep_again(&self, _queue: usize, _head: u16) {}

    /// The queue is stopped. The device forgets the buffers of it that it keeps, which are the last
    /// ones that it has got, and says how many they are.
    fn forget_kept(&self, _queue: usize) -> u16 {
        0
    }

    /// True once if the driver must read the configuration again. Asked for after each buffer.
    fn take_config_change(&self) -> bool {
        false
    }

    /// The state of the device for its next back-end: what is in no queue and in no memory.
    fn save(&self) -> Vec<u8>;

    /// Takes the state of an earlier back-end.
    ///
    /// # Errors
    /// What is wrong with it, in words. The state is as before then.
    fn load(&self, state: &[u8]) -> Result<(), String>;
}

/// What becomes of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handled {
    /// The driver gets it back.
    Return,
    /// The device keeps it until [`Device::take_kept`].
    Keep,
    /// The driver does not follow the rules in a way that leaves no way to go on: the queue is not
    /// served any more until the driver sets it up again.
    Break(&'static str),
}
