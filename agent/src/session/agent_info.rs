// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the agent serves, for operators.

use super::Session;
use super::shared::SharedSession;
use crate::memory::block::Block;
use crate::waiting::may_wait;
use pageferry_protocol::control::{AgentInfo, BlockInfo};
use std::fmt;

impl SharedSession {
    /// The agent, its VMM, and the blocks of guest memory.
    pub fn agent_info(&self) -> AgentInfo {
        let session = self.lock();
        let (memory, name) = (session.memory.clone(), session.vm_name.get());
        let vmm_pid = session.vmm_pid.unwrap_or_default();
        drop(session);
        // A bitmap of a terabyte has 32 MiB.
        may_wait("count discarded pages");
        AgentInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            name,
            vmm_pid,
            blocks: memory.blocks().iter().map(|block| block_info(block)).collect(),
        }
    }
}

fn block_info(block: &Block) -> BlockInfo {
    BlockInfo {
        id: block.geometry.id,
        name: block.geometry.name.clone(),
        gpa: block.geometry.gpa,
        length: block.geometry.length,
        host_page_size: block.backing.host_page_size(),
        discarded_pages: block.discarded.count(block.all()),
    }
}

impl Session {
    /// The VMM that this agent serves, for a refusal of another.
    pub(super) fn vmm(&self) -> VmmInWords {
        VmmInWords { pid: self.vmm_pid, name: self.vm_name.get() }
    }
}

/// A VMM for people.
pub(super) struct VmmInWords {
    pid: Option<u32>,
    name: String,
}

impl fmt::Display for VmmInWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.pid, self.name.as_str()) {
            (Some(pid), "") => write!(f, "the VMM with process id {pid}"),
            (Some(pid), name) => write!(f, "the VMM of {name}, process id {pid}"),
            (None, "") => f.write_str("another VMM"),
            (None, name) => write!(f, "the VMM of {name}"),
        }
    }
}
