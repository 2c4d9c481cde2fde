// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sandbox of an agent: what is refused, what is logged, and what works in it all the same.
#![deny(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod forbidden;
mod grants;
mod threads;
