// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What passed through the proxy.

use super::Fault;
use std::collections::BTreeMap;

/// A request, and what became of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// The method.
    pub method: String,
    /// Path and query, as they were sent.
    pub target: String,
    /// The header `Range` or `x-ms-range`, for example `bytes=0-99`.
    pub range: Option<String>,
    /// The status that the client got. 0 if it got none, or not yet.
    pub status: u16,
    /// Bytes of its body that were sent to the store.
    pub uploaded: u64,
    /// Bytes of the answer's body that were sent to the client, with those that were on their way
    /// when the connection ended.
    pub downloaded: u64,
    /// The fault that was injected.
    pub fault: Option<Fault>,
}

/// Sums over requests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Number of requests by method.
    pub methods: BTreeMap<String, u64>,
    /// Number of faults that were injected.
    pub faults: BTreeMap<Fault, u64>,
    /// Bytes of bodies to the store.
    pub uploaded: u64,
    /// Bytes of bodies to the clients.
    pub downloaded: u64,
}

impl Counts {
    /// The sums over these requests.
    pub fn of(requests: &[Request]) -> Self {
        let mut counts = Self::default();
        for request in requests {
            *counts.methods.entry(request.method.clone()).or_default() += 1;
            if let Some(fault) = request.fault {
                *counts.faults.entry(fault).or_default() += 1;
            }
            counts.uploaded += request.uploaded;
            counts.downloaded += request.downloaded;
        }
        counts
    }

    /// Number of requests with this method.
    pub fn requests(&self, method: &str) -> u64 {
        self.methods.get(method).copied().unwrap_or(0)
    }

    /// Number of injected faults of this kind.
    pub fn injected(&self, fault: Fault) -> u64 {
        self.faults.get(&fault).copied().unwrap_or(0)
    }
}
