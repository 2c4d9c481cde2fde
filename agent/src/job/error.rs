//! Why a job failed.

use crate::hooks::HookError;
use crate::image::ImageError;
use crate::incoming::decompress::DecompressError;
use crate::memory::missing_pages::PlaceError;
use crate::memory::pool::ReserveError;
use crate::memory::{BackingError, GuestMemory, pool};
use crate::restore::RestoreError;
use crate::tracking::TrackingError;
use crate::transport::TransportError;
use pageferry_protocol::control::codec::DecodeError;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use pageferry_protocol::shm::MappingError;
use pageferry_protocol::shm::fence::Replaced;
use pageferry_protocol::stream::hello::HelloError;
use pageferry_protocol::stream::table::TableMismatch;
use rustix::io::Errno;
use std::time::Duration;

/// Why a job failed.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The VMM or an operator cancelled it, or the VMM is gone.
    #[error("the VMM or an operator asked for it, or the VMM is gone")]
    Cancelled,
    /// The VMM has another agent, or none.
    #[error(transparent)]
    Replaced(#[from] Replaced),
    /// The VMM's connection ended before the guest, or its image, was handed over.
    #[error(
        "the connection to the VMM ended: nothing is handed over that it may not want any more"
    )]
    VmmGone,
    /// The commit was sent and never confirmed (`one-owner`).
    #[error(
        "ownership of the guest was handed over, but the destination did not confirm that it runs: the guest stands still \
         here; look at both sides before you resume it by force"
    )]
    Unconfirmed {
        /// What happened.
        #[source]
        source: Box<JobError>,
    },
    /// The guest was handed over in postcopy, and its memory was not all sent.
    #[error(
        "the guest was handed over, and not all of its memory was sent: if it runs at the destination, it waits there for what is \
         missing; look at both sides before you resume it here by force"
    )]
    Stranded {
        /// What happened last.
        #[source]
        source: Box<JobError>,
    },
    /// A paused postcopy is not to be recovered.
    #[error("it was given up: the agent ends, or the guest is resumed by force")]
    Abandoned,
    /// The destination does not know postcopy.
    #[error("mode is {0}, which the destination does not know: migrate with precopy")]
    Mode(&'static str),
    /// The destination has host pages too large for postcopy.
    #[error("block {id}: the host page size is {size:#x}, postcopy takes at most {limit:#x}")]
    HostPage {
        /// The block.
        id: u32,
        /// Size of a host page in bytes.
        size: u64,
        /// The largest that can be placed at once.
        limit: u64,
    },
    /// Host pages are too large for a background snapshot.
    #[error(
        "block {id}: the host page size is {size:#x}, a background snapshot takes at most {limit:#x}: use mode paused"
    )]
    LargeHostPage {
        /// The block.
        id: u32,
        /// Size of a host page in bytes.
        size: u64,
        /// The largest that can be captured at once.
        limit: u64,
    },
    /// The thread that answers write faults failed.
    #[error("writes into protected memory are not answered as they should be; the log says why")]
    Faults,
    /// The guest waited to write, since the image's disk takes nothing.
    #[error(
        "nothing was written to the image for {:?}, while the guest waited to write: hook_timeout allows no more, and the guest runs on without the snapshot",
        limit
    )]
    SlowImage {
        /// How long the guest waited, and may wait.
        limit: Duration,
    },
    /// The memory is of a kind that the kernel cannot protect.
    #[error(
        "block {id} is a file on a disk, which cannot be protected against writes: a background snapshot takes memfds, tmpfs and hugetlbfs; use mode paused"
    )]
    OnDisk {
        /// The block.
        id: u32,
    },
    /// The destination's memory is of a kind whose missing pages the kernel does not tell.
    #[error(
        "block {id} is a file on a disk at the destination, which userfaultfd cannot register: postcopy and hybrid take memfds, tmpfs and hugetlbfs; migrate with precopy"
    )]
    DiskPostcopy {
        /// The block.
        id: u32,
    },
    /// Nothing can be written to the file.
    #[error(
        "block {id} is sealed against writing (F_SEAL_WRITE or F_SEAL_FUTURE_WRITE): no guest can come into it"
    )]
    Sealed {
        /// The block.
        id: u32,
    },
    /// There are not enough huge pages for the guest.
    #[error(transparent)]
    HugePages(#[from] ReserveError),
    /// A page could not be placed for want of memory.
    #[error("{advice}")]
    NoMemory {
        /// What an operator can do.
        advice: String,
        /// What could not be done.
        #[source]
        source: PlaceError,
    },
    /// A block is mapped nowhere at the destination.
    #[error("block {id} has no vmm_address at the destination, which postcopy needs")]
    NotMapped {
        /// The block.
        id: u32,
    },
    /// The destination wants pages that it was never missing, or has already.
    #[error(
        "recovery: the destination lacks {pages:#x} pages from page {first:#x} of block {id}, which it has or was never missing"
    )]
    NotOwed {
        /// The block.
        id: u32,
        /// The first of them.
        first: u64,
        /// How many in the word where they begin.
        pages: u64,
    },
    /// The destination's memory is of other pages than it was.
    #[error(
        "recovery: host pages of block {id} are {size:#x} bytes at the destination, and were {expected:#x} before"
    )]
    OtherHostPage {
        /// The block.
        id: u32,
        /// Bytes, as it says now.
        size: u64,
        /// Bytes, as it said first.
        expected: u64,
    },
    /// The destination says that it has a page that was not sent.
    #[error("the destination says that it has page {first:#x} of block {id}, which was not sent")]
    NotSent {
        /// The block.
        id: u32,
        /// The page.
        first: u64,
    },
    /// The destination's bitmaps do not cover the blocks.
    #[error(
        "recovery: bitmap of block {id} from page {found:#x}, expected is block {expected_id} from page {expected:#x}"
    )]
    Bitmaps {
        /// Block of the record.
        id: u32,
        /// First page of the record.
        found: u64,
        /// The block that was expected.
        expected_id: u32,
        /// The page that was expected.
        expected: u64,
    },
    /// A host page came in pieces that do not belong together.
    #[error(
        "record for pages {first:#x} + {count:#x} of block {id} before host page {open:#x} was whole"
    )]
    Torn {
        /// The block.
        id: u32,
        /// First page.
        first: u64,
        /// Page count.
        count: u64,
        /// The host page that was open.
        open: u64,
    },
    /// A page that came in postcopy could not be placed.
    #[error(transparent)]
    MissingPages(#[from] PlaceError),
    /// The peer said why.
    #[error("the peer failed: {0}")]
    Peer(RemoteError),
    /// The peer refused the stream.
    #[error("the peer refused the migration: {0}")]
    Rejected(RemoteError),
    /// The connection, or what came over it.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The first record of a stream.
    #[error("hello")]
    Hello(#[from] HelloError),
    /// The source's blocks are not those of this VMM.
    #[error(transparent)]
    Table(#[from] TableMismatch),
    /// A record's payload.
    #[error("{kind} record")]
    Payload {
        /// Kind of the record.
        kind: &'static str,
        /// What is wrong.
        #[source]
        source: DecodeError,
    },
    /// A record that has no place here.
    #[error("{found} record where {expected} was expected")]
    Unexpected {
        /// What came.
        found: String,
        /// What should have.
        expected: &'static str,
    },
    /// A record about a block that does not exist.
    #[error("record for block {id}, which does not exist")]
    NoBlock {
        /// The block.
        id: u32,
    },
    /// A record about pages outside of its block.
    #[error("record for pages {first:#x} + {count:#x} of block {id}, which has {pages:#x}")]
    Outside {
        /// The block.
        id: u32,
        /// First page.
        first: u64,
        /// Page count.
        count: u64,
        /// Pages in the block.
        pages: u64,
    },
    /// A barrier for another pass than the one that runs.
    #[error("stream {stream} ended pass {found}, expected is pass {expected}")]
    Pass {
        /// The stream.
        stream: u16,
        /// Pass in the record.
        found: u64,
        /// Pass that runs.
        expected: u64,
    },
    /// The totals of both sides differ.
    #[error("totals differ: {field} is {theirs} at the source and {own} here")]
    Totals {
        /// The field.
        field: &'static str,
        /// The source's.
        theirs: u64,
        /// This side's.
        own: u64,
    },
    /// The destination does not know the compression that is wanted.
    #[error(
        "compression is {0}, which the destination does not take: migrate with one that it takes, or with none"
    )]
    Compression(&'static str),
    /// A record whose pages are compressed.
    #[error("data record for pages {first:#x} + {count:#x} of block {id}")]
    Compressed {
        /// The block.
        id: u32,
        /// First page.
        first: u64,
        /// Page count.
        count: u64,
        /// What is wrong.
        #[source]
        source: DecompressError,
    },
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The protection of a background snapshot is gone, or cannot be had.
    #[error(
        "block {id}: memory cannot be protected, or is not any more: the VMM may have taken the registration back"
    )]
    Protection {
        /// The block.
        id: u32,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// Nobody knows what changed since the base of an increment.
    #[error("{0}: save all of it, with track on if increments are to follow")]
    NoIncrement(String),
    /// A file under a block.
    #[error("block {id}")]
    Backing {
        /// The block.
        id: u32,
        /// What is wrong.
        #[source]
        source: BackingError,
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
    /// A hook.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// A tracker.
    #[error("dirty tracking")]
    Tracking(#[from] TrackingError),
    /// Memory for a bitmap, or a buffer.
    #[error("memory for a bitmap or a buffer")]
    Bitmap(#[from] MappingError),
    /// The passes did not converge, and the policy is to fail.
    #[error(
        "not converging: after {passes} passes {remaining} pages remain, which would stop the guest for {expected:?}, \
         the limit is {limit:?}"
    )]
    NotConverging {
        /// Passes that ended.
        passes: u64,
        /// Dirty pages.
        remaining: u64,
        /// How long the guest would stand still.
        expected: Duration,
        /// How long it may.
        limit: Duration,
    },
    /// An image cannot be restored into this VMM's memory.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// What the source connected to ended the connection in place of an answer.
    #[error(
        "what listens at the target ended the connection without an answer to the hello: it is no \
         destination that waits for a guest (a control socket is none)"
    )]
    NoDestination {
        /// How it ended.
        #[source]
        source: TransportError,
    },
    /// The hand-over of the paused guest took too long.
    #[error(
        "the hand-over was not done within {limit:.1?}, which is as long as the guest may be paused for it \
         (peer_timeout, two hook_timeout, and ten times what the transfer should take at the measured bandwidth, \
         or what it takes at 1 MiB/s where none was measured): it runs on here"
    )]
    StopTooLong {
        /// How long it may be paused.
        limit: Duration,
        /// What was under way.
        #[source]
        source: Box<JobError>,
    },
    /// The VMM's state.
    #[error("state of the VMM: {0}")]
    State(String),
    /// The kernel refused something else.
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
}

