// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VMMs at both ends of a postcopy.

use crate::source::{LOG_COVERS, Memory, Page, SourceHooks, World};
use pageferry_client::{Client, Config, HookError, Hooks, Phase, RunState, StatePiece, Trackers};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::scenario::Listening;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};

/// A record of the hook calls of the destination's VMM.
#[derive(Default)]
pub struct Arrived {
    pub state: Vec<StatePiece>,
    pub pending: bool,
    pub runs: bool,
    pub lost: bool,
    /// Pages that devices read while they load their state.
    pub devices: Vec<Page>,
}

struct DestinationHooks {
    arrived: Arc<Mutex<Arrived>>,
    memory: Arc<Memory>,
    found: Sender<(Page, u64)>,
}

impl Hooks for DestinationHooks {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }

    fn pause(&mut self) -> Result<(), HookError> {
        Err(HookError::new("this is the destination"))
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.arrived.lock().unwrap().runs = true;
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Err(HookError::new("this is the destination"))
    }

    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        let pages = std::mem::take(&mut self.arrived.lock().unwrap().devices);
        for page in pages {
            let found = self.memory.block(page.0).load(page.1 * PAGE_SIZE)?;
            self.found.send((page, found))?;
        }
        self.arrived.lock().unwrap().state = state;
        Ok(())
    }

    fn memory_pending(&mut self) -> Result<(), HookError> {
        self.arrived.lock().unwrap().pending = true;
        Ok(())
    }

    fn memory_complete(&mut self) {
        self.arrived.lock().unwrap().pending = false;
    }

    fn memory_lost(&mut self) {
        self.arrived.lock().unwrap().lost = true;
    }
}

/// The source's VMM, on an agent with a socket for its operator. Fields drop in order, so the
/// connection is closed before the drop waits for the agent.
pub struct Source {
    pub client: Client,
    pub world: Arc<World>,
    pub agent: Listening,
}

impl Source {
    pub fn new() -> Self {
        let (agent, world) = (Listening::start(), World::new());
        let (client, channel) = Client::connect(&agent.path, config()).unwrap();
        channel.spawn(SourceHooks(world.clone())).unwrap();
        world.memory.add_to(&client);
        client.set_trackers(Trackers::LOG_IS_COMPLETE).unwrap();
        Self { client, world, agent }
    }

    pub fn phase(&self) -> Phase {
        self.client.status().unwrap().phase
    }

    pub fn runs(&self) -> bool {
        !self.world.model.lock().unwrap().paused
    }
}

/// The destination's VMM.
pub struct Destination {
    pub client: Client,
    pub memory: Arc<Memory>,
    pub arrived: Arc<Mutex<Arrived>>,
    /// The content that the devices read.
    pub found: Receiver<(Page, u64)>,
    _agent: InProcessAgent,
}

impl Destination {
    pub fn new() -> Self {
        let (agent, socket) = InProcessAgent::start().unwrap();
        let (client, channel) = Client::from_socket(socket, config()).unwrap();
        let (memory, arrived) = (Arc::new(Memory::new()), Arc::new(Mutex::new(Arrived::default())));
        let (sender, found) = mpsc::channel();
        channel
            .spawn(DestinationHooks {
                arrived: arrived.clone(),
                memory: memory.clone(),
                found: sender,
            })
            .unwrap();
        memory.add_to(&client);
        Self { client, memory, arrived, found, _agent: agent }
    }

    pub fn phase(&self) -> Phase {
        self.client.status().unwrap().phase
    }

    pub fn runs(&self) -> bool {
        self.arrived.lock().unwrap().runs
    }
}

fn config() -> Config {
    Config { log_covers: LOG_COVERS, ..Config::default() }
}
