// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A mock VMM with an agent of its own.

use crate::in_process::InProcessAgent;
use crate::memory::{BlockLayout, TestBlock, TestMemory};
use crate::usage::Usage;
use crate::vmm::{MockVmm, Tracker};
use pageferry_client::{Client, Config, IncomingOptions, JobStatus, OutgoingOptions};
use std::sync::Arc;

/// A mock VMM with an agent that is a thread of this process. Fields drop in order, so the
/// connection closes before the agent is waited for.
pub struct MockSide {
    /// The VMM.
    pub vmm: MockVmm,
    _agent: InProcessAgent,
}

impl MockSide {
    /// Empty blocks of these layouts, whose guest marks the log itself.
    pub fn new(layouts: Vec<BlockLayout>) -> Self {
        Self::over(Arc::new(TestMemory::new(layouts).unwrap()), Tracker::Log)
    }

    /// This memory, whose writes are reported by `tracker`.
    pub fn over(memory: Arc<TestMemory>, tracker: Tracker) -> Self {
        let (agent, socket) = InProcessAgent::start().unwrap();
        let (client, channel) = Client::from_socket(socket, Config::default()).unwrap();
        let usage = Usage::new(memory).unwrap();
        Self { vmm: MockVmm::new(client, channel, usage, tracker).unwrap(), _agent: agent }
    }

    /// Its connection.
    pub fn client(&self) -> &Client {
        self.vmm.client()
    }

    /// How its last job stands.
    pub fn status(&self) -> JobStatus {
        self.client().status().unwrap()
    }

    /// A block of its memory.
    pub fn block(&self, id: u32) -> &TestBlock {
        self.vmm.memory().block(id).unwrap()
    }

    /// Waits for a guest; returns the job, and the address at which it does.
    pub fn listen(&self, options: &IncomingOptions) -> (u64, String) {
        self.vmm.start_incoming("tcp:127.0.0.1:0", options).unwrap()
    }

    /// Starts to move the guest to `destination`; returns the jobs, the source's first.
    pub fn start_move(&self, destination: &Self, options: &OutgoingOptions) -> [u64; 2] {
        let (incoming, address) = destination.listen(&IncomingOptions::default());
        [self.vmm.start_outgoing(&address, options).unwrap(), incoming]
    }
}
