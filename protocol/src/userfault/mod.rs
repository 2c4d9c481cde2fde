// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel's userfaultfd, in one place for both sides: the client opens one and registers
//! mappings, and the agent places pages.
//!
//! A descriptor belongs to the address space that opened it, whichever process holds it. So the
//! agent places pages in the mappings of the VMM through the descriptor that the VMM opened.
//! Placing fills missing pages and never changes a page that exists.
//!
//! Numbers and layouts: `linux/userfaultfd.h`; semantics:
//! `Documentation/admin-guide/mm/userfaultfd.rst`, and `ioctl_userfaultfd(2)`.

// The numbers and layouts of the kernel.
mod abi;
// Registering, placing, protecting, and reading faults.
mod descriptor;
// Opening one, and the handshake.
mod open;
// Giving back pages of private mappings.
mod private;
// The means to open them, kept from the start of the process.
mod source;

pub use abi::{AddressRange, feature};
pub use descriptor::{Events, FillError, MAX_FAULTS, Poisoned, RegisterMode, Userfaultfd};
pub use open::UserfaultError;
pub use source::UserfaultSource;
