//! The guest's memory as the agent holds it.
//!
//! - [`backing`]: the file under a block: checked once, then only read, written and punched by
//!   offset, never read or written by a mapping;
//! - [`current`]: whether this agent still acts for its VMM;
//! - [`extents`]: walking over what may be allocated in it;
//! - [`block`]: a block with its bitmaps;
//! - [`fence`]: keeps discards away from what a worker is reading (`never-read` and
//!   `clear-then-read`);
//! - [`discard`]: discarding and populating (`never-read`, `discard-cannot-fail` and
//!   `round-safely`);
//! - [`freed`]: the other kind of discard: memory that the guest frees, and uses again without a
//!   word;
//! - [`recorded_discards`]: what the VMM gave back while a job fills the memory;
//! - [`marking`]: what comes first, the marks of a discard or the instant of a snapshot;
//! - [`host_page_set`]: what a guest in postcopy is missing, in host pages;
//! - [`mappings`]: where the VMM has it mapped;
//! - [`copy_before_write`]: a guest's memory as it was at one instant, while it is saved and the
//!   guest runs on: writes and discards meanwhile;
//! - [`cursor`]: which of it comes next: near the last fault, in small pieces; far from it, in
//!   large ones;
//! - [`capture_steps`]: how all who capture a page, write to it or free it agree;
//! - [`fault_steps`]: how a fault and whoever takes its page agree on who answers;
//! - [`missing_pages`]: the memory of a guest that runs before it is here: faults, placing, and
//!   discards meanwhile;
//! - [`pool`]: huge pages for a guest that runs before its memory is here;
//! - [`runs`]: runs of pages that lie near each other, made one;
//! - [`zero`]: finding zero pages;
//! - [`huge`]: writing to hugetlbfs, which only a mapping can;
//! - [`small_pages`]: placing on a tmpfs that would allocate huge pages for it;
//! - [`bus_guard`]: survives a file that shrinks under a mapping (`vmm-survives`).

pub mod backing;
pub mod block;
pub mod bus_guard;
pub mod capture_steps;
pub mod copy_before_write;
pub mod current;
pub mod cursor;
pub mod discard;
pub mod extents;
pub mod fault_steps;
pub mod fence;
pub mod freed;
pub mod host_page_set;
pub mod huge;
pub mod mappings;
pub mod marking;
pub mod missing_pages;
pub mod pool;
pub mod recorded_discards;
pub mod runs;
pub mod small_pages;
#[cfg(test)]
pub(crate) mod test_support;
pub mod zero;

pub use backing::{Backing, BackingError};
pub use block::{Block, GuestMemory};

// `fence.rs`, `claims.rs` and those that build on them take these from their parent, so that the
// model checker can put its own in their place.
use pageferry_protocol::shm::bitmap;
mod sync {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering, fence};
    pub(super) use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
    pub(super) use std::thread::yield_now;
}
