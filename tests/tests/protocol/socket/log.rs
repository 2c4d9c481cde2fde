// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Refused requests, which must not fill the log.

use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::scenario::{RawClient, SOON};
use std::time::Instant;

#[test]
fn refused_requests_do_not_fill_the_log() {
    const REQUESTS: usize = 5000;
    let folder = tempfile::tempdir().unwrap();
    let mut agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
    let (mut peer, began) = (RawClient::connect(agent.socket()), Instant::now());
    for _ in 0..REQUESTS {
        peer.ask_raw(0x1fff, Vec::new(), Vec::new()).unwrap_err();
    }
    // The log reports the number of suppressed lines within the next second, also if nothing more
    // is logged.
    agent.process().wait_for_line("more lines from", SOON).unwrap();
    let refused = agent
        .process()
        .lines()
        .iter()
        .filter(|line| line.contains("request 0x1fff refused"))
        .count();
    // 20 lines in each second that began.
    let most = 20 * (began.elapsed().as_secs() as usize + 2);
    assert!((20..=most).contains(&refused), "{refused}");
}
