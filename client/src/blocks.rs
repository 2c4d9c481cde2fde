//! Adding and removing blocks, with an agent and without.
//!
//! The blocks belong to the VMM. An agent that is lost changes nothing about them: blocks that are
//! added then are handed to the next one, as discards are. A job that runs keeps the blocks that it
//! started with; a removal cancels it and waits for its end, since a guest that resets does not
//! wait for a migration.

use crate::block::{Block, BlockAdded, BlockSpec};
use crate::client::Client;
use crate::error::Error;
use crate::retry::retry_while_busy;
use crate::session::LostAgent;
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::control::request::{BLOCK_DISCARDED, Request};
use pageferry_protocol::memory::BlockGeometry;
use std::time::Duration;

/// Longest wait of a removal for the job that it has cancelled.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(60);

impl Client {
    /// Adds a block of guest memory. Without an agent it is kept for the next one.
    ///
    /// # Errors
    /// If the block is not valid, overlaps another, lies outside the dirty log or its file, or the
    /// agent refuses it, as it does while a job runs.
    pub fn add_block(&self, spec: BlockSpec<'_>) -> Result<BlockAdded, Error> {
        let geometry = BlockGeometry {
            id: spec.id,
            name: spec.name.to_owned(),
            gpa: spec.gpa,
            length: spec.length,
            granularity: spec.granularity,
        };
        // Held to the end: a new agent gets the block in `reattach` or here, and never both.
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

    /// Removes a block. A job that runs is cancelled first, whoever started it, and this waits
    /// until it has ended; one that can be cancelled no more is waited for. So when this returns,
    /// no agent uses the memory any more. Without an agent the block is only forgotten here, so
    /// that no later agent is handed it.
    ///
    /// The end of a job may take hooks, a resume of the guest among them. So no hook may wait for
    /// the thread that calls this, such as the one of a vCPU that pauses; if one does, the job ends
    /// when that hook has missed its deadline.
    ///
    /// # Errors
    /// - If there is no such block;
    /// - [`Error::Refused`] with the code `Busy` if a job is still in the way after 60 seconds;
    /// - [`Error::AgentRuns`] if the agent is lost and lives on: it may still read this memory. So
    ///   it is if the guest may run elsewhere and depends on the agent ([`Client::end_agent`] ends
    ///   it), or if the VMM may not kill it.
    ///
    /// Nothing is removed then.
    pub fn remove_block(&self, id: u32) -> Result<(), Error> {
        retry_while_busy(REMOVAL_TIMEOUT, || {
            let mut session = self.session();
            if self.memory().block(id).is_none() {
                return Err(Error::UnknownBlock { id });
            }
            match session.control.request(&Request::RemoveBlock { id }, &[], |_| Ok(())) {
                Err(busy @ Error::Refused { code: ErrorCode::Busy, .. }) => {
                    // Refused if it is too late, or the job has just ended: then it is only waited
                    // for.
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
