// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `mock_vmm source`.

use super::cli::{ByteRange, SourceArgs, TrackerName};
use super::report::{LOOK, Report, watch};
use crate::Error;
use crate::guest::threads::{PageSet, ThreadGuest, ThreadGuestOptions};
use crate::memory::TestMemory;
use crate::usage::{Path, Usage};
use crate::vmm::{MockVmm, Tracker};
use pageferry_client::{
    BlockRange, Client, JobStatus, OutgoingOptions, Phase, Punch, SnapshotMode, SnapshotOptions,
};
use pageferry_protocol::control::job::JobKind;
use pageferry_protocol::memory::PageRange;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// The id of the only block.
const RAM: u32 = 0;

/// Hands over the memory, discards, runs the guest, and migrates or saves it, or waits for an
/// operator who does.
///
/// # Errors
/// If no job starts, or the agent is lost. A job that fails is a report and not an error.
pub fn run(arguments: &SourceArgs) -> Result<Report, Error> {
    let memory = super::memory(&arguments.common)?;
    let before = memory.allocated()?;
    let (tracker, path): (fn() -> Tracker, Path) = match arguments.tracker {
        TrackerName::Log => (|| Tracker::Log, Path::MappingAndLog),
        TrackerName::Uffd => (|| Tracker::WriteProtect, Path::Mapping),
    };
    let usage = Usage::new(memory.clone())?;
    let guest = guest(&usage, arguments.write_rate, path)?;
    let vmm = super::connect(&arguments.common, &usage, tracker)?;
    let punch = if arguments.no_punch { Punch::No } else { Punch::Yes };

    Discards {
        client: vmm.client().clone(),
        usage: usage.clone(),
        punch,
        pending: arguments.discard.clone(),
    }
    .make()?;
    vmm.set_guest(guest);
    if arguments.start_paused {
        vmm.operator_pauses()?;
    } else {
        vmm.start()?;
    }

    let pending = arguments.discard_during.clone();
    let during = Discards { client: vmm.client().clone(), usage, punch, pending };
    let during = Arc::new(Mutex::new(during));
    // The passes may end before the loop below sees them. This discard is still during the
    // migration.
    let last_chance = during.clone();
    vmm.before_pause(move || last_chance.lock().unwrap_or_else(PoisonError::into_inner).make());

    let Some(job) = start(&vmm, arguments)? else {
        let status = serve(&vmm, arguments)?;
        return Ok(Report::new(&status));
    };
    let status = watch(&vmm, job, !arguments.common.json, |status| {
        if matches!(status.phase, Phase::Passes | Phase::Saving) {
            during.lock().unwrap_or_else(PoisonError::into_inner).make()?;
        }
        Ok(())
    })?;
    vmm.stop()?;
    Ok(Report {
        source_allocated_before: Some(before),
        source_allocated_after: Some(memory.allocated()?),
        ..Report::new(&status)
    })
}

/// Starts the job of the options. `None` if an operator is to start one.
fn start(vmm: &MockVmm, arguments: &SourceArgs) -> Result<Option<u64>, Error> {
    let outgoing: OutgoingOptions = arguments.outgoing.clone().try_into()?;
    if let Some(target) = &arguments.to {
        return vmm.start_outgoing(target, &outgoing).map(Some);
    }
    let Some(image) = &arguments.snapshot_to else { return Ok(None) };
    let OutgoingOptions { bandwidth, hook_timeout, .. } = outgoing;
    let mode = if arguments.paused { SnapshotMode::Paused } else { SnapshotMode::Background };
    let options = SnapshotOptions {
        mode,
        bandwidth,
        hook_timeout,
        replace: arguments.replace,
        ..SnapshotOptions::default()
    };
    vmm.start_snapshot(image, &options).map(Some)
}

/// Runs the guest for the given time, or until an operator has migrated it away. Returns the final
/// status of the last job.
fn serve(vmm: &MockVmm, arguments: &SourceArgs) -> Result<JobStatus, Error> {
    // Jobs that the agent did for an earlier VMM do not count.
    let mut before = vmm.client().status()?.job;
    eprintln!("the guest runs");
    let until = Instant::now() + arguments.run_for;
    loop {
        let status = match vmm.client().status() {
            Ok(status) => status,
            // The next agent counts its jobs anew.
            Err(_) if arguments.common.supervise && Instant::now() < until => {
                before = 0;
                std::thread::sleep(LOOK);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let gone = status.job > before
            && status.kind == JobKind::Outgoing
            && status.phase == Phase::Completed;
        if gone || (Instant::now() >= until && status.phase.is_final()) {
            return Ok(status);
        }
        std::thread::sleep(LOOK);
    }
}

/// A guest that writes only to pages that are allocated already, so that it does not make the file
/// grow.
fn guest(usage: &Arc<Usage>, rate: u64, path: Path) -> Result<ThreadGuest, Error> {
    let pages: PageSet = extents(usage.memory())?.into_iter().map(|run| (RAM, run)).collect();
    if rate > 0 && pages.pages() == 0 {
        log::warn!("nothing is allocated in the file, so the guest has nothing to write into");
    }
    ThreadGuest::new(
        usage,
        ThreadGuestOptions { rate: Some(rate), pages: Some(pages), path, ..Default::default() },
    )
}

fn extents(memory: &TestMemory) -> Result<Vec<PageRange>, Error> {
    memory.block(RAM)?.extents()
}

/// Ranges to discard.
struct Discards {
    client: Client,
    usage: Arc<Usage>,
    punch: Punch,
    pending: Vec<ByteRange>,
}

impl Discards {
    /// Discards the ranges once: the guest gives them up, then the VMM tells the agent.
    fn make(&mut self) -> Result<(), Error> {
        let block = self.usage.memory().block(RAM)?;
        let (granularity, length) = (block.layout().granularity, block.layout().length);
        let pending = std::mem::take(&mut self.pending);
        for range in &pending {
            let pages = PageRange::inward(range.offset, range.length, granularity, length);
            let pages = pages.map_err(|error| Error::Argument(format!("discard: {error}")))?;
            self.usage.give_up(RAM, pages)?;
        }
        let ranges = pending.iter().map(|range| BlockRange {
            block: RAM,
            offset: range.offset,
            length: range.length,
        });
        self.client.discard(&ranges.collect::<Vec<_>>(), self.punch)?;
        Ok(())
    }
}
