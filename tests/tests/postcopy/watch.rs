// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What operators and VMMs see of a postcopy that loses its connections.

use crate::scene::{guest, plausible};
use pageferry_client::{IncomingOptions, Mode, OutgoingOptions, Parameters, Phase};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::threads::{Pattern, ThreadGuest};
use pageferry_tests::memory::TestMemory;
use pageferry_tests::process::{AgentProcess, Process, program};
use pageferry_tests::proxy::Proxy;
use pageferry_tests::require;
use pageferry_tests::usage::Usage;
use pageferry_tests::vmm::{MockVmm, PATIENCE, Tracker};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// A VMM in this process, with an agent process. The VMM is dropped first.
struct Side {
    vmm: MockVmm,
    agent: AgentProcess,
}

impl Side {
    fn new(folder: &Path, name: &str) -> Self {
        let agent = AgentProcess::spawn(program(), folder, name).unwrap();
        let usage = Usage::new(Arc::new(TestMemory::ram(16 << 20).unwrap())).unwrap();
        let guest = ThreadGuest::new(&usage, guest(Pattern::Uniform, 2000)).unwrap();
        let vmm = MockVmm::connect(agent.socket(), usage, Tracker::Log).unwrap();
        vmm.set_guest(guest);
        Self { vmm, agent }
    }

    fn watch(&self) -> Process {
        let mut command = Command::new(program());
        command.args(["watch", "--json", "--socket"]).arg(self.agent.socket());
        Process::spawn("watch", &mut command).unwrap()
    }

    /// The phases in the events of its VMM, in order.
    fn phases(&self) -> Vec<Phase> {
        let events = self.vmm.record().events;
        let mut phases: Vec<Phase> = events.iter().map(|status| status.phase).collect();
        phases.dedup();
        phases
    }
}

/// The output of a watcher.
fn seen(watch: &Process) -> Vec<Value> {
    watch.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The phases in that output, in order.
fn names(watch: &Process) -> Vec<String> {
    let mut names: Vec<String> =
        seen(watch).iter().map(|status| status["status"].as_str().unwrap().to_owned()).collect();
    names.dedup();
    names
}

#[test]
fn whoever_watches_sees_the_pause_and_the_recovery() {
    if !require::uffd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (source, destination) =
        (Side::new(folder.path(), "source"), Side::new(folder.path(), "destination"));
    let block = source.vmm.memory().block(0).unwrap();
    block.fill(block.all(), 1).unwrap();
    let (incoming, address) =
        destination.vmm.start_incoming("tcp:127.0.0.1:0", &IncomingOptions::default()).unwrap();
    let proxy = Proxy::to(&address).unwrap();
    let options =
        OutgoingOptions { mode: Mode::Postcopy, bandwidth: 64 << 10, ..OutgoingOptions::default() };
    let outgoing = source.vmm.start_outgoing(proxy.address(), &options).unwrap();
    let mut watching = [source.watch(), destination.watch()];
    let sides = [&source, &destination];
    let sees = |watching: &[Process], phase: Phase, sides: std::ops::Range<usize>| {
        wait_until(phase.name(), PATIENCE, || {
            watching[sides.clone()]
                .iter()
                .all(|watch| names(watch).iter().any(|name| name == phase.name()))
        })
        .unwrap();
    };
    sees(&watching, Phase::Postcopy, 0..2);
    proxy.hold(true);
    proxy.cut();
    sees(&watching, Phase::PostcopyPaused, 0..2);
    for side in sides {
        let status = side.vmm.client().status().unwrap();
        assert_eq!(status.phase, Phase::PostcopyPaused);
        assert!(status.error.is_some(), "the status has the reason");
    }
    let recovering = source.vmm.client().recover(None, &options).unwrap();
    assert_eq!(recovering.job, outgoing, "it is the same job");
    // The destination learns of the recovery when all connections are there, and continues at once.
    sees(&watching, Phase::Recovering, 0..1);
    proxy.hold(false);
    wait_until("postcopy again", PATIENCE, || {
        sides.iter().all(|side| {
            let status = side.vmm.client().status().unwrap();
            status.phase == Phase::Postcopy && status.error.is_none()
        })
    })
    .unwrap();
    source.vmm.client().set_parameters(&Parameters::bandwidth(0)).unwrap();

    let order = [
        Phase::Postcopy,
        Phase::PostcopyPaused,
        Phase::Recovering,
        Phase::Postcopy,
        Phase::Completed,
    ];
    for ((side, job), watch) in sides.into_iter().zip([outgoing, incoming]).zip(&mut watching) {
        let status = side.vmm.wait_job(job, PATIENCE).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        plausible(&status);
        assert!(status.counters.disconnected_us > 0);
        assert!(watch.wait(PATIENCE).unwrap().success());
        // A watcher may miss short phases. It sees the others in order.
        let mut expected = order.iter().map(|phase| phase.name());
        let names = names(watch);
        let since = names.iter().skip_while(|name| *name != "postcopy").collect::<Vec<_>>();
        assert!(since.iter().all(|name| expected.any(|next| next == name.as_str())), "{names:?}");
        assert_eq!(names.last().unwrap(), "completed");
        wait_until("the last event", PATIENCE, || side.phases().last() == Some(&Phase::Completed))
            .unwrap();
        let phases = side.phases();
        assert!(phases.ends_with(&order), "{phases:?}");
        let remaining: Vec<u64> =
            seen(watch).iter().map(|status| status["remaining_pages"].as_u64().unwrap()).collect();
        assert_eq!(remaining.last(), Some(&0), "{remaining:?}");
    }
    let counted = destination.vmm.client().status().unwrap().counters;
    assert!(counted.faults > 0 && counted.requested_pages > 0, "{counted:?}");
    destination.vmm.stop().unwrap();
    destination.vmm.usage().check().unwrap();
}
