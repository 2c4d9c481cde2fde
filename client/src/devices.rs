// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices of the agent, for a VMM that has a generic vhost-user front-end.

use crate::client::Client;
use crate::control::socket_pair;
use crate::error::Error;
use pageferry_protocol::control::devices::{DeviceSpec, USUAL_BLOCK_SIZE};
use pageferry_protocol::control::request::Request;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// A device that the agent can be for the guest. What the guest gives back by it is freed or
/// discarded as if the VMM had asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device<'a> {
    /// virtio-balloon (virtio id 5): 5 queues, 16 bytes of configuration.
    Balloon,
    /// virtio-mem (virtio id 24): 1 queue, 56 bytes of configuration.
    Mem {
        /// The name of the block that is its region. The VMM hands it over as discarded.
        block: &'a str,
        /// The unit in which the guest plugs and unplugs, in bytes: a power of two. `None` for
        /// 2 MiB.
        block_size: Option<u64>,
    },
}

impl Client {
    /// A connection to a device of the agent, for the VMM's vhost-user front-end, such as
    /// `vhost::vhost_user::Frontend::from_stream`. The agent makes the device if it has none.
    ///
    /// A device serves one front-end at a time. The agent serves this connection when the one
    /// before has ended. When the agent is lost, so is the connection: attach the next agent, and
    /// ask it for another one.
    ///
    /// # Errors
    /// If the agent has a virtio-mem device with another block or block size, another connection
    /// waits already, or the agent is lost.
    pub fn device_socket(&self, device: Device<'_>) -> Result<UnixStream, Error> {
        let device = match device {
            Device::Balloon => DeviceSpec::Balloon,
            Device::Mem { block, block_size } => DeviceSpec::Mem {
                block: block.to_owned(),
                block_size: block_size.unwrap_or(USUAL_BLOCK_SIZE),
            },
        };
        let (ours, agents) = socket_pair()?;
        let request = Request::ConnectDevice { device };
        self.session().control.request(&request, &[agents.as_fd()], |_| Ok(()))?;
        Ok(ours.into())
    }
}
