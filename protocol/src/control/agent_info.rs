// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an agent serves: its VMM and the blocks of guest memory, for operators.

use super::codec::{DecodeError, Decoder, Encoder, truncate_text};
use super::request::MAX_VM_NAME;
use crate::memory::geometry::{MAX_BLOCKS, MAX_NAME};

/// Longest version in bytes.
const MAX_VERSION: usize = 64;

/// Answer to [`Request::QueryAgent`](super::request::Request::QueryAgent).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AgentInfo {
    /// Version of the agent, such as `0.1.0`.
    pub version: String,
    /// Process id of the agent, as it sees it.
    pub pid: u32,
    /// The VM's name; empty if it has none.
    pub name: String,
    /// Process id of the VMM, as the agent sees it; 0 if no VMM is connected.
    pub vmm_pid: u32,
    /// The blocks in the order of their guest physical address.
    pub blocks: Vec<BlockInfo>,
}

/// A block of guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockInfo {
    /// Its id.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Guest physical address of its first byte.
    pub gpa: u64,
    /// Its length in bytes.
    pub length: u64,
    /// What its file allocates at once, in bytes.
    pub host_page_size: u64,
    /// Its pages of 4096 bytes that are discarded.
    pub discarded_pages: u64,
}

impl AgentInfo {
    /// Adds the fields to a body.
    pub fn encode(&self, encoder: Encoder) -> Encoder {
        let encoder = encoder
            .u32(self.pid)
            .u32(self.vmm_pid)
            .u32(self.blocks.len() as u32)
            .text(truncate_text(&self.version, MAX_VERSION))
            .text(truncate_text(&self.name, MAX_VM_NAME));
        self.blocks.iter().fold(encoder, |encoder, block| {
            encoder
                .u32(block.id)
                .u64(block.gpa)
                .u64(block.length)
                .u64(block.host_page_size)
                .u64(block.discarded_pages)
                .text(truncate_text(&block.name, MAX_NAME))
        })
    }

    /// Reads the fields from a body.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let (pid, vmm_pid) = (decoder.u32("pid")?, decoder.u32("vmm_pid")?);
        let blocks = decoder.u32("blocks")?;
        if blocks as usize > MAX_BLOCKS {
            let (field, value, allowed) = ("blocks", blocks.into(), "at most 512");
            return Err(DecodeError::InvalidValue { field, value, allowed });
        }
        let version = decoder.text("version", MAX_VERSION)?.to_owned();
        let name = decoder.text("name", MAX_VM_NAME)?.to_owned();
        let mut info = Self { version, pid, name, vmm_pid, blocks: Vec::new() };
        for _ in 0..blocks {
            info.blocks.push(BlockInfo {
                id: decoder.u32("id")?,
                gpa: decoder.u64("gpa")?,
                length: decoder.u64("length")?,
                host_page_size: decoder.u64("host_page_size")?,
                discarded_pages: decoder.u64("discarded_pages")?,
                name: decoder.text("name", MAX_NAME)?.to_owned(),
            });
        }
        Ok(info)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_survives_the_wire_and_its_blocks_are_limited() {
        let block = |id| BlockInfo {
            id,
            name: format!("ram{id}"),
            gpa: u64::from(id) << 30,
            length: 1 << 30,
            host_page_size: 4096,
            discarded_pages: u64::from(id),
        };
        let info = AgentInfo {
            version: "0.1.0".into(),
            pid: 7,
            name: "vm 1".into(),
            vmm_pid: 8,
            blocks: (0..3).map(block).collect(),
        };
        let body = info.encode(Encoder::new()).finish();
        assert_eq!(AgentInfo::decode(&mut Decoder::new(&body)).unwrap(), info);
        let many = Encoder::new().u32(1).u32(2).u32(513).finish();
        let error = AgentInfo::decode(&mut Decoder::new(&many)).unwrap_err().to_string();
        assert_eq!(error, "blocks is 0x201, allowed: at most 512");
    }
}
