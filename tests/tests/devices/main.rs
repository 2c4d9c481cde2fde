// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The devices of the agent, with the drivers of Linux: guests of QEMU 11.1, whose generic
//! vhost-user front-end has them.
//!
//! - [`stage`]: a guest whose memory an agent has, and its device;
//! - [`balloon`]: the balloon; [`mem`]: virtio-mem.
//!
//! The devices without a guest, with drivers of our own
//! ([`pageferry_tests::front_end`]):
//!
//! - [`inflation`], [`reporting`], [`hinting`], [`statistics`], [`config_space`]: the balloon;
//! - [`tables`]: front-ends with other regions; [`handed_over`]: without a path;
//! - [`given_back`]: most of memory is given back; [`reports_model`]: reports against a model;
//! - [`plug`]: virtio-mem; [`jobs`]: states and memory in jobs of the agent;
//! - [`bad_drivers`], [`bad_front_ends`], [`hostile`]: those that break the rules; [`scene`]: their
//!   victim.
#![allow(
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod bad_drivers;
mod bad_front_ends;
mod balloon;
mod config_space;
mod given_back;
mod handed_over;
mod hinting;
mod hostile;
mod inflation;
mod jobs;
mod mem;
mod plug;
mod reporting;
mod reports_model;
mod scene;
mod stage;
mod statistics;
mod tables;
