// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents of clones that are killed, and what became of the base and the image meanwhile.

use super::{Clone, content, image};
use pageferry_client::{BlockSpec, Client, Config, Parameters, Phase, Supervisor, Trackers};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::{wait_for, wait_until};
use pageferry_tests::memory::{BlockLayout, TestMemory, of_clone};
use pageferry_tests::process::program;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{PAGES, cloning, slow};
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::{SOON, ScriptedHooks, ScriptedVmm, lock};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

/// A clone whose agents a supervisor replaces.
struct Supervised {
    memory: TestMemory,
    client: Client,
    vmm: Arc<ScriptedVmm>,
    _supervisor: Supervisor<ScriptedHooks>,
}

impl Supervised {
    /// A clone that runs, and whose memory comes slowly.
    fn start(bases: &Path, image: &Path) -> Self {
        let (vmm, bases) = (ScriptedVmm::new(), bases.to_owned());
        let agent = move || {
            let mut command = Command::new(program());
            command.args(["agent", "--stdin"]).env("PAGEFERRY_BASES", &bases);
            command
        };
        let start =
            || Supervisor::spawn(agent.clone(), Config::default(), ScriptedHooks(vmm.clone())).ok();
        let (client, supervisor) = wait_for("the first agent", SOON, start).unwrap();
        let layouts = vec![BlockLayout::ram(PAGES * PAGE_SIZE)];
        let memory = TestMemory::new(of_clone(&client, image, layouts).unwrap()).unwrap();
        memory.add_to(&client).unwrap();
        client.set_trackers(Trackers::LOG_IS_COMPLETE).unwrap();
        client.start_restore(image, &slow(cloning())).unwrap();
        wait_until("the guest to run", SOON, || {
            client.status().is_ok_and(|status| status.phase >= Phase::Prefetching)
        })
        .unwrap();
        Self { memory, client, vmm, _supervisor: supervisor }
    }

    /// The agent dies, and another one brings the rest.
    fn survives(&self) {
        let agent = Pid::from_raw(self.client.agent_pid().cast_signed()).unwrap();
        kill_process(agent, Signal::KILL).unwrap();
        let ended = wait_until("all memory", SOON, || {
            let _ = self.client.set_parameters(&Parameters::bandwidth(0));
            let asked = lock(&self.vmm.asked);
            asked.complete + asked.lost > 0
        });
        ended.unwrap();
        assert_eq!(lock(&self.vmm.asked).lost, 0, "{:?}", self.client.status());
        for page in 0..PAGES {
            let found = self.memory.blocks()[0].load(page * PAGE_SIZE + 8).unwrap();
            assert_eq!(found, content(page), "page {page:#x}");
        }
    }
}

/// Kills the agent of a clone that has not all its memory, after `meanwhile` has changed the base
/// or the image.
fn survives_after(meanwhile: impl FnOnce(&Path, &Path)) {
    if !require::uffd() {
        return;
    }
    let (_host, image) = image();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let clone = Supervised::start(folder.path(), &image);
    meanwhile(folder.path(), &image);
    clone.survives();
}

#[test]
fn the_next_agent_continues_a_clone_whose_base_was_removed() {
    survives_after(|bases, _| {
        for entry in std::fs::read_dir(bases).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
    });
}

#[test]
fn the_next_agent_continues_a_clone_whose_image_was_touched() {
    survives_after(|_, image| {
        let file = File::options().write(true).open(image).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    });
}

#[test]
fn the_next_agent_continues_a_clone_whose_folder_of_bases_others_can_change() {
    survives_after(|bases, _| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(bases, PermissionsExt::from_mode(0o775)).unwrap();
    });
}

/// A VMM need not ignore SIGPIPE. Here the signal sets a flag.
#[test]
fn the_death_of_an_agent_raises_no_signal() {
    if !require::uffd() {
        return;
    }
    let raised = Arc::new(AtomicBool::new(false));
    let number = Signal::PIPE.as_raw();
    let handler = signal_hook::flag::register(number, raised.clone()).unwrap();
    let (_host, image) = image();
    for round in 0..15 {
        let mut clone = Clone::of(&image);
        let guest = &clone.guest;
        std::thread::scope(|scope| {
            let freeing = scope.spawn(|| {
                while guest.client.status().is_ok() {
                    (0..PAGES).step_by(64).for_each(|page| guest.write(page, 1));
                    guest.client.free(&[guest.range(0, PAGES)]).unwrap();
                }
            });
            // The moment is chance, and nothing is waited for.
            std::thread::sleep(Duration::from_micros(5000 + round * 137));
            clone.host.agent.process().kill().unwrap();
            freeing.join().unwrap();
        });
    }
    signal_hook::low_level::unregister(handler);
    assert!(!raised.load(Ordering::SeqCst));
}

#[test]
fn a_block_that_is_removed_and_added_again_leaves_no_descriptor_behind() {
    if !require::uffd() {
        return;
    }
    let (_host, image) = image();
    let clone = Clone::of(&image);
    let block = clone.guest.block();
    let again = || {
        clone.guest.client.remove_block(0).unwrap();
        let spec = BlockSpec {
            id: 0,
            name: &block.layout().name,
            gpa: 0,
            length: block.layout().length,
            memory: block.file().as_fd(),
            fd_offset: block.layout().fd_offset,
            vmm_address: block.address(),
            granularity: PAGE_SIZE,
            discarded: false,
        };
        clone.guest.client.add_clone_block(spec).unwrap();
    };
    let descriptors = |id: &str| std::fs::read_dir(format!("/proc/{id}/fd")).unwrap().count();
    let agent = clone.host.agent.id().to_string();
    again();
    let before = [descriptors("self"), descriptors(&agent)];
    (0..600).for_each(|_| again());
    // Other tests of this process have some open meanwhile, but not so many more.
    wait_until("descriptors to be closed", SOON, || descriptors("self") < before[0] + 400).unwrap();
    assert!(descriptors(&agent) <= before[1] + 10, "{} were {}", descriptors(&agent), before[1]);
    clone.guest.client.free(&[clone.guest.range(0, 10)]).unwrap();
    assert_eq!((clone.word(3), clone.word(12)), (0, content(12)));
    clone.guest.check(&clone.guest.saved(&clone.host, "saved", &paused()));
}
