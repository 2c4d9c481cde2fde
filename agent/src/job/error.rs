// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a job ends if it does not complete.
//!
//! The first variants say why the job ended and what became of the guest. The others carry the
//! error of the room where the job failed, unchanged.

use crate::cancel::CancelError;
use crate::hooks::HookError;
use crate::image::ImageError;
use crate::incoming::IncomingError;
use crate::memory::MemoryError;
use crate::memory::copy_before_write::CaptureError;
use crate::memory::page_placer::PlaceError;
use crate::memory::pool::ReserveError;
use crate::outgoing::OutgoingError;
use crate::restore::RestoreError;
use crate::snapshot::SnapshotError;
use crate::tracking::TrackingError;
use crate::transport::{StreamError, TransportError};
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use pageferry_protocol::shm::MappingError;
use pageferry_protocol::shm::fence::Replaced;
use pageferry_protocol::stream::hello::HelloError;
use pageferry_protocol::stream::table::TableMismatch;
use std::time::Duration;

/// How a job ends if it does not complete.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The job was cancelled. The status of the job says [by whom](crate::cancel::CancelledBy).
    #[error("the job was cancelled")]
    Cancelled,
    /// The VMM's connection ended before the guest, or its image, was handed over.
    #[error(
        "the VMM is gone, so the job stopped before it handed over the guest or named the image"
    )]
    VmmGone,
    /// The VMM has another agent now, or none.
    #[error(transparent)]
    Replaced(#[from] Replaced),
    /// The commit was sent and never confirmed ([`one-owner`](crate::invariants#one-owner)).
    #[error(
        "ownership of the guest was handed over, and the destination did not confirm that the guest runs there: the guest \
         is paused here; look at both sides before you resume it by force"
    )]
    Unconfirmed {
        /// What happened.
        #[source]
        source: Box<JobError>,
    },
    /// The guest was handed over in postcopy, and its memory was not all sent.
    #[error(
        "the guest was handed over, and not all of its memory was sent: if the guest runs at the destination, it waits there for \
         the missing memory; look at both sides before you resume it here by force"
    )]
    Stranded {
        /// What happened last.
        #[source]
        source: Box<JobError>,
    },
    /// Nobody will recover a paused postcopy.
    #[error("the job was given up: the agent ends, or the guest is resumed by force")]
    Abandoned,
    /// The hand-over of the paused guest took too long.
    #[error(
        "the hand-over took longer than {limit:.1?}, which is the limit that follows from peer_timeout, hook_timeout \
         and the measured bandwidth: the guest continues here"
    )]
    StopTooLong {
        /// How long it may be paused.
        limit: Duration,
        /// What was under way.
        #[source]
        source: Box<JobError>,
    },
    /// The guest is in the VMM, by a commit or a restore, and the VMM did not resume it, or not in
    /// time.
    #[error(
        "the guest is here, and belongs to the VMM, which can resume it at any time; resuming it failed"
    )]
    NotResumed {
        /// What the VMM said.
        #[source]
        source: HookError,
    },
    /// The peer said why.
    #[error("the peer failed: {0}")]
    Peer(RemoteError),
    /// The VMM's state is not what its pieces say, or does not fit.
    #[error("state of the VMM: {0}")]
    State(String),
    /// The peer says something that does not fit what it said before, or what this side does.
    #[error("{0}")]
    Protocol(String),
    /// The job cannot continue from where it is.
    #[error("{0}")]
    Stuck(String),
    /// Another stream of the job failed first. That one reports the reason.
    #[error("another stream failed")]
    OtherStreamFailed,
    /// The kernel refused something.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A thread of the job panicked: a defect of this program.
    #[error("a worker of the job panicked")]
    Panicked,
    /// The guest's memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The connection.
    #[error(transparent)]
    Transport(TransportError),
    /// What came over the connection.
    #[error(transparent)]
    Stream(StreamError),
    /// A source does not migrate its guest.
    #[error(transparent)]
    Outgoing(#[from] OutgoingError),
    /// A destination refuses what comes.
    #[error(transparent)]
    Incoming(#[from] IncomingError),
    /// A snapshot is not made.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A page is not copied before a write.
    #[error(transparent)]
    Capture(CaptureError),
    /// An image cannot be restored into this VMM's memory.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A hook.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// A tracker.
    #[error("dirty tracking")]
    Tracking(#[from] TrackingError),
}

impl From<CancelError> for JobError {
    fn from(error: CancelError) -> Self {
        match error {
            CancelError::Cancelled => Self::Cancelled,
            CancelError::Kernel { what, source } => Self::Io { what, source },
        }
    }
}

impl From<TransportError> for JobError {
    fn from(error: TransportError) -> Self {
        match error {
            TransportError::Cancel(error) => error.into(),
            error => Self::Transport(error),
        }
    }
}

impl From<StreamError> for JobError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Peer(error) => Self::Peer(error),
            error => Self::Stream(error),
        }
    }
}

impl From<CaptureError> for JobError {
    fn from(error: CaptureError) -> Self {
        match error {
            CaptureError::Memory(error) => error.into(),
            // If the snapshot failed, another thread of the job reports the reason.
            CaptureError::GivenUp => Self::Cancelled,
            // A cancel does not hide a panic, see [`Job::finish`](super::Job::finish).
            CaptureError::Panicked => Self::Panicked,
            error => Self::Capture(error),
        }
    }
}

impl From<MappingError> for JobError {
    fn from(error: MappingError) -> Self {
        MemoryError::from(error).into()
    }
}

impl From<PlaceError> for JobError {
    fn from(error: PlaceError) -> Self {
        MemoryError::from(error).into()
    }
}

impl From<ReserveError> for JobError {
    fn from(error: ReserveError) -> Self {
        MemoryError::from(error).into()
    }
}

impl From<HelloError> for JobError {
    fn from(error: HelloError) -> Self {
        StreamError::from(error).into()
    }
}

impl From<TableMismatch> for JobError {
    fn from(error: TableMismatch) -> Self {
        IncomingError::from(error).into()
    }
}

impl JobError {
    /// Makes an error of a failed system call.
    pub fn from_io(what: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    /// What the peer is told. The message contains no value of this side's block table.
    pub fn to_remote(&self) -> RemoteError {
        let code = match self {
            Self::Cancelled | Self::Replaced(_) | Self::VmmGone => ErrorCode::State,
            Self::Outgoing(error) => error.code(),
            Self::Incoming(error) => error.code(),
            Self::Memory(MemoryError::Sealed { .. }) => ErrorCode::Unsupported,
            Self::Memory(_) | Self::Io { .. } => ErrorCode::System,
            Self::Hook(_) | Self::NotResumed { .. } | Self::Tracking(_) | Self::Panicked => {
                ErrorCode::Other
            }
            _ => ErrorCode::Invalid,
        };
        let sentence = match self {
            Self::Incoming(IncomingError::Table(mismatch)) => mismatch.for_source(),
            error => crate::error::chain(error),
        };
        RemoteError::new(code, sentence)
    }
}
