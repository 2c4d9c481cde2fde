// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An HTTP proxy in front of a store, which delays, refuses, cuts and damages answers.
//!
//! A request passes through it like this:
//!
//! 1. The proxy reads the head of the request, and chooses a fault for it, or none, by a seeded
//!    random generator and the shares in [`Faults`].
//! 2. It sends the request to the store on a connection of its own, and reads the head of the
//!    answer.
//! 3. It waits for [`Faults::latency`], and passes the answer on, at most at
//!    [`Faults::bandwidth`]. The connection of the client stays open.
//!
//! A test changes the faults at any time, and takes the proxy down and up again. The proxy counts
//! what it passes on, and remembers each request: a test can show that no byte was read twice.
//!
//! - `http`: heads and bodies; `log`: what passed; `proxy`: the port and its connections;
//!   `exchange`: one request and its answer.

mod exchange;
mod http;
mod log;
mod proxy;
#[cfg(test)]
mod tests;

pub use log::{Counts, Request};
pub use proxy::FaultProxy;

use crate::random::Random;
use std::time::Duration;

/// What goes wrong with one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// The answer is status 503 with code `SlowDown`. The store does not see the request.
    Busy,
    /// The answer is status 500 with code `InternalError`. The store does not see the request.
    Internal,
    /// The connection is reset in the middle of the request's body, or after its head if it has no
    /// body. The store sees a part of the request.
    CutRequest,
    /// The store carries the request out. Then the connection is reset instead of the answer.
    CutAnswer,
    /// The connection is reset in the middle of the answer's body.
    CutBody,
    /// The connection is closed in the middle of the answer's body, without an error.
    Truncate,
    /// One bit of the answer's body is wrong.
    Flip,
    /// The answer comes after [`Faults::stall`].
    Stall,
}

impl Fault {
    /// All.
    pub const ALL: [Self; 8] = [
        Self::Busy,
        Self::Internal,
        Self::CutRequest,
        Self::CutAnswer,
        Self::CutBody,
        Self::Truncate,
        Self::Flip,
        Self::Stall,
    ];

    /// True if it needs an object's content in the answer. [`FaultProxy`] does nothing if the
    /// answer is not to a GET, is an error, is XML such as a list, has no body, or has a body
    /// whose length is not announced.
    pub fn is_of_content(self) -> bool {
        matches!(self, Self::CutBody | Self::Truncate | Self::Flip)
    }
}

/// How the proxy treats requests. The default passes all on at once.
#[derive(Debug, Clone)]
pub struct Faults {
    /// Time from the store's answer until it is passed on.
    pub latency: Duration,
    /// Bytes of bodies per second, for all connections together, in each direction. `None` is no
    /// limit.
    pub bandwidth: Option<u64>,
    /// How long [`Fault::Stall`] holds an answer back.
    pub stall: Duration,
    /// If set, only requests whose request line contains this text have faults: `GET`, or a part of
    /// an object's name. Latency and bandwidth hold for all.
    pub only: Option<String>,
    /// How many more faults are injected. `None` is no limit.
    pub at_most: Option<u64>,
    /// The share of each fault, in thousandths. See [`Faults::with`].
    pub shares: Vec<(Fault, u64)>,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            latency: Duration::ZERO,
            bandwidth: None,
            stall: Duration::from_secs(60),
            only: None,
            at_most: None,
            shares: Vec::new(),
        }
    }
}

impl Faults {
    /// Also injects `fault` in `per_mille` of 1000 requests. A request has one fault at most, so
    /// the shares of all faults add up.
    #[must_use]
    pub fn with(mut self, fault: Fault, per_mille: u64) -> Self {
        self.shares.push((fault, per_mille));
        self
    }

    /// The fault of a request.
    fn choose(&self, line: &str, random: &mut Random) -> Option<Fault> {
        let mut number = random.below(1000);
        if self.at_most == Some(0) || self.only.as_ref().is_some_and(|text| !line.contains(text)) {
            return None;
        }
        for (fault, share) in &self.shares {
            if number < *share {
                return Some(*fault);
            }
            number -= share;
        }
        None
    }
}
