// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The job of an incoming migration, as the session and the job's threads see it.

use crate::job::{Job, Recovery};
use pageferry_protocol::control::job::IncomingOptions;
use std::ops::Deref;
use std::sync::Arc;

/// The job of an incoming migration. Dereferences to what all jobs have.
#[derive(Debug)]
pub struct IncomingJob {
    job: Arc<Job>,
    /// The options, which cannot be changed while the migration runs.
    pub options: IncomingOptions,
    /// Passes requests to recover a paused postcopy.
    pub recovery: Recovery,
}

impl Deref for IncomingJob {
    type Target = Job;

    fn deref(&self) -> &Job {
        &self.job
    }
}

impl IncomingJob {
    /// The job of a migration that arrives here.
    ///
    /// # Errors
    /// If the kernel refuses an event descriptor.
    pub fn new(job: Arc<Job>, options: IncomingOptions) -> std::io::Result<Self> {
        Ok(Self { job, options, recovery: Recovery::new()? })
    }

    /// The part that all jobs have.
    pub fn common(&self) -> &Arc<Job> {
        &self.job
    }
}
