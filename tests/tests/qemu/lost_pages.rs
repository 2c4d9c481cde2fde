// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Processes that are killed while memory of a guest is missing: the next agent brings the rest,
//! and a guest never reads zeroes in place of its memory.

use crate::busy::{MIB, Moment, Stage, goes_on_well};
use crate::moves::POSTCOPY;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::linux_guest::console::PATIENCE;
use pageferry_tests::linux_guest::operator::{Running, wait_slowly};
use pageferry_tests::linux_guest::{AttachedGuest, LinuxGuest, QemuVersion};

/// Guests of one image, each in a postcopy of its own.
struct Scene {
    stage: Stage,
    guest: LinuxGuest,
    image: String,
    moment: Moment,
}

impl Scene {
    fn new() -> Option<Self> {
        let stage = Stage::new(crate::soak()?, QemuVersion::V10_0);
        let guest = LinuxGuest::new(256 * MIB);
        let mut first = stage.place().boot("first", &guest).unwrap();
        let moment = stage.start(&guest, &mut first.console);
        let image = stage.file("image");
        first.agent.run("snapshot", &[&image, "--mode", "paused"]).unwrap();
        Some(Self { stage, guest, image, moment })
    }

    /// A postcopy that takes minutes. The guest runs at its destination.
    fn postcopy(&self, name: &str) -> (AttachedGuest, AttachedGuest, Running) {
        let place = self.stage.place();
        let here = place.receive_image(&format!("{name}-a"), &self.guest).unwrap();
        here.agent.run("restore", &[&self.image]).unwrap();
        let mut there = place.receive(&format!("{name}-b"), &self.guest).unwrap();
        let to = ["--to", there.address.as_deref().unwrap(), "--bandwidth", "64K", "--no-wait"];
        let mut job = here.agent.start("migrate", &[&to, POSTCOPY].concat()).unwrap();
        job.wait_for_phase("postcopy").unwrap();
        there.wait_for_run_state("running").unwrap();
        (here, there, job)
    }
}

#[test]
fn guest_goes_on_when_the_agent_that_brings_its_memory_is_killed() {
    let Some(scene) = Scene::new() else { return };
    let (here, mut there, job) = scene.postcopy("agent");
    for killed in 0..3 {
        there.agent_process().unwrap().kill().unwrap();
        here.agent.wait_for_phase("postcopy-paused").unwrap();
        // The next agent may not listen yet. Then both are paused again.
        let mut recovering = Vec::new();
        wait_slowly("the recovery", || match here.agent.status()?["status"].as_str() {
            Some("postcopy-paused") => {
                recovering.push(here.agent.start("recover", &[])?);
                Ok(false)
            }
            status => Ok(status == Some("postcopy")),
        })
        .unwrap();
        there.agent.wait_for_phase("postcopy").unwrap();
        assert!(!there.qemu.has_ended(), "{killed}");
    }
    let (code, _, said) = job.outcome().unwrap();
    assert_eq!(code, 3, "{said}");
    here.agent.run("set", &["--bandwidth", "0"]).unwrap();
    there.agent.wait_for_phase("completed").unwrap();
    goes_on_well(&mut there, &scene.moment);
    drop((here, there));

    let place = scene.stage.place();
    let mut restored = place.receive_image("lazy", &scene.guest).unwrap();
    let slow = [&scene.image, "--lazy", "--bandwidth", "64K", "--detach"];
    restored.agent.run("restore", &slow).unwrap();
    restored.wait_for_run_state("running").unwrap();
    for _ in 0..3 {
        let agent = restored.agent_process().unwrap();
        agent.kill().unwrap();
        agent.wait_for_end().unwrap();
        restored.agent.wait_for_phase("prefetching").unwrap();
    }
    restored.agent.run("set", &["--bandwidth", "0"]).unwrap();
    restored.agent.wait_for_phase("completed").unwrap();
    goes_on_well(&mut restored, &scene.moment);
}

#[test]
fn guest_never_reads_zeroes_for_pages_that_are_lost() {
    let Some(scene) = Scene::new() else { return };
    let (here, there, job) = scene.postcopy("side-car");
    let agent = there.agent_process().unwrap();
    there.side_car.kill().unwrap();
    agent.wait_for_end().unwrap();
    // QEMU keeps a userfaultfd that nobody reads: the guest waits for ever.
    wait_until("a vCPU that waits for a page", PATIENCE, || waits_for_a_page(there.qemu.pid()))
        .unwrap();
    assert_eq!(there.console.bad(), [""; 0]);
    assert!(!there.qemu.has_ended());
    let (code, _, said) = job.outcome().unwrap();
    assert_eq!(code, 3, "{said}");
    drop((here, there));

    // The memory of the source is in files, which its agent has, too.
    let (mut here, mut there, job) = scene.postcopy("source");
    here.qemu.kill().unwrap();
    here.side_car.wait_for_line("the VMM is gone after its guest was handed over").unwrap();
    here.agent.run("set", &["--bandwidth", "0"]).unwrap();
    assert_eq!(job.end().unwrap()["status"], "completed");
    goes_on_well(&mut there, &scene.moment);
}

/// True if a thread of the process waits in a fault of a userfaultfd (fs/userfaultfd.c).
fn waits_for_a_page(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut places = threads.map(|thread| std::fs::read_to_string(thread.path().join("wchan")));
    places.any(|place| place.is_ok_and(|place| place.trim() == "handle_userfault"))
}
