// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the last job has ended, handed to the next program in a file without a name.
//!
//! An operator may have to know that after an upgrade, for example whether a guest has arrived here
//! before he resumes it elsewhere.

use crate::inherited;
use pageferry_protocol::control::codec::{Decoder, Encoder};
use pageferry_protocol::control::job::JobStatus;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, pread, write};
use std::io;
use std::os::fd::OwnedFd;

/// The variable by which the next program finds the file.
pub(super) const VARIABLE: &str = "PAGEFERRY_LAST_JOB";
/// More than any status has.
const LONGEST: usize = 64 << 10;

/// How the last job has ended.
#[derive(Debug)]
pub struct LastJob(OwnedFd);

impl LastJob {
    /// Keeps this status. `None`, and says so, if the kernel refuses.
    pub fn new(status: &JobStatus) -> Option<Self> {
        let kept = memfd_create("pageferry-last-job", MemfdFlags::CLOEXEC).and_then(|file| {
            let bytes = status.encode(Encoder::new()).finish();
            if write(&file, &bytes)? == bytes.len() { Ok(Self(file)) } else { Err(Errno::NOSPC) }
        });
        kept.inspect_err(|errno| log::warn!("the last job is not remembered: {errno}")).ok()
    }

    /// What the program before has kept, if it has.
    pub fn handed_over() -> Option<Self> {
        inherited::handed_over(VARIABLE).ok().flatten().map(Self)
    }

    /// Lets the next program have it. Returns the variable for it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn inherit(&self) -> io::Result<(&'static str, String)> {
        Ok((VARIABLE, inherited::hand_over(&self.0)?))
    }

    /// The status. `None` if another version has written it, in a way that is not known here.
    pub fn read(self) -> Option<JobStatus> {
        let mut bytes = vec![0; LONGEST];
        let count = pread(&self.0, &mut bytes, 0).ok()?;
        let mut decoder = Decoder::new(&bytes[..count]);
        let status = JobStatus::decode(&mut decoder).ok()?;
        decoder.finish().ok().map(|()| status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::control::job::{JobKind, Phase};

    #[test]
    fn the_status_survives_and_anything_else_is_none() {
        let (job, kind, phase) = (7, JobKind::Incoming, Phase::Completed);
        let status = JobStatus { job, kind, phase, arrived: true, ..JobStatus::default() };
        assert_eq!(LastJob::new(&status).unwrap().read(), Some(status));
        let empty = LastJob(memfd_create("x", MemfdFlags::CLOEXEC).unwrap());
        assert_eq!(empty.read(), None);
    }
}
