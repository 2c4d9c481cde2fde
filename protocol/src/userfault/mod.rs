//! The kernel's userfaultfd: all numbers and layouts of it in one place, for the client, which
//! opens and registers, and the agent, which answers.
//!
//! A descriptor belongs to the address space that opened it, whoever holds it: so the agent places
//! pages in the VMM's mapping by the descriptor that the VMM made. Placing fills what is missing
//! and never changes a page that is there.
//!
//! Numbers and layouts: `linux/userfaultfd.h`; semantics:
//! `Documentation/admin-guide/mm/userfaultfd.rst`, and `ioctl_userfaultfd(2)`.
//!
//! - `abi`: the numbers and layouts of the kernel;
//! - `open`: opening one, and the handshake;
//! - `descriptor`: registering, placing, protecting, and reading faults.

mod abi;
mod descriptor;
mod open;

pub use abi::{AddressRange, feature};
pub use descriptor::{FillError, MAX_FAULTS, Poisoned, RegisterMode, Userfaultfd};
pub use open::UserfaultError;
