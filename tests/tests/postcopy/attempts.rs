// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Attempts to recover that fail half-way.

use crate::scene::{Switch, TRICKLE, check_all_filled, fill_all, guest, small};
use pageferry_client::{IncomingOptions, Parameters, Phase};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::threads::Pattern;
use pageferry_tests::proxy::Proxy;
use pageferry_tests::require;
use pageferry_tests::vmm::PATIENCE;

#[test]
fn what_is_left_of_a_failed_attempt_is_no_part_of_the_next() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = (small(4), small(4));
    fill_all(&source, 2);
    let writes = destination.threads(&guest(Pattern::Uniform, 1000));
    let _ = source.threads(&guest(Pattern::Uniform, 1000));
    let (incoming, address) =
        destination.vmm.start_incoming("tcp:127.0.0.1:0", &IncomingOptions::default()).unwrap();
    let proxy = Proxy::to(&address).unwrap();
    let options = Switch::AtOnce.options(TRICKLE);
    let outgoing = source.vmm.start_outgoing(proxy.address(), &options).unwrap();
    let client = source.client();
    let phase = |phase: Phase| {
        wait_until(phase.name(), PATIENCE, || source.status().phase == phase).unwrap()
    };
    phase(Phase::Postcopy);
    let streams = u64::from(options.connections());
    for connections in 1..streams {
        proxy.limit(Some(0));
        proxy.cut();
        phase(Phase::PostcopyPaused);
        proxy.limit(Some(connections));
        client.recover(None, &options).unwrap();
        // These connections send their hellos, and then break.
        wait_until("some connections", PATIENCE, || proxy.links() as u64 == connections).unwrap();
        wait_until("their hellos", PATIENCE, || proxy.passed() >= connections).unwrap();
        proxy.cut();
        phase(Phase::PostcopyPaused);
        proxy.limit(None);
        client.recover(None, &options).unwrap();
        // This recovery succeeds without another request.
        phase(Phase::Postcopy);
        wait_until("the destination's", PATIENCE, || destination.status().phase == Phase::Postcopy)
            .unwrap();
    }
    client.set_parameters(&Parameters::bandwidth(0)).unwrap();
    for (side, job) in [(&source, outgoing), (&destination, incoming)] {
        let status = side.vmm.wait_job(job, PATIENCE).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    }
    assert!(writes() > 0);
    destination.vmm.stop().unwrap();
    destination.vmm.usage().check().unwrap();
    check_all_filled(&destination, 2);
}
