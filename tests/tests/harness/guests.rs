// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests of threads migrate with devices, a balloon and a plugged memory device, and survive hooks
//! that fail.

use pageferry_client::{IncomingOptions, NonConvergence, OutgoingOptions, Phase, Punch};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::balloon::{Balloon, Way};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::device::Device;
use pageferry_tests::guest::threads::{Pattern, ThreadGuest, ThreadGuestOptions};
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::plug::Plug;
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::usage::Path;
use pageferry_tests::verify::same_memory;
use pageferry_tests::vmm::{Fault, HookName, PATIENCE, Tracker};
use std::sync::Arc;
use std::time::{Duration, Instant};

const UNIT: u64 = 2 << 20;
const HOTPLUG: u32 = 5;

/// Two blocks at odd places, and one whose memory is plugged in units.
fn memory() -> Arc<TestMemory> {
    let ram = BlockLayout { fd_offset: 0x7000, ..BlockLayout::ram(8 << 20) };
    let high =
        BlockLayout { id: 3, name: "high".into(), gpa: 1 << 32, ..BlockLayout::ram(4 << 20) };
    let hotplug = BlockLayout {
        id: HOTPLUG,
        name: "hotplug".into(),
        gpa: 1 << 33,
        granularity: UNIT,
        discarded: true,
        ..BlockLayout::ram(16 << 20)
    };
    Arc::new(TestMemory::new(vec![ram, high, hotplug]).unwrap())
}

/// A VMM with a guest of threads and a device.
fn side(guest: ThreadGuestOptions, device_rate: u64, write_protect: bool) -> MockSide {
    let tracker = if write_protect { Tracker::WriteProtect } else { Tracker::Log };
    let mock = MockSide::over(memory(), tracker);
    let usage = mock.vmm.usage();
    mock.vmm.set_guest(ThreadGuest::new(usage, guest).unwrap());
    mock.vmm.add_device(Device::new(usage, "disk", device_rate, 5).unwrap());
    mock
}

/// A VMM whose guest takes over the counts but writes nothing, so that both memories can be
/// compared.
fn destination() -> MockSide {
    side(ThreadGuestOptions { rate: Some(0), ..ThreadGuestOptions::default() }, 0, false)
}

fn busy(path: Path) -> ThreadGuestOptions {
    let pattern = Pattern::Hot { pages_percent: 10, writes_percent: 80 };
    ThreadGuestOptions {
        threads: 3,
        rate: Some(5_000),
        pattern,
        path,
        ..ThreadGuestOptions::default()
    }
}

/// The timeout for a hook that hangs. It is longer than a busy machine needs for a good hook.
fn hasty() -> OutgoingOptions {
    OutgoingOptions { hook_timeout: Duration::from_secs(5), ..OutgoingOptions::default() }
}

/// Migrates while `meanwhile` is called repeatedly, and checks the result.
fn migrate(source: &MockSide, options: &OutgoingOptions, mut meanwhile: impl FnMut()) {
    let destination = destination();
    let [job, _] = source.start_move(&destination, options);
    let started = Instant::now();
    let status = loop {
        let status = source.vmm.client().status().unwrap();
        assert_eq!(status.job, job);
        if status.phase.is_final() {
            break status;
        }
        assert!(started.elapsed() < PATIENCE, "{status:?}");
        meanwhile();
    };
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    let there = destination.vmm.record();
    assert!(there.runs && there.words_checked > 0);
    assert!(!source.vmm.record().runs);
    source.vmm.stop().unwrap();
    same_memory(source.vmm.memory(), source.vmm.client(), destination.vmm.memory()).unwrap();
    assert_eq!(source.vmm.usage().check().unwrap(), there.words_checked);
}

