// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Jobs that bring a guest from one small VMM to another: migrations, snapshots and restores.

use super::bodies::{
    self, Status, incoming, outgoing, outgoing_at, phase, restore, snapshot, with_options,
};
use super::bytes::{Body, u32_at, u64_at};
use super::hook_thread::{Instead, code as hook};
use super::vmm::{Host, PAGES, Vmm, ask, code};
use pageferry_tests::deadline::wait_for;
use pageferry_tests::proxy::Proxy;
use pageferry_tests::require;
use pageferry_tests::scenario::SOON;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Offsets of counters in the status.
const PAGES_SENT: usize = 34;
const DISCARDED_PAGES: usize = 74;
const REMAINING_PAGES: usize = 114;

/// A source with a guest, and a destination for it.
pub struct Pair {
    pub source: Vmm,
    pub destination: Vmm,
    // Dropped last: their VMMs leave first.
    hosts: [Host; 2],
}

impl Pair {
    pub fn new() -> Self {
        let hosts = [Host::start(), Host::start()];
        let (source, destination) = (Vmm::with_guest(&hosts[0]), Vmm::attach(&hosts[1]));
        Self { source, destination, hosts }
    }

    /// Migrates over a pair of sockets. Returns how it ended at the source and at the destination.
    pub fn migrate(&self, options: &Body) -> [Status; 2] {
        let (from, to) = UnixStream::pair().unwrap();
        let listen = with_options("fd", &incoming());
        assert_eq!(self.destination.start(code::START_INCOMING, &listen, &[to.as_fd()]).1, "fd");
        let target = with_options("fd", options);
        assert_eq!(self.source.start(code::START_OUTGOING, &target, &[from.as_fd()]).1, "fd");
        drop((from, to));
        [self.source.end(), self.destination.end()]
    }

    /// Starts a postcopy through a wire that can be cut, slow enough to be cut.
    fn start_postcopy(&self) -> Proxy {
        self.start_postcopy_into(&incoming())
    }

    /// The same with these options of the destination.
    fn start_postcopy_into(&self, options: &Body) -> Proxy {
        let listen = with_options("tcp:127.0.0.1:0", options);
        let (_, address) = self.destination.start(code::START_INCOMING, &listen, &[]);
        let wire = Proxy::to(&address).unwrap();
        // 64 KiB in a second: the 60 pages take four.
        let slow = outgoing().with(outgoing_at::MODE, &[1]);
        let slow = slow.with(outgoing_at::BANDWIDTH, &[0, 0, 1]);
        let target = with_options(wire.address(), &slow);
        self.source.start(code::START_OUTGOING, &target, &[]);
        wire
    }
}

#[test]
fn a_guest_moves_by_precopy_with_all_its_hooks() {
    let pair = Pair::new();
    let Pair { source, destination, .. } = &pair;
    source.track(1);
    source.ask(code::DISCARD, &bodies::range(1, 2, 1), &[]).unwrap();
    source.hooked().writes = 3;
    // After two passes the guest is throttled, since no downtime is short enough.
    let options = outgoing().with(outgoing_at::MAX_PASSES, &[2]);
    let options = options.with(outgoing_at::DOWNTIME_LIMIT, &[0; 8]);
    let options = options.with(outgoing_at::POLICY, &[1]);
    let [sent, received] = pair.migrate(&options);
    assert_eq!((sent.phase, received.phase), (phase::COMPLETED, phase::COMPLETED), "{sent:?}");
    assert_eq!((sent.kind, sent.guest, sent.trackers, sent.arrived), (1, 1, 1, 0));
    assert_eq!((received.kind, received.guest, received.arrived), (2, 1, 1));
    assert!(sent.counter(PAGES_SENT) >= 3 && received.counter(PAGES_SENT) == 0);
    assert_eq!(sent.counter(DISCARDED_PAGES), 1);

    let codes = source.hooked().codes();
    let begin = [hook::THROTTLE, hook::START_TRACKING, hook::SYNC_TRACKER];
    assert_eq!(codes[..3], begin, "the first one asks whether the VMM can throttle");
    for called in [hook::CLEAR_TRACKER, hook::THROTTLE] {
        assert!(codes.contains(&called), "{called:#x}");
    }
    let at = |code| codes.iter().position(|called| *called == code).unwrap();
    assert!(at(hook::PAUSE) < at(hook::SAVE_STATE) && at(hook::SAVE_STATE) < at(hook::RELINQUISH));
    let end = &codes[codes.len() - 3..];
    assert_eq!(end, [hook::RELINQUISH, hook::THROTTLE, hook::STOP_TRACKING]);
    let relinquish = source.hooked().last(hook::RELINQUISH);
    assert_eq!(relinquish[8..], [0; 20], "no session to recover, and no release");
    assert_eq!(source.hooked().last(hook::START_TRACKING)[8..], 1u32.to_le_bytes());
    assert_eq!(u32_at(&source.hooked().last(hook::THROTTLE), 8), 0);
    source.wait_for_event(phase::COMPLETED);
    let phases: Vec<u32> = source.hooked().events.iter().map(|event| event.phase).collect();
    assert!([3, 4, 5, 6, 7, 15].iter().all(|phase| phases.contains(phase)), "{phases:?}");

    assert_eq!(destination.hooked().codes(), [hook::LOAD_STATE, hook::RESUME]);
    assert_eq!(destination.hooked().loaded, b"helloabc");
    assert_eq!(destination.hooked().last(hook::RESUME)[8..], [0; 8], "not forced, and it runs");
    assert_eq!(destination.ram.pages()[..6], [0, 1, 0, 3, 4, 0]);
    assert!(destination.ram.is_discarded(2) && !destination.ram.is_discarded(1));
    assert!(source.paused() && !destination.paused());

    // The guest is gone from here.
    let gone = source.ask(code::POPULATE, &bodies::range(0, 2, 1), &[]).unwrap_err();
    assert_eq!(gone.0, 9, "{gone:?}");
    let again = with_options("unix:/nowhere", &outgoing());
    assert_eq!(source.ask(code::START_OUTGOING, &again, &[]).unwrap_err().0, 2);
    assert_eq!(source.ask(code::RESUME, &Body::new().u32(1), &[]).unwrap_err().0, 2);
}

