// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Adding and removing blocks of guest memory.
//!
//! A job keeps the blocks that it was started with. A new block waits until the job has ended. A
//! removal cancels the job and waits for its end, since a guest that resets does not wait for a
//! migration.

use crate::block::{Block, BlockAdded, BlockSpec};
use crate::client::Client;
use crate::error::Error;
use crate::retry::retry_while_busy;
use crate::session::{LostAgent, Session};
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::control::request::{BLOCK_DISCARDED, Request};
use pageferry_protocol::error::chain;
use pageferry_protocol::memory::PAGE_SIZE;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

/// Longest time that a removal waits for the job that it has cancelled.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(60);

/// A region of guest memory, as the memory table of vhost-user describes it, or a VMM's list of
/// memory slots. [`Client::add_blocks`] makes a block of it.
#[derive(Debug, Clone, Copy)]
pub struct MemoryRegion<'a> {
    /// Guest physical address of the first byte; a multiple of 4096.
    pub gpa: u64,
    /// Length in bytes; a multiple of 4096.
    pub length: u64,
    /// Address at which the VMM has the region mapped; 0 if it has not. See
    /// [`BlockSpec::vmm_address`].
    pub vmm_address: u64,
    /// The file that holds the memory. See [`BlockSpec::memory`].
    pub memory: BorrowedFd<'a>,
    /// Where the region begins in that file, in bytes.
    pub fd_offset: u64,
}

impl Client {
    /// Adds a block of guest memory. Without an agent, the client keeps it for the next one.
    ///
    /// # Errors
    /// If the block is not valid, overlaps another, or lies outside the dirty log or its file; or
    /// the agent refuses it, as it does while a job runs.
    pub fn add_block(&self, spec: BlockSpec<'_>) -> Result<BlockAdded, Error> {
        self.add(spec, false)
    }

    /// The same for an ordinary block and for that of a clone.
    pub(crate) fn add(&self, spec: BlockSpec<'_>, is_clone: bool) -> Result<BlockAdded, Error> {
        // Locked to the end: a new agent gets the block from `reattach` or from here, and never
        // from both.
        let mut session = self.flushed_session();
        let block = self.memory().add(&spec, is_clone)?;
        self.send_block(&mut session, &block, spec.discarded)
    }

