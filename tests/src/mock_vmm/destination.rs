// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `mock_vmm destination`.

use super::cli::DestinationArgs;
use super::report::{Report, watch};
use crate::Error;
use crate::deadline::wait_for;
use crate::guest::threads::{ThreadGuest, ThreadGuestOptions};
use crate::usage::Usage;
use crate::vmm::{MockVmm, Tracker};
use pageferry_client::{IncomingOptions, JobStatus, Phase, RestoreMode, RestoreOptions, RunState};
use pageferry_protocol::control::job::JobKind;

/// Hands over the memory and waits for a guest, or restores one. Then compares the memory with what
/// the source's guest wrote: before the commit, or in postcopy when all memory has arrived.
///
/// # Errors
/// If no job starts, or the agent is lost. A job that fails is a report and not an error.
pub fn run(arguments: &DestinationArgs) -> Result<Report, Error> {
    let memory = super::memory(&arguments.common)?;
    let usage = Usage::new(memory)?;
    // This guest takes over the ledger and writes nothing.
    let guest = ThreadGuest::new(
        &usage,
        ThreadGuestOptions { rate: Some(0), ..ThreadGuestOptions::default() },
    )?;
    let vmm = super::connect(&arguments.common, &usage, || Tracker::Log)?;
    vmm.set_guest(guest);
    let job = start(&vmm, arguments)?;
    let status = watch(&vmm, job, !arguments.common.json, |_| Ok(()))?;
    let mut record = vmm.record();
    if status.phase == Phase::Completed && record.memory_complete {
        // The guest ran before its memory was here, so the memory is compared only now.
        record.words_checked = vmm.usage().check()?;
        record.allocated_at_load = Some(vmm.memory().allocated()?);
    }
    let stays_paused = status.guest == Some(RunState::Paused);
    if status.phase == Phase::Completed && record.runs == stays_paused {
        if stays_paused {
            return Err(Error::Mismatch("the guest was to stay paused, and was resumed".into()));
        }
        return Err(Error::Mismatch("the job completed, but the guest was not resumed".into()));
    }
    log::info!("{} words of the guest's ledger were compared", record.words_checked);
    Ok(Report { destination_allocated: record.allocated_at_load, ..Report::new(&status) })
}

/// True for a restore, and for a migration whose source is here.
fn brings_a_guest(status: &JobStatus) -> bool {
    match status.kind {
        JobKind::Restore => true,
        JobKind::Incoming => status.phase > Phase::Connecting && status.phase != Phase::Cancelled,
        _ => false,
    }
}

/// Starts the job of the options, or waits until an operator starts one. Returns its number.
fn start(vmm: &MockVmm, arguments: &DestinationArgs) -> Result<u64, Error> {
    // Printed on standard error, because with --json standard output has only one object.
    if let Some(listen) = &arguments.listen {
        let (job, address) = vmm.start_incoming(
            listen,
            &IncomingOptions { resume: arguments.resume, ..IncomingOptions::default() },
        )?;
        eprintln!("listening at {address}");
        return Ok(job);
    }
    if let Some(image) = &arguments.restore_from {
        let mode = if arguments.lazy { RestoreMode::Lazy } else { RestoreMode::Eager };
        let options =
            RestoreOptions { mode, resume: arguments.resume, ..RestoreOptions::default() };
        let options = match &arguments.working_set {
            Some(file) => options.with_working_set(file).map_err(pageferry_client::Error::from)?,
            None => options,
        };
        return vmm.start_restore(image, &options);
    }
    // Jobs that the agent did for an earlier VMM do not count.
    let before = vmm.client().status()?.job;
    vmm.take_guests();
    eprintln!("waiting for a guest");
    wait_for("a guest", arguments.wait_for, || match vmm.client().status() {
        // An operator who stops to listen has brought no guest, and may listen again.
        Ok(status) if status.job > before && brings_a_guest(&status) => Some(Ok(status.job)),
        Ok(_) => None,
        Err(error) => Some(Err(error.into())),
    })?
}