#[test]
fn a_postcopy_that_lost_its_wire_is_recovered() {
    if !require::uffd() {
        return;
    }
    let pair = Pair::new();
    let Pair { source, destination, .. } = &pair;
    (1..61).for_each(|page| source.ram.write(page, page as u8));
    let wire = pair.start_postcopy();
    destination.wait_for_phase(phase::POSTCOPY);
    // The guest runs, and gets the page that it touches first.
    assert_eq!(destination.ram.touch(60), 60);
    let codes = [hook::PROBE_FAULTS, hook::REGISTER_FAULTS, hook::LOAD_STATE, hook::RESUME];
    assert_eq!(destination.hooked().codes(), codes);
    let session = source.hooked().last(hook::RELINQUISH)[8..24].to_vec();
    assert_ne!(session, [0; 16]);
    let cancelled = source.ask(code::CANCEL, &Body::new(), &[]).unwrap_err();
    assert_eq!(cancelled.0, 2, "{cancelled:?}");

    wire.cut();
    let paused = source.wait_for_phase(phase::POSTCOPY_PAUSED);
    assert!(!paused.error.is_empty() && paused.counter(REMAINING_PAGES) > 0);
    destination.wait_for_phase(phase::POSTCOPY_PAUSED);
    let body = Body::new().raw(&[0; 16]).text("").raw(&outgoing().0);
    let listens = destination.ask(code::RECOVER, &body, &[]).unwrap_err();
    assert_eq!(listens.0, 2, "{listens:?}");
    // Without force, a paused guest is recovered and not resumed.
    let resumed = source.ask(code::RESUME, &Body::new().u32(0), &[]).unwrap_err();
    assert!(resumed.0 == 2 && resumed.1.contains("recover"), "{resumed:?}");
    assert_eq!(source.start(code::RECOVER, &body, &[]), (1, String::new()));
    // The rest without a limit. The job keeps its other options.
    source.ask(code::SET_PARAMETERS, &bodies::parameters(), &[]).unwrap();
    for side in [source, destination] {
        let ended = side.end();
        assert_eq!(ended.phase, phase::COMPLETED, "{ended:?}");
    }
    assert_eq!(destination.ram.pages(), source.ram.pages());
    let unregistered = destination.hooked().last(hook::UNREGISTER_FAULTS);
    assert_eq!(unregistered[8..], 1u32.to_le_bytes(), "all memory is here");
}

