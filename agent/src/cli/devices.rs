// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent's devices: `pageferry balloon` and `pageferry mem`.

use super::OperatorArgs;
use super::agent_connection::AgentConnection;
use super::exit::Exit;
use super::parse::parse_size;
use super::show::{bytes, write_line};
use clap::Args;
use pageferry_protocol::control::devices::{BalloonStatus, MemStatus};
use pageferry_protocol::control::request::Request;
use serde_json::{Map, Value, json};
use std::error::Error;
use std::io::{self, Write};

/// `pageferry balloon`.
#[derive(Debug, Args)]
pub struct BalloonArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// How much memory the balloon is to take from the guest, with K, M, G or T. 0 gives all of it
    /// back. The guest may take its time, and may not have so much to give.
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
    /// Ask the guest what it says about its memory.
    #[arg(long)]
    stats: bool,
}

/// What the guest says about its memory: names by their tags (`VIRTIO_BALLOON_S_*`), and whether
/// the value is in bytes.
const STATS: [(&str, bool); 16] = [
    ("swap_in", true),
    ("swap_out", true),
    ("major_faults", false),
    ("minor_faults", false),
    ("free_memory", true),
    ("total_memory", true),
    ("available_memory", true),
    ("disk_caches", true),
    ("hugetlb_allocations", false),
    ("hugetlb_failures", false),
    ("oom_kills", false),
    ("allocation_stalls", false),
    ("async_scans", false),
    ("direct_scans", false),
    ("async_reclaims", false),
    ("direct_reclaims", false),
];

/// Shows the balloon, and sets its size.
///
/// # Errors
/// If the agent does not answer, or has no balloon.
pub fn balloon(args: &BalloonArgs) -> Result<Exit, Box<dyn Error>> {
    let request = Request::Balloon { target: args.size, ask_stats: args.stats };
    let mut agent = AgentConnection::open(&args.operator.socket)?;
    let status = agent.ask(&request, BalloonStatus::decode)?;
    let mut out = io::stdout().lock();
    if args.operator.json {
        writeln!(out, "{}", to_json(&status, args.stats))?;
        return Ok(Exit::Done);
    }
    for line in table(&status, args.stats) {
        write_line(&mut out, &line)?;
    }
    Ok(Exit::Done)
}

fn to_json(status: &BalloonStatus, with_stats: bool) -> Value {
    let mut object = json!({
        "driver": status.driver,
        "target": status.target,
        "actual": status.actual,
        "freed": status.freed,
        "outside": status.outside,
        "hinted": status.hinted,
    });
    if with_stats {
        let named = status.stats.iter().filter_map(|(tag, value)| {
            STATS.get(usize::from(*tag)).map(|(name, _)| ((*name).to_owned(), json!(value)))
        });
        object["stats"] = Value::Object(named.collect::<Map<_, _>>());
    }
    object
}

fn table(status: &BalloonStatus, with_stats: bool) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("driver", driver(status.driver)),
        ("target", bytes(status.target)),
        ("actual", bytes(status.actual)),
        ("freed", bytes(status.freed)),
    ];
    if status.outside > 0 {
        let outside = format!("{} that are no memory of this agent", bytes(status.outside));
        lines.push(("outside", outside));
    }
    if status.hinted > 0 {
        lines.push(("hinted", format!("{} when the last migration began", bytes(status.hinted))));
    }
    if with_stats {
        if status.stats.is_empty() {
            lines.push(("statistics", "the guest has sent none".to_owned()));
        }
        lines.extend(status.stats.iter().filter_map(|(tag, value)| {
            let (name, is_size) = STATS.get(usize::from(*tag))?;
            Some((*name, if *is_size { bytes(*value) } else { value.to_string() }))
        }));
    }
    lines
}

/// `pageferry mem`.
#[derive(Debug, Args)]
pub struct MemArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// How much memory the guest is to have plugged, with K, M, G or T: a multiple of the block
    /// size. The guest may take its time, and may not be able to give memory back that is in use.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    requested: Option<u64>,
}

/// Shows virtio-mem, and sets the requested size.
///
/// # Errors
/// If the agent does not answer, or has no such device.
pub fn mem(args: &MemArgs) -> Result<Exit, Box<dyn Error>> {
    let request = Request::PluggedMemory { requested: args.requested };
    let mut agent = AgentConnection::open(&args.operator.socket)?;
    let status = agent.ask(&request, MemStatus::decode)?;
    let mut out = io::stdout().lock();
    if args.operator.json {
        let MemStatus { driver, block_size, addr, region_size, usable_size, plugged, requested } =
            status;
        let object = json!({
            "driver": driver,
            "block_size": block_size,
            "addr": addr,
            "region_size": region_size,
            "usable_size": usable_size,
            "plugged": plugged,
            "requested": requested,
        });
        writeln!(out, "{object}")?;
        return Ok(Exit::Done);
    }
    let region = match status.region_size {
        0 => "none: the VMM has not handed it over, or it cannot be one; --requested says why"
            .to_owned(),
        size => format!("{} at {:#x}", bytes(size), status.addr),
    };
    for line in [
        ("driver", driver(status.driver)),
        ("region", region),
        ("block size", bytes(status.block_size)),
        ("requested", bytes(status.requested)),
        ("plugged", bytes(status.plugged)),
    ] {
        write_line(&mut out, &line)?;
    }
    Ok(Exit::Done)
}

fn driver(is_there: bool) -> String {
    (if is_there { "the guest has one" } else { "the guest has none (yet)" }).to_owned()
}
