// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A source of discards like virtio-mem: a block that starts unplugged, and whose memory is plugged
//! and unplugged in units.

use crate::Error;
use crate::balloon::{byte_range, is_busy};
use crate::usage::Usage;
use pageferry_client::{Client, Punch};
use pageferry_protocol::memory::{PageRange, pages_in};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The device of one block. Unplugged units are discarded and holes.
#[derive(Debug)]
pub struct Plug {
    client: Client,
    usage: Arc<Usage>,
    block: u32,
    /// Pages of a unit.
    unit: u64,
    plugged: BTreeSet<u64>,
}

impl Plug {
    /// The device of a block that was added as discarded, with units of `unit` bytes, all of them
    /// unplugged.
    ///
    /// # Errors
    /// If there is no such block, or `unit` is not a multiple of the block's granularity.
    pub fn new(client: Client, usage: Arc<Usage>, block: u32, unit: u64) -> Result<Self, Error> {
        let granularity = usage.memory().block(block)?.layout().granularity;
        if unit == 0 || !unit.is_multiple_of(granularity) {
            return Err(Error::Argument(format!(
                "units of {unit:#x} bytes in a block with granularity {granularity:#x}"
            )));
        }
        Ok(Self { client, usage, block, unit: pages_in(unit), plugged: BTreeSet::new() })
    }

    /// The pages of unit `index`, cut at the end of the block.
    fn pages(&self, index: u64) -> Result<PageRange, Error> {
        let block = self.usage.memory().block(self.block)?.all();
        Ok(PageRange::new(index.saturating_mul(self.unit), self.unit).intersection(&block))
    }

    /// The units that are plugged.
    pub fn plugged(&self) -> &BTreeSet<u64> {
        &self.plugged
    }

    /// Plugs a unit. False if the agent is busy or the VMM is paused. Then the guest gets the
    /// answer "busy" and asks again.
    ///
    /// # Errors
    /// If the agent refuses for another reason.
    pub fn plug(&mut self, index: u64) -> Result<bool, Error> {
        let usage = self.usage.clone();
        Ok(usage.while_running(|| self.plug_now(index))?.unwrap_or(false))
    }

    fn plug_now(&mut self, index: u64) -> Result<bool, Error> {
        let pages = self.pages(index)?;
        match self.client.populate(&[byte_range(self.block, pages)]) {
            Ok(_) => {}
            Err(error) if is_busy(&error) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        self.usage.take_back(self.block, pages)?;
        self.plugged.insert(index);
        Ok(true)
    }

    /// Unplugs a unit. False if the VMM is paused.
    ///
    /// # Errors
    /// If the client refuses, which it never should.
    pub fn unplug(&mut self, index: u64) -> Result<bool, Error> {
        let usage = self.usage.clone();
        Ok(usage.while_running(|| self.unplug_now(index))?.is_some())
    }

    fn unplug_now(&mut self, index: u64) -> Result<(), Error> {
        let pages = self.pages(index)?;
        self.usage.give_up(self.block, pages)?;
        self.client.discard(&[byte_range(self.block, pages)], Punch::Yes)?;
        self.plugged.remove(&index);
        Ok(())
    }
}