impl JobError {
    /// Makes an error of a failed system call.
    pub fn from_io(what: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    /// A page of the block at index `at` could not be placed. If that is for want of memory, an
    /// operator reads what to do.
    pub fn not_placed(memory: &GuestMemory, at: usize, error: PlaceError) -> Self {
        if crate::missing_faults::lacks_memory(&error) {
            Self::NoMemory { advice: pool::advice(&memory.blocks()[at]), source: error }
        } else {
            Self::MissingPages(error)
        }
    }

    /// How the peer is told. It learns nothing of this side's blocks that it does not know.
    pub fn to_remote(&self) -> RemoteError {
        let code = match self {
            Self::Cancelled | Self::Replaced(_) | Self::VmmGone => ErrorCode::State,
            Self::Compression(_)
            | Self::Mode(_)
            | Self::HostPage { .. }
            | Self::DiskPostcopy { .. }
            | Self::NotMapped { .. }
            | Self::Sealed { .. } => ErrorCode::Unsupported,
            Self::HugePages(_)
            | Self::NoMemory { .. }
            | Self::Backing { .. }
            | Self::Io { .. }
            | Self::Bitmap(_)
            | Self::MissingPages(_) => ErrorCode::System,
            Self::Hook(_)
            | Self::NotResumed { .. }
            | Self::Tracking(_)
            | Self::NotConverging { .. }
            | Self::Panicked => ErrorCode::Other,
            _ => ErrorCode::Invalid,
        };
        let sentence = match self {
            Self::Table(mismatch) => mismatch.for_source(),
            error => crate::error::chain(error),
        };
        RemoteError::new(code, sentence)
    }
}
