// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent's devices: `pageferry balloon`.

use super::OperatorArgs;
use super::agent_connection::AgentConnection;
use super::exit::Exit;
use super::parse::parse_size;
use super::show::{bytes, write_line};
use clap::Args;
use pageferry_protocol::control::devices::BalloonStatus;
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
    let driver = if status.driver { "the guest has one" } else { "the guest has none (yet)" };
    let mut lines = vec![
        ("driver", driver.to_owned()),
        ("target", bytes(status.target)),
        ("actual", bytes(status.actual)),
        ("freed", bytes(status.freed)),
    ];
    if status.outside > 0 {
        let outside = format!("{} that are no memory of this agent", bytes(status.outside));
        lines.push(("outside", outside));
    }
    if with_stats {
        lines.extend(status.stats.iter().filter_map(|(tag, value)| {
            let (name, is_size) = STATS.get(usize::from(*tag))?;
            Some((*name, if *is_size { bytes(*value) } else { value.to_string() }))
        }));
    }
    lines
}
