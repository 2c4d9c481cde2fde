// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that its operator has paused stays paused: at the destination, at the source, and in its
//! image. A running guest arrives paused if the user asks for that.

use pageferry_agent::image::{Chain, Image, merge};
use pageferry_client::{
    IncomingOptions, JobStatus, MIN_BANDWIDTH, Mode, OutgoingOptions, Ownership, Phase,
    RestoreMode, RestoreOptions, ResumePolicy, RunState, SnapshotMode, SnapshotOptions,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::memory::{BlockLayout, TestBlock, TestMemory};
use pageferry_tests::process::program;
use pageferry_tests::require;
use pageferry_tests::scenario::images::{on, paused, tracked};
use pageferry_tests::scenario::{Agent, passes};
use pageferry_tests::usage::Usage;
use pageferry_tests::vmm::{Fault, HookName, MockVmm, PATIENCE, Tracker};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

const PAGES: u64 = 2000;

/// A VMM and its agent. The VMM is dropped first.
struct Side {
    vmm: MockVmm,
    agent: Agent,
    folder: tempfile::TempDir,
}

impl Side {
    fn on(agent: Agent) -> Self {
        let memory = TestMemory::new(vec![BlockLayout::ram(PAGES * PAGE_SIZE)]).unwrap();
        let vmm =
            MockVmm::connect(agent.socket(), Usage::new(Arc::new(memory)).unwrap(), Tracker::Log)
                .unwrap();
        Self { vmm, agent, folder: tempfile::tempdir().unwrap() }
    }

    fn empty() -> Self {
        Self::on(Agent::Stopped(pageferry_tests::scenario::Listening::start()))
    }

    /// A VMM whose memory is full. Its guest runs, or its operator has paused it.
    fn full(run_state: RunState) -> Self {
        let side = Self::empty();
        side.fill(run_state);
        side
    }

    fn fill(&self, run_state: RunState) {
        self.block().fill(PageRange::new(0, PAGES), 1).unwrap();
        match run_state {
            RunState::Running => self.vmm.start().unwrap(),
            RunState::Paused => self.vmm.operator_pauses().unwrap(),
        }
    }

    fn block(&self) -> &TestBlock {
        self.vmm.memory().block(0).unwrap()
    }

    fn asked(&self, hook: HookName) -> usize {
        self.vmm.record().calls.iter().filter(|call| **call == hook).count()
    }

    /// Checks that the guest is ours and paused, that the VMM was told so, and that it was never
    /// told to run it.
    #[track_caller]
    fn assert_stays_paused(&self) {
        let calls = self.vmm.record().calls;
        assert_eq!(
            (self.asked(HookName::StayPaused), self.asked(HookName::Resume)),
            (1, 0),
            "{calls:?}"
        );
        assert_eq!((self.vmm.record().runs, self.vmm.run_state()), (false, RunState::Paused));
        assert_eq!(self.vmm.client().ownership(), Ownership::Ours);
    }

    /// Checks that the guest is ours and runs, and that the VMM was told so.
    #[track_caller]
    fn assert_runs(&self) {
        let calls = self.vmm.record().calls;
        assert_eq!(
            (self.asked(HookName::StayPaused), self.asked(HookName::Resume)),
            (0, 1),
            "{calls:?}"
        );
        assert!(self.vmm.record().runs);
        assert_eq!(self.vmm.client().ownership(), Ownership::Ours);
    }

    #[track_caller]
    fn assert_holds_what(&self, other: &Side) {
        for page in 0..PAGES {
            assert_eq!(
                self.block().read_page(page).unwrap(),
                other.block().read_page(page).unwrap(),
                "page {page:#x}"
            );
        }
    }

    #[track_caller]
    fn saves(&self, image: &Path, options: &SnapshotOptions) -> JobStatus {
        completed(
            self.vmm.wait_job(self.vmm.start_snapshot(image, options).unwrap(), PATIENCE).unwrap(),
        )
    }

    #[track_caller]
    fn restores(&self, image: &Path, options: &RestoreOptions) -> JobStatus {
        completed(
            self.vmm.wait_job(self.vmm.start_restore(image, options).unwrap(), PATIENCE).unwrap(),
        )
    }
}

#[track_caller]
fn completed(status: JobStatus) -> JobStatus {
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    status
}

/// Migrates the guest. Returns the final status of both jobs, the source's first.
#[track_caller]
fn moves(
    from: &Side, to: &Side, outgoing: &OutgoingOptions, resume: ResumePolicy,
) -> [JobStatus; 2] {
    let incoming = IncomingOptions { resume, ..IncomingOptions::default() };
    let (incoming, address) = to.vmm.start_incoming("tcp:127.0.0.1:0", &incoming).unwrap();
    let outgoing = from.vmm.start_outgoing(&address, outgoing).unwrap();
    let ended = [
        from.vmm.wait_job(outgoing, PATIENCE).unwrap(),
        to.vmm.wait_job(incoming, PATIENCE).unwrap(),
    ];
    assert_eq!(
        ended[0].phase,
        ended[1].phase,
        "{} {}",
        ended[0].error_text(),
        ended[1].error_text()
    );
    ended
}

/// Each migration mode that works on this machine.
fn ways() -> Vec<OutgoingOptions> {
    let precopy = OutgoingOptions { streams: 2, ..passes(2) };
    let hybrid = OutgoingOptions { mode: Mode::Hybrid, switch_after: 1, ..precopy.clone() };
    let postcopy = OutgoingOptions { mode: Mode::Postcopy, ..precopy.clone() };
    if require::uffd() { vec![precopy, hybrid, postcopy] } else { vec![precopy] }
}

#[test]
fn a_paused_guest_arrives_paused_until_resumed() {
    for options in ways() {
        let (from, to) = (Side::full(RunState::Paused), Side::empty());
        let ended = moves(&from, &to, &options, ResumePolicy::Auto);
        for status in ended {
            assert_eq!(
                completed(status.clone()).guest,
                Some(RunState::Paused),
                "{:?}",
                options.mode
            );
            assert_eq!(status.counters.downtime_us, 0, "no job caused downtime");
        }
        to.assert_stays_paused();
        to.assert_holds_what(&from);
        assert_eq!(from.vmm.client().ownership(), Ownership::Gone);
        assert_eq!(
            (from.asked(HookName::StayPaused), from.asked(HookName::Resume)),
            (0, 0),
            "it is not here"
        );
        to.vmm.operator_resumes().unwrap();
        // After its operator resumes it, it migrates as a running guest.
        let next = Side::empty();
        to.vmm.clear_record();
        let ended = moves(&to, &next, &options, ResumePolicy::Auto);
        for status in ended {
            assert_eq!(completed(status).guest, Some(RunState::Running));
        }
        next.assert_runs();
    }
}

#[test]
fn a_running_guest_arrives_paused_if_either_side_wants_it() {
    for options in ways() {
        for (at_source, there) in
            [(ResumePolicy::Never, ResumePolicy::Auto), (ResumePolicy::Auto, ResumePolicy::Never)]
        {
            let (from, to) = (Side::full(RunState::Running), Side::empty());
            let options = OutgoingOptions { resume: at_source, ..options.clone() };
            let [outgoing, incoming] = moves(&from, &to, &options, there);
            assert!(completed(outgoing).counters.downtime_us > 0, "the guest ran until the pause");
            assert_eq!(completed(incoming).guest, Some(RunState::Paused));
            to.assert_stays_paused();
            to.assert_holds_what(&from);
        }
    }
}

#[test]
fn a_paused_guest_stays_paused_when_its_move_fails() {
    let fails = || Fault::Fail("not today".into());
    let cases = [
        (HookName::Pause, fails()),
        (HookName::SaveState, fails()),
        (HookName::LoadState, fails()),
        // Cancelled while the state is saved.
        (HookName::SaveState, Fault::Never),
    ];
    for options in ways() {
        for (hook, fault) in &cases {
            let (from, to) = (Side::full(RunState::Paused), Side::empty());
            let spoiled = if *hook == HookName::LoadState { &to } else { &from };
            spoiled.vmm.inject(*hook, Some(fault.clone()));
            let (incoming, address) =
                to.vmm.start_incoming("tcp:127.0.0.1:0", &IncomingOptions::default()).unwrap();
            let outgoing = from.vmm.start_outgoing(&address, &options).unwrap();
            let ended = || from.vmm.client().status().unwrap().phase.is_final();
            wait_until("the hook", PATIENCE, || spoiled.asked(*hook) > 0).unwrap();
            if *fault == Fault::Never {
                from.vmm.client().cancel().unwrap();
                spoiled.vmm.inject(*hook, None);
            }
            wait_until("the end", PATIENCE, ended).unwrap();
            spoiled.vmm.inject(*hook, None);
            let status = from.vmm.wait_job(outgoing, PATIENCE).unwrap();
            assert!(
                matches!(status.phase, Phase::Failed | Phase::Cancelled),
                "{hook:?}: {status:?}"
            );
            from.assert_stays_paused();
            to.vmm.wait_job(incoming, PATIENCE).unwrap();
            assert_eq!(
                (to.asked(HookName::StayPaused), to.asked(HookName::Resume)),
                (0, 0),
                "it is not here"
            );

            from.vmm.clear_record();
            let next = Side::empty();
            for status in moves(&from, &next, &options, ResumePolicy::Auto) {
                completed(status);
            }
            next.assert_stays_paused();
        }
    }
}

#[test]
fn an_agent_that_dies_while_saving_leaves_it_paused() {
    let mut side = Side::on(Agent::spawn());
    side.fill(RunState::Paused);
    let options = SnapshotOptions { bandwidth: MIN_BANDWIDTH, ..paused() };
    side.vmm.start_snapshot(&side.folder.path().join("image"), &options).unwrap();
    side.vmm.wait_phase(Phase::Saving, PATIENCE).unwrap();
    side.agent.kill();
    wait_until("the loss", PATIENCE, || side.vmm.record().agent_lost.is_some()).unwrap();
    side.assert_stays_paused();
}

#[test]
fn an_image_of_a_paused_guest_restores_paused() {
    let from = Side::full(RunState::Paused);
    let mut modes = vec![SnapshotMode::Paused, SnapshotMode::Stopped];
    let mut restores = vec![RestoreMode::Eager];
    if require::uffd() {
        modes.push(SnapshotMode::Background);
        restores.push(RestoreMode::Lazy);
    }
    for mode in modes {
        from.vmm.clear_record();
        let image = from.folder.path().join(format!("{mode:?}"));
        let saved = from.saves(&image, &SnapshotOptions { mode, ..SnapshotOptions::default() });
        assert_eq!((saved.guest, saved.counters.downtime_us), (Some(RunState::Paused), 0));
        assert_eq!(Image::open(&image).unwrap().header().guest, RunState::Paused);
        if mode == SnapshotMode::Stopped {
            assert_eq!((from.asked(HookName::StayPaused), from.asked(HookName::Resume)), (0, 0));
        } else {
            from.assert_stays_paused();
        }
        for mode in &restores {
            let to = Side::empty();
            let options = RestoreOptions { mode: *mode, ..RestoreOptions::default() };
            assert_eq!(to.restores(&image, &options).guest, Some(RunState::Paused));
            to.assert_stays_paused();
            to.assert_holds_what(&from);
            to.vmm.operator_resumes().unwrap();
        }
    }
}

#[test]
fn an_image_of_a_running_guest_restores_running_by_default() {
    let from = Side::full(RunState::Running);
    let image = from.folder.path().join("image");
    assert_eq!(from.saves(&image, &paused()).guest, Some(RunState::Running));
    from.assert_runs();
    let mut modes = vec![RestoreMode::Eager];
    if require::uffd() {
        modes.push(RestoreMode::Lazy);
    }
    for mode in modes {
        for resume in [ResumePolicy::Auto, ResumePolicy::Never] {
            let to = Side::empty();
            let status =
                to.restores(&image, &RestoreOptions { mode, resume, ..RestoreOptions::default() });
            if resume == ResumePolicy::Never {
                assert_eq!(status.guest, Some(RunState::Paused));
                to.assert_stays_paused();
            } else {
                assert_eq!(status.guest, Some(RunState::Running));
                to.assert_runs();
            }
            to.assert_holds_what(&from);
        }
    }
}

#[test]
fn of_a_chain_the_newest_image_says_what_the_guest_was() {
    let from = Side::full(RunState::Running);
    let [base, next, merged] = ["base", "next", "merged"].map(|name| from.folder.path().join(name));
    from.saves(&base, &tracked(paused()));
    from.vmm.operator_pauses().unwrap();
    from.saves(&next, &on(&base, paused()));
    let chain = Chain::open(&next).unwrap();
    let states = chain.layers().iter().map(|layer| layer.image.header().guest).collect::<Vec<_>>();
    assert_eq!(states, [RunState::Paused, RunState::Running]);
    merge::merge(&next, &merged, false, 2, &|_, _| ()).unwrap();
    assert_eq!(Image::open(&merged).unwrap().header().guest, RunState::Paused);
    let to = Side::empty();
    to.restores(&merged, &RestoreOptions::default());
    to.assert_stays_paused();
}

/// Runs a command that prints JSON, and checks that it succeeds. Returns the last object.
#[track_caller]
fn printed(arguments: &[&str]) -> Value {
    let output = Command::new(program()).args(arguments).arg("--json").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_str(String::from_utf8(output.stdout).unwrap().lines().last().unwrap()).unwrap()
}

#[test]
fn an_operator_sees_and_says_what_the_guest_is_to_be() {
    let from = Side::full(RunState::Running);
    let image = from.folder.path().join("image");
    from.saves(&image, &paused());
    let image = image.to_str().unwrap();
    assert_eq!(printed(&["image", "info", image])["guest"], "running");
    let to = Side::empty();
    to.vmm.take_guests();
    let restored = printed(&[
        "restore",
        "--socket",
        to.agent.socket().to_str().unwrap(),
        image,
        "--resume",
        "never",
    ]);
    assert_eq!(restored["run_state"], "paused");
    to.assert_stays_paused();

    // He may resume it, also after a later job that left it paused, and once.
    let socket = to.agent.socket().to_str().unwrap().to_owned();
    to.saves(&to.folder.path().join("still-paused"), &paused());
    assert!(!to.vmm.record().runs);
    assert_eq!(printed(&["resume", "--socket", &socket])["status"], "resumed");
    assert!(to.vmm.record().runs);
    let again = Command::new(program()).args(["resume", "--socket", &socket]).output().unwrap();
    let said = String::from_utf8(again.stderr).unwrap();
    assert!(!again.status.success() && said.contains("no job of this agent has left"), "{said}");

    let to = Side::empty();
    let (_, address) =
        to.vmm.start_incoming("tcp:127.0.0.1:0", &IncomingOptions::default()).unwrap();
    let socket = from.agent.socket().to_str().unwrap();
    let moved = printed(&["migrate", "--socket", socket, "--to", &address, "--resume", "never"]);
    assert_eq!(moved["run_state"], "paused");
    wait_until("the end there", PATIENCE, || to.vmm.client().status().unwrap().phase.is_final())
        .unwrap();
    to.assert_stays_paused();
    // Not where it came from.
    let refused = Command::new(program()).args(["resume", "--socket", socket]).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("the destination has confirmed that the guest is there"), "{said}");
    let there = to.agent.socket().to_str().unwrap();
    printed(&["resume", "--socket", there]);
    assert!(to.vmm.record().runs);
    assert_eq!(printed(&["status", "--socket", there])["run_state"], "running");
    let status = Command::new(program()).args(["status", "--socket", socket]).output().unwrap();
    let lines = String::from_utf8(status.stdout).unwrap();
    let says = |line: &str| {
        line.starts_with("guest ")
            && line.contains("at the destination")
            && line.ends_with("paused when the job ended")
    };
    assert!(lines.lines().any(says), "{lines}");
    let output = Command::new(program())
        .args(["migrate", "--socket", socket, "--to", &address, "--resume", "always"])
        .output();
    let said = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(said.contains("\"always\": write auto or never"), "{said}");
}
