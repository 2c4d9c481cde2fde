// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A recovery that breaks in its handshake leaves nothing at the destination that spoils the next
//! one.

use pageferry_client::{IncomingOptions, Mode, OutgoingOptions, Phase};
use pageferry_protocol::stream::{Hello, Kind};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use pageferry_tests::scenario::{Passing, Ram, Relay, SOON, Side, assert_same};

const PAGES: u64 = 100;

fn reaches(side: &Side, phase: Phase) {
    wait_until(phase.name(), SOON, || side.client.status().unwrap().phase == phase).unwrap();
}

fn says_hello(record: &Passing, stream: u16) -> bool {
    record.kind == Kind::Hello && Hello::decode(&record.payload).unwrap().stream == stream
}

#[test]
fn streams_of_a_recovery_that_broke_are_no_part_of_the_next() {
    if !require::uffd() {
        return;
    }
    let source = Side::new(Ram::odd(PAGES).mapped().stamped());
    let destination = Side::new(Ram::odd(PAGES).mapped());
    let mut relay = Relay::unix();
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
        reaches(&source, Phase::PostcopyPaused);
        reaches(&destination, Phase::PostcopyPaused);
        // All streams except the primary send their hello, and then the connections break.
        source.client.recover(None, &options).unwrap();
        relay.until(|record| says_hello(record, 0));
        let last = relay.until(|record| says_hello(record, 2));
        relay.pass(last);
        relay.cut();
    }
    reaches(&source, Phase::PostcopyPaused);
    source.client.recover(None, &options).unwrap();
    assert_eq!(relay.finish(&source.client, outgoing).phase, Phase::Completed);
    assert_eq!(relay.finish(&destination.client, incoming).phase, Phase::Completed);
    assert_same(&source.ram, &destination.ram);
}
