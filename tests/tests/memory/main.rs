// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Kinds of guest memory: huge pages, file systems, disks, and sizes of a terabyte.
//!
//! - [`pairs`]: the table of docs/postcopy.md, cell by cell;
//! - [`huge_pages`]: hugetlbfs, and transparent huge pages;
//! - [`large_pages`]: guests that come in pages of 2 MiB; [`placing`]: how pages are placed on each
//!   kind of memory; [`short_memory`]: where memory is short; [`held_pages`]: what somebody keeps;
//! - [`allocation`]: the cost of a guest of 1 TiB that uses 1 GiB.
//!
//! `huge_tmpfs.rs`, beside this file, is a program of its own, because it turns transparent huge
//! pages off for its process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod allocation;
mod held_pages;
mod huge_pages;
mod large_pages;
mod pairs;
mod placing;
mod short_memory;
