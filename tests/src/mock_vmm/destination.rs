// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `mock_vmm destination`.

use super::cli::DestinationArgs;
use super::report::{Report, watch};
use crate::Error;
use crate::deadline::wait_for;
use crate::guest::threads::{ThreadGuest, ThreadGuestOptions};
use crate::usage::Usage;
use crate::vmm::{MockVmm, Tracker};
use pageferry_client::{IncomingOptions, Phase, RestoreMode, RestoreOptions, RunState};
use pageferry_protocol::control::job::JobKind;

/// Hands over the memory and waits for a guest, or restores one. What the source's guest wrote is
/// compared with what came: before the commit, or in postcopy when all is here.
///
/// # Errors
/// If it does not get as far as a job, or the agent is lost. A job that fails is no error but a
/// report.
pub fn run(arguments: &DestinationArgs) -> Result<Report, Error> {
    let memory = super::memory(&arguments.common)?;
    let usage = Usage::new(memory)?;
    // It takes over the ledger and writes nothing.
    let guest = ThreadGuest::new(
        &usage,
        ThreadGuestOptions { rate: Some(0), ..ThreadGuestOptions::default() },
    )?;
    let vmm = MockVmm::connect(&arguments.common.socket, usage, Tracker::Log)?;
    vmm.set_guest(guest);
    let job = start(&vmm, arguments)?;
    let status = watch(&vmm, job, !arguments.common.json, |_| Ok(()))?;
    let mut record = vmm.record();
    if status.phase == Phase::Completed && record.memory_complete {
        // It ran before its memory was here, so what came could not be compared sooner.
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

/// Starts what is asked for, or waits until an operator does; returns the number of the job.
fn start(vmm: &MockVmm, arguments: &DestinationArgs) -> Result<u64, Error> {
    // On standard error: with --json, standard output has one object only.
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
    // What the agent did for a VMM before this one.
    let before = vmm.client().status()?.job;
    vmm.take_restores();
    eprintln!("waiting for a restore");
    wait_for("a restore", arguments.wait_for, || match vmm.client().status() {
        Ok(status) if status.kind == JobKind::Restore && status.job > before => {
            Some(Ok(status.job))
        }
        Ok(_) => None,
        Err(error) => Some(Err(error.into())),
    })?
}
