// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A mock VMM with its own agent.

use crate::guest::threads::{ThreadGuest, ThreadGuestOptions};
use crate::in_process::InProcessAgent;
use crate::memory::{BlockLayout, TestBlock, TestMemory, of_clone};
use crate::usage::Usage;
use crate::vmm::{MockVmm, Tracker};
use pageferry_client::{Client, Config, IncomingOptions, JobStatus, OutgoingOptions, Phase};
use std::path::Path;
use std::sync::Arc;

/// A mock VMM with an agent that is a thread of this process. Fields drop in order, so the
/// connection is closed before the drop waits for the agent.
pub struct MockSide {
    /// The VMM.
    pub vmm: MockVmm,
    _agent: InProcessAgent,
}

impl MockSide {
    /// A VMM with empty blocks of these layouts. Its guest marks the log itself.
    pub fn new(layouts: Vec<BlockLayout>) -> Self {
        Self::over(Arc::new(TestMemory::new(layouts).unwrap()), Tracker::Log)
    }

    /// A VMM with this memory. `tracker` reports its writes.
    pub fn over(memory: Arc<TestMemory>, tracker: Tracker) -> Self {
        Self::with(tracker, |_| memory)
    }

    /// A VMM whose memory is private mappings of the base of an image. It becomes a clone by a
    /// restore with a shared base.
    pub fn clone_of(image: &Path, layouts: Vec<BlockLayout>, tracker: Tracker) -> Self {
        Self::with(tracker, |client| {
            let layouts = of_clone(client, image, layouts).unwrap();
            Arc::new(TestMemory::new(layouts).unwrap())
        })
    }

    fn with(tracker: Tracker, memory: impl FnOnce(&Client) -> Arc<TestMemory>) -> Self {
        let (agent, socket) = InProcessAgent::start().unwrap();
        let (client, channel) = Client::from_socket(socket, Config::default()).unwrap();
        let usage = Usage::new(memory(&client)).unwrap();
        Self { vmm: MockVmm::new(client, channel, usage, tracker).unwrap(), _agent: agent }
    }

    /// The connection to the agent.
    pub fn client(&self) -> &Client {
        self.vmm.client()
    }

    /// The status of the last job.
    pub fn status(&self) -> JobStatus {
        self.client().status().unwrap()
    }

    /// A block of the memory.
    pub fn block(&self, id: u32) -> &TestBlock {
        self.vmm.memory().block(id).unwrap()
    }

    /// Bytes allocated in the memory.
    pub fn allocated(&self) -> u64 {
        self.vmm.memory().allocated().unwrap()
    }

    /// True if the VMM got an event of this phase.
    pub fn saw(&self, phase: Phase) -> bool {
        self.vmm.record().events.iter().any(|status| status.phase == phase)
    }

    /// Gives the VMM a guest of threads. Returns a function that says how often it wrote.
    pub fn threads(&self, options: &ThreadGuestOptions) -> impl Fn() -> u64 + Send + Sync + use<> {
        let guest = ThreadGuest::new(self.vmm.usage(), options.clone()).unwrap();
        let writes = guest.watch_writes();
        self.vmm.set_guest(guest);
        writes
    }

    /// Starts to wait for a guest. Returns the job, and the address at which it listens.
    pub fn listen(&self, options: &IncomingOptions) -> (u64, String) {
        self.vmm.start_incoming("tcp:127.0.0.1:0", options).unwrap()
    }

    /// Starts to migrate the guest to `destination`. Returns the jobs, the source's first.
    pub fn start_move(&self, destination: &Self, options: &OutgoingOptions) -> [u64; 2] {
        let (incoming, address) = destination.listen(&IncomingOptions::default());
        [self.vmm.start_outgoing(&address, options).unwrap(), incoming]
    }
}
