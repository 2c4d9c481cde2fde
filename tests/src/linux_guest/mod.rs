// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Linux guests under unmodified QEMUs.
//!
//! `tests/guests/install` gets the QEMUs, a kernel, and a guest whose one program uses memory, a
//! disk and a network, and verifies all that it does (`tests/guests/workload.rs`).
//!
//! - [`tools`]: where all this is; [`command_line`]: the options of a QEMU for such a guest;
//! - [`console`]: the serial line to the program in the guest; [`qmp`]: QEMU's monitor;
//! - [`running`]: a QEMU as a child of the test; [`echo`]: a host that the guest can talk to;
//! - [`attached`]: a QEMU that `pageferry qemu` serves; [`operator`]: the commands of its operator;
//! - [`memory_files`]: the holes and the content of its memory; [`other_process`]: processes that
//!   are no children of the test.
//!
//! The parts can be used alone. A test that starts QEMU by another program puts this program before
//! [`LinuxGuest::command_line`], and connects a [`Console`] to [`Sockets::console`].
//!
//! ```no_run
//! # use pageferry_tests::linux_guest::{LinuxGuest, QemuVersion, RunningGuest};
//! # use pageferry_tests::require;
//! # fn example() -> Result<(), pageferry_tests::Error> {
//! let Some(tools) = require::qemu() else { return Ok(()) };
//! let guest = LinuxGuest::new(256 << 20);
//! let mut running = RunningGuest::boot(&tools, QemuVersion::V10_0, &guest)?;
//! running.console.command("check 64M")?;
//! let after = running.console.wait_for_status("a generation", |status| status.check > 0)?;
//! after.verify()?;
//! running.power_off()
//! # }
//! ```

pub mod attached;
pub mod command_line;
pub mod console;
pub mod echo;
pub mod memory_files;
pub mod operator;
pub mod other_process;
pub mod qmp;
pub mod running;
pub mod tools;

pub use attached::{AttachedGuest, Place, SideCar};
pub use command_line::{GuestMemory, LinuxGuest, Sockets, VirtioMem};
pub use console::{Console, Status, Tick};
pub use echo::Echo;
pub use memory_files::{Difference, MemoryFiles};
pub use operator::Operator;
pub use other_process::OtherProcess;
pub use qmp::Qmp;
pub use running::RunningGuest;
pub use tools::{QemuTools, QemuVersion};
