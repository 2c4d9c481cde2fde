// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Images in object stores: S3, Azure's blob service, and a folder. The servers are real ones
//! (`tests/stores/install`), behind a proxy that injects faults.
//!
//! - [`images`]: what a store is for;
//! - [`faults`]: a store that delays, refuses, cuts and damages;
//! - [`deaths`]: processes that are killed;
//! - [`figures`]: how long it takes;
//! - [`scene`]: a store, a proxy in front of it, a cache, and agents.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod deaths;
mod faults;
mod figures;
mod images;
mod scene;