#[test]
fn the_next_agent_continues_a_postcopy_of_one_that_died() {
    if !require::uffd() {
        return;
    }
    let mut pair = Pair::new();
    (1..61).for_each(|page| pair.source.ram.write(page, page as u8));
    let wire = pair.start_postcopy();
    pair.destination.wait_for_phase(phase::POSTCOPY);
    let session = pair.source.hooked().last(hook::RELINQUISH)[8..24].to_vec();
    pair.hosts[0].kill();
    pair.destination.wait_for_phase(phase::POSTCOPY_PAUSED);

    let host = Host::start();
    let next = Vmm::attach_with(&host, Arc::clone(&pair.source.ram), 2);
    let options = outgoing().with(outgoing_at::MODE, &[1]);
    let recover = |session: &[u8]| Body::new().raw(session).text(wire.address()).raw(&options.0);
    // Without the session nothing is known of it, and only the VMM may name one.
    let unknown = next.ask(code::RECOVER, &recover(&[0; 16]), &[]).unwrap_err();
    assert_eq!(unknown.0, 4, "{unknown:?}");
    let operator = ask(&host.connect(), code::RECOVER, &recover(&session), &[]).unwrap_err();
    assert_eq!(operator.0, 4, "{operator:?}");
    assert_eq!(next.start(code::RECOVER, &recover(&session), &[]).0, 1);
    for side in [&next, &pair.destination] {
        let ended = side.end();
        assert_eq!(ended.phase, phase::COMPLETED, "{ended:?}");
    }
    assert_eq!(pair.destination.ram.pages(), next.ram.pages());
    // The guest left before this agent came.
    assert_eq!(next.hooked().codes(), [hook::MEMORY_ARRIVED]);
}

#[test]
fn the_vmm_of_the_source_hears_that_all_has_arrived_before_the_destination_ends() {
    if !require::uffd() {
        return;
    }
    for instead in [Instead::Error(9, "not known here"), Instead::Silence] {
        let mut pair = Pair::new();
        (1..61).for_each(|page| pair.source.ram.write(page, page as u8));
        let is_silent = matches!(instead, Instead::Silence);
        pair.source.hooked().instead.insert(hook::MEMORY_ARRIVED, instead);
        let patience = Duration::from_secs(5).as_micros() as u64;
        let _wire = pair.start_postcopy_into(&incoming().with(0, &patience.to_le_bytes()));
        pair.source.wait_for_phase(phase::POSTCOPY);
        pair.source.ask(code::SET_PARAMETERS, &bodies::parameters(), &[]).unwrap();
        if is_silent {
            let asked =
                || pair.source.hooked().codes().contains(&hook::MEMORY_ARRIVED).then_some(());
            wait_for("the hook", SOON, asked).unwrap();
            assert_eq!(pair.destination.status().phase, phase::POSTCOPY);
            pair.hosts[0].kill();
        } else {
            // The guest is there all the same.
            assert_eq!(pair.source.end().phase, phase::COMPLETED);
        }
        // Without an answer it waits for another agent of the source, and no longer than it would
        // wait for the answer.
        let ended = pair.destination.end();
        assert_eq!(ended.phase, phase::COMPLETED, "{ended:?}");
        assert_eq!(pair.destination.ram.pages(), pair.source.ram.pages());
    }
}

#[test]
fn writes_through_the_mapping_are_scanned() {
    if !require::uffd() {
        return;
    }
    let pair = Pair::new();
    let source = &pair.source;
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    source.ask(code::SET_TRACKERS, &Body::new().u32(3), &[pagemap.as_fd()]).unwrap();
    let ended = std::thread::scope(|scope| {
        // A vCPU: it runs until the hook pauses it, and marks nothing.
        scope.spawn(|| {
            let started = Instant::now();
            for count in (1..=u8::MAX).cycle() {
                let hooked = source.hooked();
                if hooked.paused || started.elapsed() > SOON {
                    break;
                }
                source.ram.store(9, count);
                // The hook thread needs the lock, too.
                drop(hooked);
                std::thread::sleep(Duration::from_micros(10));
            }
        });
        pair.migrate(&outgoing())
    });
    assert!(ended.iter().all(|status| status.phase == phase::COMPLETED), "{ended:?}");
    assert_eq!(pair.destination.ram.pages(), source.ram.pages());
    let called = source.hooked().called.clone();
    let sources = |hook: u32| -> Vec<u32> {
        called.iter().filter(|(code, _)| *code == hook).map(|(_, body)| u32_at(body, 8)).collect()
    };
    // Each tracker has a hook of its own.
    assert_eq!(sources(hook::START_TRACKING), [1, 2]);
    assert_eq!(sources(hook::STOP_TRACKING), [1, 2]);
}

