//! A device that waits for missing memory while it loads its state, at a destination that loses its source, or its agent: it goes on, and so does its VMM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Agent, Ram, Relay, SOON, Side, config};
use pageferry_client::{
    Client, HookChannel, HookError, Hooks, IncomingOptions, Mode, OutgoingOptions, Ownership, Phase, StatePiece,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::require;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PAGES: u64 = 100;
const TOUCHED: u64 = 42;

#[derive(Default)]
struct Seen {
    found: Vec<u64>,
    lost: bool,
    memory_lost: bool,
    pending: bool,
}

/// A VMM with one device, which looks at a page while it loads its state.
struct Device {
    memory: Arc<TestMemory>,
    seen: Arc<Mutex<Seen>>,
}

impl Hooks for Device {
    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(Vec::new())
    }

    fn load_state(&mut self, _: Vec<StatePiece>) -> Result<(), HookError> {
        let found = self.memory.block(3)?.load(TOUCHED * PAGE_SIZE)?;
        self.seen.lock().unwrap().found.push(found);
        Ok(())
    }

    fn memory_pending(&mut self) -> Result<(), HookError> {
        self.seen.lock().unwrap().pending = true;
        Ok(())
    }

    fn memory_complete(&mut self) {
        self.seen.lock().unwrap().pending = false;
    }

    fn memory_lost(&mut self) {
        self.seen.lock().unwrap().memory_lost = true;
    }

    fn agent_lost(&mut self, _: Ownership) {
        self.seen.lock().unwrap().lost = true;
    }
}

/// The destination's VMM.
struct Destination {
    client: Client,
    seen: Arc<Mutex<Seen>>,
}

impl Destination {
    fn new((client, channel): (Client, HookChannel)) -> Self {
        let layout = BlockLayout { id: 3, name: "block3".into(), gpa: 0x7000, ..BlockLayout::ram(PAGES * PAGE_SIZE) };
        let memory = Arc::new(TestMemory::new(vec![layout]).unwrap());
        let seen = Arc::default();
        channel.spawn(Device { memory: memory.clone(), seen: Arc::clone(&seen) }).unwrap();
        memory.add_to(&client).unwrap();
        Self { client, seen }
    }
}

fn source() -> Side {
    let ram = Ram::odd(PAGES);
    (0..PAGES).for_each(|page| ram.write(page, page + 1));
    Side::new(ram)
}

fn options() -> OutgoingOptions {
    OutgoingOptions { mode: Mode::Postcopy, urgent_streams: 1, ..OutgoingOptions::default() }
}

#[test]
fn a_device_that_waits_goes_on_when_the_source_is_lost_and_the_next_migration_arrives() {
    if !require::uffd() {
        return;
    }
    let (agent, socket) = InProcessAgent::start().unwrap();
    let destination = Destination::new(Client::from_socket(socket, config()).unwrap());
    let source = source();
    let mut relay = Relay::new();
    // No hook is late: the device goes on long before.
    let patient = IncomingOptions { hook_timeout: Duration::from_secs(600), ..IncomingOptions::default() };
    let incoming = relay.listen(&destination.client, &patient);
    let outgoing = relay.send(&source.client, &options());
    relay.until(|record| record.kind == Kind::Request);
    relay.cut();
    assert_eq!(destination.client.wait(incoming, SOON).unwrap().phase, Phase::Failed);
    assert_eq!(source.wait(outgoing).phase, Phase::Failed);
    assert!(!source.vmm.is_paused());
    assert!(!destination.seen.lock().unwrap().pending);

    let incoming = relay.listen(&destination.client, &patient);
    let outgoing = relay.send(&source.client, &options());
    assert_eq!(relay.finish(&source.client, outgoing).phase, Phase::Completed);
    assert_eq!(relay.finish(&destination.client, incoming).phase, Phase::Completed);
    let seen = destination.seen.lock().unwrap();
    assert_eq!(seen.found, [0, TOUCHED + 1]);
    assert!(!seen.memory_lost && !seen.pending);
    drop(seen);
    drop(destination);
    drop(agent);
}

#[test]
fn a_device_that_waits_goes_on_when_the_agent_is_lost() {
    if !require::uffd() {
        return;
    }
    let mut agent = Agent::spawn();
    let destination = Destination::new(Client::connect(agent.socket(), config()).unwrap());
    let source = source();
    let mut relay = Relay::new();
    relay.listen(&destination.client, &IncomingOptions::default());
    let outgoing = relay.send(&source.client, &options());
    relay.until(|record| record.kind == Kind::Request);
    agent.kill();
    wait_until("the end of the agent", SOON, || destination.seen.lock().unwrap().lost).unwrap();
    relay.cut();
    assert_eq!(source.wait(outgoing).phase, Phase::Failed);
    assert!(!source.vmm.is_paused());
    let seen = destination.seen.lock().unwrap();
    assert!(!seen.memory_lost && !seen.pending, "no guest was lost: none ran here");
    assert_eq!(destination.client.ownership(), Ownership::Awaiting);
}
