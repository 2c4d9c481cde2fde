// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The job of a session, by its kind.

use crate::incoming::job::IncomingJob;
use crate::job::{Job, Recovery};
use crate::outgoing::job::OutgoingJob;
use std::ops::Deref;
use std::sync::Arc;

/// The job of a session. Dereferences to what all jobs have.
#[derive(Debug, Clone)]
pub(super) enum SessionJob {
    /// An outgoing migration.
    Outgoing(Arc<OutgoingJob>),
    /// An incoming migration.
    Incoming(Arc<IncomingJob>),
    /// A snapshot, which only its thread knows more about.
    Snapshot(Arc<Job>),
    /// A restore, which only its thread knows more about.
    Restore(Arc<Job>),
}

impl Deref for SessionJob {
    type Target = Job;

    fn deref(&self) -> &Job {
        self.common()
    }
}

impl SessionJob {
    /// The part that all jobs have.
    pub(super) fn common(&self) -> &Arc<Job> {
        match self {
            Self::Outgoing(job) => job.common(),
            Self::Incoming(job) => job.common(),
            Self::Snapshot(job) | Self::Restore(job) => job,
        }
    }

    /// The outgoing migration, if it is one.
    pub(super) fn outgoing(&self) -> Option<&Arc<OutgoingJob>> {
        match self {
            Self::Outgoing(job) => Some(job),
            _ => None,
        }
    }

    /// Passes requests to recover the job, if it is a migration.
    pub(super) fn recovery(&self) -> Option<&Recovery> {
        match self {
            Self::Outgoing(job) => Some(&job.recovery),
            Self::Incoming(job) => Some(&job.recovery),
            Self::Snapshot(_) | Self::Restore(_) => None,
        }
    }

    /// True if `other` is the same job.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.common(), other.common())
    }
}