#[test]
fn a_guest_whose_destination_is_lost_is_resumed_by_force() {
    if !require::uffd() {
        return;
    }
    let pair = Pair::new();
    let source = &pair.source;
    (1..61).for_each(|page| source.ram.write(page, page as u8));
    let wire = pair.start_postcopy();
    source.wait_for_phase(phase::POSTCOPY);
    wire.limit(Some(0));
    wire.cut();
    source.wait_for_phase(phase::POSTCOPY_PAUSED);
    let force = Body::new().u32(1);
    source.hooked().instead.insert(hook::RESUME, Instead::Error(8, "not now"));
    let failed = source.ask(code::RESUME, &force, &[]).unwrap_err();
    assert!(failed.0 == 8 && failed.1.contains("not now"), "{failed:?}");
    source.hooked().instead.clear();
    source.ask(code::RESUME, &force, &[]).unwrap();
    assert_eq!(source.hooked().last(hook::RESUME)[8..], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(!source.paused());
    assert_eq!(source.status().phase, phase::FAILED);
}

/// The image that `source` saves.
fn save(source: &Vmm, host: &Host, mode: u16) -> String {
    let image = host.path("image").display().to_string();
    let started = source.start(code::START_SNAPSHOT, &with_options(&image, &snapshot(mode)), &[]);
    assert_eq!(started.1, image);
    let ended = source.end();
    assert_eq!((ended.kind, ended.phase, ended.guest), (3, phase::COMPLETED, 1), "{ended:?}");
    image
}

#[test]
fn a_paused_guest_is_saved_and_restored_for_an_operator() {
    let host = Host::start();
    let source = Vmm::with_guest(&host);
    let image = save(&source, &host, 1);
    assert_eq!(source.hooked().codes(), [hook::PAUSE, hook::SAVE_STATE, hook::RESUME]);
    source.hooked().called.clear();
    save(&source, &host, 2);
    assert_eq!(source.hooked().codes(), [hook::SAVE_STATE], "the VMM has stopped it by itself");
    drop(source);

    let next = Vmm::attach(&host);
    let operator = host.connect();
    ask(&operator, code::START_RESTORE, &with_options(&image, &restore(0)), &[]).unwrap();
    let ended = next.end();
    assert_eq!((ended.kind, ended.phase, ended.guest), (4, phase::COMPLETED, 1), "{ended:?}");
    let codes = [hook::ACCEPT_GUEST, hook::LOAD_STATE, hook::RESUME];
    assert_eq!(next.hooked().codes(), codes);
    let origin = Body::new().u32(0).text(&image);
    assert_eq!(next.hooked().last(hook::ACCEPT_GUEST)[8..], origin.0);
    assert_eq!(next.ram.pages()[..6], [0, 1, 2, 3, 4, 0]);
    // Once more for the VMM itself, which is not asked, and the guest is to stay paused.
    next.hooked().called.clear();
    let never = restore(0).with(4, &[1]);
    next.start(code::START_RESTORE, &with_options(&image, &never), &[]);
    assert_eq!(next.end().guest, 2);
    assert_eq!(next.hooked().codes(), [hook::LOAD_STATE, hook::RESUME]);
    assert_eq!(next.hooked().last(hook::RESUME)[8..], [0, 0, 0, 0, 1, 0, 0, 0]);
}

#[test]
fn a_running_guest_is_saved_and_restored_lazily() {
    if !require::uffd() {
        return;
    }
    let host = Host::start();
    let source = Vmm::with_guest(&host);
    let image = save(&source, &host, 0);
    let codes =
        [hook::WATCH_WRITES, hook::PAUSE, hook::SAVE_STATE, hook::RESUME, hook::UNWATCH_WRITES];
    assert_eq!(source.hooked().codes(), codes);
    drop(source);

    let next = Vmm::attach(&host);
    next.start(code::START_RESTORE, &with_options(&image, &restore(1)), &[]);
    let ended = next.end();
    assert_eq!(ended.phase, phase::COMPLETED, "{ended:?}");
    let codes = [
        hook::PROBE_FAULTS,
        hook::REGISTER_FAULTS,
        hook::LOAD_STATE,
        hook::RESUME,
        hook::UNREGISTER_FAULTS,
    ];
    assert_eq!(next.hooked().codes(), codes);
    assert_eq!(next.ram.touch(4), 4);
}

#[test]
fn a_vmm_that_leaves_ends_its_job_and_its_hooks() {
    let host = Host::start();
    let vmm = Vmm::with_guest(&host);
    let listen = with_options("tcp:127.0.0.1:0", &incoming());
    vmm.start(code::START_INCOMING, &listen, &[]);
    drop(vmm);
    let operator = host.connect();
    let ended = wait_for("the end of the job", SOON, || {
        Some(super::vmm::status(&operator)).filter(Status::is_final)
    });
    assert_eq!(ended.unwrap().phase, phase::CANCELLED);
    // The next VMM counts on, and starts clean.
    let next = Vmm::with_guest(&host);
    assert_eq!(next.start(code::START_INCOMING, &listen, &[]).0, 2);
    assert!((0..PAGES).all(|page| !next.ram.is_discarded(page)));
    next.ask(code::CANCEL, &Body::new(), &[]).unwrap();
    assert_eq!(u64_at(&next.ask(code::QUERY_STATUS, &Body::new(), &[]).unwrap(), 0), 2);
    next.end();
}
