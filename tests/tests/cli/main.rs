// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line for operators.
//!
//! - [`operator`]: migrations, and their errors;
//! - [`listen`]: migrations that an operator alone arranges, and changes of a job that runs;
//! - [`vm`]: what the agent says of its VM;
//! - [`outcomes`]: exit codes, and what goes to standard output and standard error;
//! - [`manual`]: man pages, completions, and `check`;
//! - [`systemd`]: sockets from systemd, messages to it, and the units;
//! - [`side`]: an agent, its VMM, and the commands of its operator;
//! - [`pty`]: a terminal of 80 columns;
//! - [`image`]: images: info, verify, merge and map;
//! - [`raw`]: raw files of memory: import and export.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod image;
mod listen;
mod manual;
mod operator;
mod outcomes;
mod pty;
mod raw;
mod side;
mod systemd;
mod vm;
