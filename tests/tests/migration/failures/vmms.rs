// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A source VMM in this process that disconnects while its agent stays. [`crate::killed_vmms`]
//! kills VMMs.

use super::scene::{MOMENTS, at_every_moment};
use crate::scene::{empty, stamped};
use pageferry_client::{IncomingOptions, Phase};
use pageferry_protocol::stream::Kind;
use pageferry_tests::process::{Process, program};
use pageferry_tests::scenario::{Attached, Listening, Relay, SOON, migrates_next_time, passes};
use std::process::Command;

#[test]
fn after_a_dead_vmm_the_agent_serves_the_next() {
    at_every_moment("source VMM dies", |wire, (moment, is_there)| {
        let agent = Listening::start();
        let source = Attached::new(&agent.path, stamped());
        let mut relay = Relay::over(wire);
        let destination = empty();
        let incoming = relay.listen(&destination.client, &IncomingOptions::default());
        relay.send(&source.client, &passes(2));
        let record = relay.until(is_there);
        drop(source);
        if moment != MOMENTS[0].0 {
            relay.pass(record);
            let status = relay.finish(&destination.client, incoming);
            assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
            assert_eq!(destination.vmm.resumes(), 0);
        }
        migrates_next_time(&Attached::new(&agent.path, stamped()));
    });
}

#[test]
fn an_operator_sees_a_migration_end_whose_vmm_died() {
    let agent = Listening::start();
    let source = Attached::new(&agent.path, stamped());
    let mut relay = Relay::unix();
    let destination = empty();
    relay.listen(&destination.client, &IncomingOptions::default());
    let operator = |name: &str, more: &[&str]| {
        let mut command = Command::new(program());
        command.args([name, "--json", "--socket"]).arg(&agent.path).args(more);
        Process::spawn(name, &mut command).unwrap()
    };
    let mut migrate = operator("migrate", &["--to", &relay.address()]);
    let _record = relay.until(|record| record.kind == Kind::Data);
    let mut watch = operator("watch", &[]);
    for watcher in [&mut migrate, &mut watch] {
        watcher.wait_for_line("passes", SOON).unwrap();
    }
    drop(source);
    for watcher in [&mut migrate, &mut watch] {
        let status = watcher.wait(SOON).unwrap();
        assert!(!status.success());
        assert!(watcher.lines().last().unwrap().contains("cancelled"), "{:?}", watcher.lines());
    }
}
