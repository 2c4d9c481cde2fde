//! `mock_vmm destination`.

use super::cli::DestinationArgs;
use super::report::{Report, watch};
use crate::Error;
use crate::guest::threads::{ThreadGuest, ThreadGuestOptions};
use crate::usage::Usage;
use crate::vmm::{MockVmm, Tracker};
use pageferry_client::{IncomingOptions, Phase};

/// Hands over the memory and waits for a guest. What the source's guest wrote is compared with what came: before the commit, or in postcopy when all is here.
///
/// # Errors
/// If it does not get as far as a job, or the agent is lost. A job that fails is no error but a report.
pub fn run(arguments: &DestinationArgs) -> Result<Report, Error> {
    let memory = super::memory(&arguments.common)?;
    let usage = Usage::new(memory)?;
    // It takes over the ledger and stands still.
    let guest = ThreadGuest::new(&usage, ThreadGuestOptions { rate: Some(0), ..ThreadGuestOptions::default() })?;
    let vmm = MockVmm::connect(&arguments.common.socket, usage, Tracker::Log)?;
    vmm.set_guest(guest);
    let (job, address) = vmm.start_incoming(&arguments.listen, &IncomingOptions::default())?;
    // On standard error: with --json, standard output has one object only.
    eprintln!("listening at {address}");
    let status = watch(&vmm, job, !arguments.common.json, |_| Ok(()))?;
    let mut record = vmm.record();
    if status.phase == Phase::Completed && record.memory_complete {
        // It ran before its memory was here, so what came could not be compared sooner.
        record.words_checked = vmm.usage().check()?;
        record.allocated_at_load = Some(vmm.memory().allocated()?);
    }
    if status.phase == Phase::Completed && !record.runs {
        return Err(Error::Mismatch("the migration completed, but the guest was not resumed".into()));
    }
    log::info!("{} words of the guest's ledger were compared", record.words_checked);
    Ok(Report { destination_allocated: record.allocated_at_load, ..Report::new(&status) })
}
