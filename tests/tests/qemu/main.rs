// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Linux guests under unmodified QEMUs, of an old and a new version.
//!
//! - [`guests`]: the guests themselves, on which the other tests here rely;
//! - [`migrations`]: busy guests move in every mode, and their memory takes no more room there;
//! - [`busy`]: a guest with work for all its devices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod busy;
mod guests;
mod migrations;
