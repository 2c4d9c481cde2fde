// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows what an agent serves, and its job: `pageferry status`.

use super::show::{bytes, table, to_json, write_line};
use pageferry_protocol::control::job::{JobStatus, Phase};
use pageferry_protocol::control::{AgentInfo, BlockInfo};
use pageferry_protocol::error::printable;
use pageferry_protocol::memory::PAGE_SIZE;
use serde_json::{Value, json};
use std::io::{self, Write};

/// Prints the agent, its VMM, the memory and the job.
///
/// # Errors
/// If the output cannot be written.
pub fn print(info: &AgentInfo, status: &JobStatus, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        let mut object = to_json(status);
        object.insert("agent".into(), agent_json(info));
        return writeln!(out, "{}", Value::Object(object));
    }
    agent_table(info).iter().try_for_each(|line| write_line(&mut out, line))?;
    if status.phase == Phase::Idle {
        write_line(&mut out, &("trackers", status.trackers.to_string()))?;
        return write_line(&mut out, &("job", "no job was started yet".to_owned()));
    }
    table(status).iter().try_for_each(|line| write_line(&mut out, line))
}

/// The agent as a JSON object. A VMM that is not connected is null.
fn agent_json(info: &AgentInfo) -> Value {
    let block = |block: &BlockInfo| {
        json!({
            "id": block.id,
            "name": block.name,
            "gpa": block.gpa,
            "length": block.length,
            "host_page_size": block.host_page_size,
            "discarded_pages": block.discarded_pages,
        })
    };
    json!({
        "version": info.version,
        "pid": info.pid,
        "name": info.name,
        "vmm_pid": (info.vmm_pid != 0).then_some(info.vmm_pid),
        "blocks": info.blocks.iter().map(block).collect::<Vec<_>>(),
    })
}

/// The agent as lines of a table. Each block has a line.
fn agent_table(info: &AgentInfo) -> Vec<(&'static str, String)> {
    let mut lines = vec![("agent", format!("pageferry {}, process {}", info.version, info.pid))];
    let name = Some(info.name.as_str()).filter(|name| !name.is_empty());
    lines.extend(name.map(|name| ("VM", name.to_owned())));
    lines.push(match info.vmm_pid {
        0 => ("VMM", "none is connected".to_owned()),
        pid => ("VMM", format!("process {pid}")),
    });
    let total: u64 = info.blocks.iter().map(|block| block.length).sum();
    let discarded: u64 = info.blocks.iter().map(|block| block.discarded_pages).sum();
    let discarded = bytes(discarded * PAGE_SIZE);
    let count = match info.blocks.len() {
        1 => "1 block".to_owned(),
        count => format!("{count} blocks"),
    };
    lines.push(("memory", format!("{} in {count}, {discarded} discarded", bytes(total))));
    lines.extend(info.blocks.iter().map(|block| ("  block", block_line(block))));
    lines
}

fn block_line(block: &BlockInfo) -> String {
    let BlockInfo { id, name, gpa, length, host_page_size, discarded_pages } = block;
    let (name, discarded) = (printable(name), bytes(discarded_pages * PAGE_SIZE));
    let (length, host_page) = (bytes(*length), bytes(*host_page_size));
    format!("{id} {name}: {length} at {gpa:#x}, pages of {host_page}, {discarded} discarded")
}
