//! A recovery that breaks in its handshake leaves nothing at the destination that spoils the next
//! one.

use pageferry_client::{Client, IncomingOptions, Mode, OutgoingOptions, Phase};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::stream::{Hello, Kind};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::files::Still;
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::require;
use pageferry_tests::scenario::{Passing, Relay, SOON, config};

const PAGES: u64 = 100;

/// Fields drop in order, so the connection closes before the agent is waited for.
struct Side {
    client: Client,
    memory: TestMemory,
    _agent: InProcessAgent,
}

impl Side {
    fn new() -> Self {
        let (agent, socket) = InProcessAgent::start().unwrap();
        let (client, channel) = Client::from_socket(socket, config()).unwrap();
        channel.spawn(Still).unwrap();
        let memory = TestMemory::new(vec![BlockLayout::ram(PAGES * PAGE_SIZE)]).unwrap();
        memory.add_to(&client).unwrap();
        client.set_trackers(pageferry_client::Trackers::LOG_IS_COMPLETE).unwrap();
        Self { client, memory, _agent: agent }
    }

    fn waits_for(&self, phase: Phase) {
        wait_until(phase.name(), SOON, || self.client.status().unwrap().phase == phase).unwrap();
    }
}

fn says_hello(record: &Passing, stream: u16) -> bool {
    record.kind == Kind::Hello && Hello::decode(&record.payload).unwrap().stream == stream
}

#[test]
fn streams_of_a_recovery_that_broke_are_no_part_of_the_next() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = (Side::new(), Side::new());
    source.memory.blocks()[0].fill(PageRange::new(0, PAGES), 7).unwrap();
    let mut relay = Relay::new();
    let incoming = relay.listen(&destination.client, &IncomingOptions::default());
    let options = OutgoingOptions {
        streams: 2,
        urgent_streams: 1,
        mode: Mode::Postcopy,
        ..OutgoingOptions::default()
    };
    let outgoing = relay.send(&source.client, &options);
    relay.until(|record| record.kind == Kind::Resumed);
    relay.cut();
    for _ in 0..2 {
        source.waits_for(Phase::PostcopyPaused);
        destination.waits_for(Phase::PostcopyPaused);
        // All streams but the primary say hello, and then the connections break.
        source.client.recover(None, &options).unwrap();
        relay.until(|record| says_hello(record, 0));
        let last = relay.until(|record| says_hello(record, 2));
        relay.pass(last);
        relay.cut();
    }
    source.waits_for(Phase::PostcopyPaused);
    source.client.recover(None, &options).unwrap();
    assert_eq!(relay.finish(&source.client, outgoing).phase, Phase::Completed);
    assert_eq!(relay.finish(&destination.client, incoming).phase, Phase::Completed);
    for page in 0..PAGES {
        let [from, to] =
            [&source, &destination].map(|side| side.memory.blocks()[0].read_page(page).unwrap());
        assert_eq!(from, to, "page {page}");
    }
}