fn with_balloon_and_plug(path: Path, write_protect: bool, punch: Punch, seed: u64) {
    let source = side(busy(path), 500, write_protect);
    let (client, usage) = (source.vmm.client().clone(), source.vmm.usage().clone());
    let mut balloon = Balloon::new(client.clone(), usage.clone(), Way::Discard(punch), seed);
    let mut freeing = Balloon::new(client.clone(), usage.clone(), Way::Free, seed + 100);
    let mut plug = Plug::new(client, usage.clone(), HOTPLUG, UNIT).unwrap();
    for unit in 0..4 {
        assert!(plug.plug(unit).unwrap());
    }
    source.vmm.start().unwrap();
    let block = usage.memory().block(HOTPLUG).unwrap();
    wait_until("writes into plugged memory", PATIENCE, || {
        block.allocated().unwrap() > 20 * PAGE_SIZE
    })
    .unwrap();
    assert!(balloon.inflate(20, 30).unwrap() > 0 && freeing.inflate(20, 30).unwrap() > 0);

    let mut step = 0;
    // The balloon dirties more than the bandwidth allows, so stop after some passes.
    let (max_passes, policy) = (6, NonConvergence::StopAnyway);
    let options = OutgoingOptions {
        streams: 3,
        bandwidth: 20 << 20,
        max_passes,
        policy,
        ..OutgoingOptions::default()
    };
    migrate(&source, &options, || {
        step += 1;
        balloon.inflate(3, 20).unwrap();
        balloon.deflate(3).unwrap();
        freeing.inflate(3, 20).unwrap();
        freeing.deflate(3).unwrap();
        match step % 20 {
            5 => drop(plug.unplug(2).unwrap()),
            15 => drop(plug.plug(2).unwrap()),
            _ => {}
        }
    });
    assert!(step > 5, "only {step} steps happened during the migration");
}

#[test]
fn a_guest_with_a_balloon_arrives_by_the_log() {
    with_balloon_and_plug(Path::MappingAndLog, false, Punch::Yes, 1);
}

#[test]
fn a_guest_with_a_balloon_that_does_not_punch_arrives() {
    with_balloon_and_plug(Path::MappingAndLog, false, Punch::No, 2);
}

#[test]
fn a_guest_with_a_balloon_arrives_by_write_protection() {
    if require::uffd() {
        with_balloon_and_plug(Path::Mapping, true, Punch::Yes, 3);
    }
}

#[test]
fn a_bad_hook_ends_the_migration_but_not_the_guest() {
    let source = side(busy(Path::MappingAndLog), 100, false);
    source.vmm.start().unwrap();
    for hook in [HookName::Pause, HookName::SaveState] {
        for fault in [Fault::Fail("not today".into()), Fault::Never] {
            let destination = destination();
            let (_, address) = destination
                .vmm
                .start_incoming("tcp:127.0.0.1:0", &IncomingOptions::default())
                .unwrap();
            source.vmm.inject(hook, Some(fault.clone()));
            let job = source.vmm.start_outgoing(&address, &hasty()).unwrap();
            let status = source.vmm.wait_job(job, PATIENCE).unwrap();
            assert_eq!(status.phase, Phase::Failed, "{hook:?} {fault:?}");
            if matches!(fault, Fault::Fail(_)) {
                assert!(status.error_text().contains("not today"), "{}", status.error_text());
            }
            source.vmm.inject(hook, None);
            wait_until("the guest running", PATIENCE, || source.vmm.record().runs).unwrap();
            assert!(!destination.vmm.record().runs);
        }
    }
    migrate(&source, &OutgoingOptions::default(), || {});
}

#[test]
fn state_that_does_not_load_leaves_the_guest_at_the_source() {
    let source = side(busy(Path::MappingAndLog), 100, false);
    source.vmm.start().unwrap();
    let destination = destination();
    destination.vmm.inject(HookName::LoadState, Some(Fault::Fail("no such device".into())));
    let (there, address) = destination.listen(&IncomingOptions::default());
    let job = source.vmm.start_outgoing(&address, &OutgoingOptions::default()).unwrap();
    let status = source.vmm.wait_job(job, PATIENCE).unwrap();
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error_text().contains("no such device"), "{}", status.error_text());
    assert_eq!(destination.vmm.wait_job(there, PATIENCE).unwrap().phase, Phase::Failed);
    wait_until("the guest running", PATIENCE, || source.vmm.record().runs).unwrap();
    assert!(!destination.vmm.record().runs);
    migrate(&source, &OutgoingOptions::default(), || {});
}
