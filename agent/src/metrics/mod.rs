// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Metrics of the agent for Prometheus and other scrapers, over HTTP (`pageferry agent --metrics`).
//!
//! - [`sample`]: what one scrape reads from the agent;
//! - [`exposition`]: the metrics; `sums`: those that sum up over all jobs; `page`: writes them;
//!   [`format`](mod@format): the two formats of their text;
//! - [`discarded`]: the size of the discarded memory, which takes a walk over bitmaps;
//! - [`request`]: the head of an HTTP request, and the answers to bad ones;
//! - [`exchange`]: one request and its answer, on a socket that never blocks;
//! - [`server`]: the thread that has all exchanges;
//! - [`address`](mod@address): the address that `--metrics` takes.
//!
//! Whoever can connect can read the metrics. No label has a value that a VMM, a guest or a peer
//! chose, so the number of series is fixed.

pub mod address;
pub mod discarded;
pub mod exchange;
pub mod exposition;
pub mod format;
mod page;
pub mod request;
pub mod sample;
pub mod server;
mod sums;

pub use sample::Sample;
pub use server::MetricsServer;
