//! VMMs that die, before the commit.

use crate::common::{Attached, Listening, Relay, migrates_next_time, passes};
use crate::scene::{BOUND, MOMENTS, at_every_moment, empty, stamped};
use pageferry_client::{IncomingOptions, Phase};
use std::time::Instant;

#[test]
fn a_vmm_that_dies_ends_its_migration_and_the_agent_serves_the_next() {
    at_every_moment("source VMM dies", |wire, (moment, is_there)| {
        let agent = Listening::new();
        let source = Attached::new(&agent.path, stamped());
        let mut relay = Relay::over(wire);
        let destination = empty();
        let incoming = relay.listen(&destination.client, &IncomingOptions::default());
        relay.send(&source.client, &passes(2));
        let record = relay.until(is_there);
        let started = Instant::now();
        drop(source);
        if moment != MOMENTS[0].0 {
            relay.pass(record);
            let status = relay.finish(&destination.client, incoming);
            assert_eq!(status.phase, Phase::Failed, "{}", status.error);
            assert_eq!(destination.vmm.resumes(), 0);
        }
        assert!(started.elapsed() < BOUND);
        migrates_next_time(&Attached::new(&agent.path, stamped()));
    });
}
