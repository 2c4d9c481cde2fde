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
use crate::session::LostAgent;
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::control::request::{BLOCK_DISCARDED, Request};
use pageferry_protocol::memory::BlockGeometry;
use std::time::Duration;

/// Longest time that a removal waits for the job that it has cancelled.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(60);

impl Client {
    /// Adds a block of guest memory. Without an agent, the client keeps it for the next one.
    ///
    /// # Errors
    /// If the block is not valid, overlaps another, or lies outside the dirty log or its file; or
    /// the agent refuses it, as it does while a job runs.
    pub fn add_block(&self, spec: BlockSpec<'_>) -> Result<BlockAdded, Error> {
        let geometry = BlockGeometry {
            id: spec.id,
            name: spec.name.to_owned(),
            gpa: spec.gpa,
            length: spec.length,
            granularity: spec.granularity,
        };
        // Locked to the end: a new agent gets the block from `reattach` or from here, and never
        // from both.
        let mut session = self.session();
        self.memory().reserve(&geometry)?;
        let flags = if spec.discarded { BLOCK_DISCARDED } else { 0 };
        let added = Block::new(geometry, &spec).and_then(|block| {
            let added = match session.control.add_block(&block, flags) {
                Err(Error::AgentLost { .. }) => block.added(),
                sent => sent?,
            };
            self.memory().insert(std::sync::Arc::new(block));
            Ok(added)
        });
        if added.is_err() {
            self.memory().forget(spec.id);
        }
        added
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
        retry_while_busy(REMOVAL_TIMEOUT, || {
            let mut session = self.session();
            if self.memory().block(id).is_none() {
                return Err(Error::UnknownBlock { id });
            }
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
                Ok(()) => {}
            }
            self.memory().forget(id);
            Ok(())
        })
    }
}
