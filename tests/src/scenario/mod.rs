// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Scenes that a test steps through: VMMs whose hooks follow a script, a relay that passes one
//! record at a time, and agents that are killed at a chosen moment.
//!
//! - [`agents`]: agents that listen, as a thread or as a process; [`raw_client`]: a connection to
//!   an agent without the client library;
//! - [`ram`]: memory with a stamp in each page; [`scripted_vmm`]: a VMM whose hooks follow a
//!   script; [`side`]: such a VMM with its agent; [`mock_side`]: a mock VMM with its agent;
//! - [`relay`]: the relay between two agents;
//! - [`images`]: snapshot options, checks of images, and damage to images; [`image_host`]: an agent
//!   with a folder for images; [`image_guest`]: a VMM that uses them;
//! - [`moments`]: guests that write all the time, and random moments at which a process is killed;
//!   [`vmm_process`]: a VMM that can be killed;
//! - [`scrape`]: the metrics of an agent;
//! - [`timing`]: timeouts of tests.
//!
//! Functions here panic on an error, and so fail the test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a panic here is a failed test"
)]

pub mod agents;
pub mod image_guest;
pub mod image_host;
pub mod images;
pub mod mock_side;
pub mod moments;
pub mod ram;
pub mod raw_client;
pub mod relay;
pub mod scrape;
pub mod scripted_vmm;
pub mod side;
pub mod timing;
pub mod vmm_process;

pub use agents::{Agent, Listening};
pub use image_guest::Guest;
pub use image_host::{Folder, Host};
pub use mock_side::MockSide;
pub use ram::{Ram, Touch, assert_same};
pub use raw_client::RawClient;
pub use relay::{Passing, Relay, WIRES, Wire, read_record};
pub use scrape::Scrape;
pub use scripted_vmm::{Asked, At, KvmLog, ScriptedHooks, ScriptedVmm};
pub use side::{Attached, Side, arrives_at, config, migrates_next_time, moves_to, passes};
pub use timing::{SOON, TooEarly, at_once, says, with_more_time};
pub use vmm_process::VmmProcess;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex whose last holder may have panicked.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
