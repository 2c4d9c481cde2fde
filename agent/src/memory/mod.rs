// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's memory, as the agent sees it.
//!
//! Blocks and what they are made of:
//!
//! - [`backing`]: the memory file of a block. It is checked once, and then read, written and
//!   punched by offset, never through a mapping;
//! - [`clone_view`]: the memory of a clone, which is a private mapping of a base;
//! - [`extents`]: finds the pages of a file that may be allocated;
//! - [`block`]: a block with its bitmaps;
//! - [`guest_memory`]: all blocks of a guest, and who is told of their discards;
//! - [`mappings`]: the addresses at which the VMM has mapped the blocks;
//! - [`host_page_set`]: sets of host pages from which threads take pages;
//! - [`chunks`]: how several threads share a walk over all blocks;
//! - [`current`]: whether this agent is still the current one of its VMM.
//!
//! Discards and their order with readers:
//!
//! - [`fence`]: keeps discards away from pages that a worker is reading
//!   ([`never-read`](crate::invariants#never-read) and
//!   [`clear-then-read`](crate::invariants#clear-then-read));
//! - [`discard`]: discard and populate ([`never-read`](crate::invariants#never-read),
//!   [`discard-cannot-fail`](crate::invariants#discard-cannot-fail) and
//!   [`round-safely`](crate::invariants#round-safely));
//! - [`freed`]: memory that the guest frees and uses again without notice;
//! - [`recorded_discards`]: what the VMM has discarded and freed while a job fills the memory;
//! - [`discard_recorder`]: starts and ends that record;
//! - [`device_writes`]: writes of this agent's own devices;
//! - [`marking`]: orders the marks of discards against the instant of a snapshot.
//!
//! Snapshots, postcopy and lazy restore:
//!
//! - [`copy_before_write`]: saves the guest's memory as it was at one instant, while the guest
//!   runs;
//! - [`capture_ordering`]: the steps by which captures, writes and discards of a page agree;
//! - [`write_protection`]: the protection that reports the guest's writes;
//! - [`captured_pages`]: pages that were captured before a write, until they are in the image;
//! - [`sweep_order`]: which piece of the memory the workers of a snapshot save next;
//! - [`capture_batch`]: the buffer for pages that are put into the image at once;
//! - [`missing_pages`]: the memory of a guest that runs before all of it has arrived;
//! - [`fetch`]: missing pages that a device of this agent needs;
//! - [`page_placer`]: places pages through a userfaultfd;
//! - [`base_placer`]: puts pages into the base that all clones of an image share;
//! - [`fault_ordering`]: the steps by which a fault and an arrival or discard agree on who answers;
//! - [`cursor`]: which pages the workers take next: small pieces after the last fault, larger ones
//!   while there is no fault;
//! - [`pool`]: reserves huge pages before the guest runs;
//! - [`sync`]: the atomics, locks and bitmaps that the model checker replaces.
//!
//! Reading and writing pages:
//!
//! - [`page_buffer`]: an aligned buffer for pages;
//! - [`runs`]: joins runs of pages that lie near each other;
//! - [`zero`]: finds zero pages;
//! - [`huge`]: writes to hugetlbfs, which needs a mapping;
//! - [`placement`]: how pages come into a file; [`file_placer`]: through a mapping, of which
//!   [`mapped_areas`] knows what is mapped; [`large_pages`]: pages of 2 MiB; [`small_pages`]:
//!   single pages on a tmpfs that hands out huge ones; [`unsettled`]: large pages that may not
//!   fill; [`placing_report`]: what the status says about it;
//! - [`huge_page_supply`]: whether the kernel is asked for large pages, which depends on
//!   [`spare_memory`]: the memory that is left;
//! - [`bus_guard`]: survives a file that shrinks under a mapping
//!   ([`vmm-survives`](crate::invariants#vmm-survives));
//! - [`error`]: what can go wrong with the memory.

pub mod backing;
pub mod base_placer;
pub mod block;
pub mod bus_guard;
pub mod capture_batch;
pub mod capture_ordering;
pub mod captured_pages;
pub mod chunks;
pub mod clone_view;
pub mod copy_before_write;
pub mod current;
pub mod cursor;
pub mod device_writes;
pub mod discard;
pub mod discard_recorder;
pub mod error;
pub mod extents;
pub mod fault_ordering;
pub mod fence;
pub mod fetch;
pub mod file_placer;
pub mod freed;
pub mod guest_memory;
pub mod host_page_set;
pub mod huge;
pub mod huge_page_supply;
pub mod large_pages;
pub mod mapped_areas;
pub mod mappings;
pub mod marking;
pub mod missing_pages;
pub mod owed;
pub mod page_buffer;
pub mod page_placer;
pub mod placement;
pub mod placing_report;
pub mod pool;
pub mod recorded_discards;
pub mod runs;
pub mod small_pages;
pub mod spare_memory;
pub mod sweep_order;
pub mod sync;
#[cfg(test)]
pub(crate) mod test_support;
pub mod unsettled;
pub mod write_protection;
pub mod zero;

pub use backing::{Backing, BackingError};
pub use block::Block;
pub use error::MemoryError;
pub use guest_memory::GuestMemory;
pub use page_buffer::PageBuffer;