    /// Adds a list of regions as blocks: all of them, or none. Returns their ids in the order of
    /// the list.
    ///
    /// The blocks get the lowest ids that are not in use, in the order of their guest physical
    /// addresses: 0, 1, ... in the first call. A block is named `ram@` and its address in
    /// hexadecimal. Its granularity is its host page size, and it starts as populated. A block
    /// needs the same id at both ends of a migration. So a destination whose memory was plugged in
    /// later at the source makes the same calls, or uses [`Client::add_block`].
    ///
    /// A VMM with vhost-user devices has this list already: it is the memory table that it sends
    /// to its back-ends (`VHOST_USER_SET_MEM_TABLE`), with `userspace_addr` as
    /// [`MemoryRegion::vmm_address`] and `mmap_offset` as [`MemoryRegion::fd_offset`].
    ///
    /// # Errors
    /// As for [`Client::add_block`].
    pub fn add_blocks(&self, regions: &[MemoryRegion<'_>]) -> Result<Vec<u32>, Error> {
        let mut order: Vec<usize> = (0..regions.len()).collect();
        order.sort_by_key(|at| regions[*at].gpa);
        let mut session = self.flushed_session();
        let mut ids = vec![0; regions.len()];
        for (at, id) in order.into_iter().zip(self.memory().unused_ids(regions.len())) {
            ids[at] = id;
        }
        // All are checked before the agent gets the first.
        let mut blocks = Vec::new();
        for (region, id) in regions.iter().zip(&ids) {
            match self.memory().add(&region.spec(*id, &format!("ram@{:#x}", region.gpa)), false) {
                Ok(block) => blocks.push(block),
                Err(error) => {
                    blocks.iter().for_each(|block| self.memory().forget(block.geometry.id));
                    return Err(error);
                }
            }
        }
        for (sent, block) in blocks.iter().enumerate() {
            if let Err(error) = self.send_block(&mut session, block, false) {
                let (sent, rest) = blocks.split_at(sent);
                rest.iter().for_each(|block| self.memory().forget(block.geometry.id));
                drop(session);
                self.take_back(sent);
                return Err(error);
            }
        }
        Ok(ids)
    }

    /// Hands a block to the agent. If the agent refuses it, the client forgets it.
    ///
    /// The client has the block already. So it knows every block that the agent knows, and a hook
    /// of a job that starts right after the agent has added the block finds it.
    fn send_block(
        &self, session: &mut Session, block: &Block, discarded: bool,
    ) -> Result<BlockAdded, Error> {
        let flags = if discarded { BLOCK_DISCARDED } else { 0 };
        match session.control.add_block(block, flags) {
            Err(Error::AgentLost { .. }) => Ok(block.added()),
            Err(refused) => {
                self.memory().forget(block.geometry.id);
                Err(refused)
            }
            added => added,
        }
    }

    /// Removes blocks that were added together with one that the agent has refused. Nothing uses
    /// them yet. A job that was started in between is of no use without the rest.
    fn take_back(&self, blocks: &[Arc<Block>]) {
        for block in blocks {
            if let Err(error) = self.remove_block(block.geometry.id) {
                log::warn!("block {} stays: {}", block.geometry.name, chain(&error));
            }
        }
    }

    /// Removes a block. If a job runs, whoever started it, this cancels it and waits for its end; a
    /// job that is past the point of cancelling is only waited for. So when this returns, no agent
    /// uses the memory any more. Without an agent the client only forgets the block, and hands it
    /// to no later agent.
    ///
    /// The end of a job may need hooks, for example to resume the guest. So no hook may wait for
    /// the thread that calls this, such as the thread of a vCPU that is to pause. If one does, the
    /// job ends when that hook has missed its deadline.
    ///
    /// # Errors
    /// - If there is no such block;
    /// - [`Error::Refused`] with the code `Busy` if a job is still in the way after 60 seconds;
    /// - [`Error::AgentStillRunning`] if the agent is lost and still lives: it may still read this
    ///   memory. That is so if the guest may run elsewhere and depends on the agent
    ///   ([`Client::end_agent`] ends it), or if the VMM may not kill it.
    ///
    /// The block is not removed then.
    pub fn remove_block(&self, id: u32) -> Result<(), Error> {
        let removed = retry_while_busy(REMOVAL_TIMEOUT, || {
            let mut session = self.flushed_session();
            let block = self.memory().block(id).ok_or(Error::UnknownBlock { id })?;
            match session.control.request(&Request::RemoveBlock { id }, &[], |_| Ok(())) {
                Err(busy @ Error::Refused { code: ErrorCode::Busy, .. }) => {
                    // Refused if it is too late, or the job has just ended. Then waiting is enough.
                    let _ = session.control.request(&Request::Cancel, &[], |_| Ok(()));
                    return Err(busy);
                }
                // It may be reading there (`never-read`).
                Err(Error::AgentLost { .. }) => match session.end_lost_agent()? {
                    LostAgent::Ended => {}
                    LostAgent::KeptAlive => {
                        return Err(session.agent_runs(
                            "the guest may run elsewhere, and depends on it; \
                             Client::end_agent ends it if that is decided",
                        ));
                    }
                },
                Err(refused) => return Err(refused),
                Ok(()) => session.control.link().end_service(id),
            }
            self.memory().forget(id);
            Ok(block)
        })?;
        self.tracking().forget_mapping(removed.vmm_address);
        Ok(())
    }
}

impl<'a> MemoryRegion<'a> {
    fn spec(&self, id: u32, name: &'a str) -> BlockSpec<'a> {
        let Self { gpa, length, vmm_address, memory, fd_offset } = *self;
        let (granularity, discarded) = (PAGE_SIZE, false);
        BlockSpec { id, name, gpa, length, memory, fd_offset, vmm_address, granularity, discarded }
    }
}
