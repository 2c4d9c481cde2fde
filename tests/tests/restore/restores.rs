//! What comes between while a guest is restored: discards, populates, cancels, and what the VMM
//! says of it.

use pageferry_client::{
    Error, HookError, MIN_BANDWIDTH, Ownership, Phase, Punch, RestoreMode, RestoreOptions,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::program;
use pageferry_tests::random::{Random, page_content};
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{
    PAGES, assert_completed, assert_failed, background, both, eager, lazy, slow,
};
use pageferry_tests::scenario::images::{flip, on, paused, tracked};
use pageferry_tests::scenario::{At, Guest, Host, SOON, lock};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// An image of a guest whose pages are all full.
fn image(host: &Host) -> PathBuf {
    let guest = Guest::full(host, PAGES);
    guest.saved(host, "image", &paused());
    host.images.path("image")
}

fn under_way(options: &RestoreOptions) -> Phase {
    if options.mode == RestoreMode::Lazy { Phase::Prefetching } else { Phase::Restoring }
}

#[test]
fn all_memory_is_discarded_in_the_midst_of_a_restore() {
    let host = Host::new();
    let path = image(&host);
    for options in both() {
        let guest = Guest::new(&host, PAGES);
        let job = guest.restore(&path, &slow(options.clone()));
        guest.reaches(under_way(&options));
        assert_eq!(guest.client.discard(&[guest.range(0, PAGES)], Punch::Yes).unwrap(), PAGES);
        assert!(guest.is_hole());
        guest.hurry();
        assert_completed(&guest.wait(job));
        assert_eq!((guest.vmm.resumes(), guest.losses()), (1, 0));
        let discarded = guest.client.discarded(0).unwrap();
        assert_eq!(discarded.count(discarded.all()), PAGES);
        assert!(guest.is_hole(), "{options:?}");
        // It is like any other guest.
        assert_eq!(guest.client.populate(&[guest.range(0, PAGES)]).unwrap(), PAGES);
        guest.assert_free();
        guest.fill(0..PAGES, 3);
        guest.check(&guest.saved(&host, "next", &paused()));
        std::fs::remove_file(host.images.path("next")).unwrap();
    }
}

#[test]
fn what_is_populated_while_memory_comes_is_taken_once_the_guest_runs() {
    let host = Host::new();
    let path = image(&host);
    for options in both() {
        let guest = Guest::new(&host, PAGES);
        let job = guest.restore(&path, &slow(options.clone()));
        guest.reaches(under_way(&options));
        let part = [guest.range(PAGES / 2, 100)];
        guest.client.discard(&part, Punch::Yes).unwrap();
        let populated = guest.client.populate(&part);
        let runs = options.mode == RestoreMode::Lazy;
        if runs {
            assert_eq!(populated.unwrap(), 100);
            // New memory, of which the image knows nothing.
            for page in PAGES / 2..PAGES / 2 + 100 {
                assert_eq!(guest.block().load(page * PAGE_SIZE).unwrap(), 0, "page {page:#x}");
                guest.write(page, page);
            }
        } else {
            assert!(matches!(populated, Err(Error::Refused { .. })), "{populated:?}");
        }
        guest.hurry();
        assert_completed(&guest.wait(job));
        for page in 0..PAGES {
            let found = guest.block().read_page(page).unwrap();
            if (PAGES / 2..PAGES / 2 + 100).contains(&page) {
                let word = u64::from_le_bytes(found[8..16].try_into().unwrap());
                assert_eq!(word, if runs { page } else { 0 }, "page {page:#x}");
                assert_eq!(
                    guest.client.discarded(0).unwrap().contains(page),
                    !runs,
                    "page {page:#x}"
                );
            } else {
                assert!(found == page_content(1, page), "page {page:#x}");
            }
        }
        guest.client.populate(&part).unwrap();
    }
}

#[test]
fn discards_and_populates_at_random_leave_each_page_as_the_last_one_says() {
    let host = Host::new();
    let path = image(&host);
    for options in both() {
        for seed in 0..4 {
            eprintln!("seed {seed}, {options:?}");
            let guest = Guest::new(&host, PAGES);
            let options = RestoreOptions { bandwidth: 32 << 20, ..options.clone() };
            let job = guest.restore(&path, &options);
            guest.reaches(under_way(&options));
            let mut random = Random::new(seed);
            let was_discarded = pageferry_protocol::shm::MappedBitmap::private(PAGES).unwrap();
            while !guest.client.status().unwrap().phase.is_final() {
                let first = random.below(PAGES);
                let count = random.below(40).min(PAGES - first - 1) + 1;
                if random.percent(70) {
                    guest.client.discard(&[guest.range(first, count)], Punch::Yes).unwrap();
                    was_discarded.set(PageRange::new(first, count));
                } else if guest.client.ownership() == Ownership::Ours {
                    guest.client.populate(&[guest.range(first, count)]).unwrap();
                }
            }
            assert_completed(&guest.wait(job));
            let discarded = guest.client.discarded(0).unwrap();
            for page in 0..PAGES {
                let found = guest.block().read_page(page).unwrap();
                if was_discarded.contains(page) {
                    assert!(
                        found.iter().all(|byte| *byte == 0),
                        "page {page:#x} came after its discard"
                    );
                } else {
                    assert!(
                        !discarded.contains(page) && found == page_content(1, page),
                        "page {page:#x}"
                    );
                }
                let hole = guest.block().is_hole(PageRange::new(page, 1)).unwrap();
                assert!(
                    hole || !discarded.contains(page),
                    "page {page:#x} is discarded, and allocated"
                );
            }
        }
    }
}

#[test]
fn a_restore_that_is_cancelled_leaves_nothing_and_the_next_is_complete() {
    let host = Host::new();
    let path = image(&host);
    let guest = Guest::new(&host, PAGES);
    // None of them ends by itself before the cancel, however slow the machine.
    for bandwidth in [MIN_BANDWIDTH, 1 << 20] {
        let job = guest.restore(&path, &RestoreOptions { bandwidth, ..eager() });
        guest.reaches(Phase::Restoring);
        guest.client.cancel().unwrap();
        assert_eq!(guest.wait(job).phase, Phase::Cancelled);
        assert!(guest.is_hole());
        assert_eq!((guest.vmm.resumes(), guest.client.ownership()), (0, Ownership::Awaiting));
    }
    assert_completed(&guest.restored(&path, &eager()));
    assert_eq!(guest.vmm.resumes(), 1);
    assert!((0..PAGES).all(|page| guest.block().read_page(page).unwrap() == page_content(1, page)));
    if !require::uffd() {
        return;
    }
    // Past the line.
    let job = guest.restore(&path, &slow(lazy()));
    guest.reaches(Phase::Prefetching);
    let refused = guest.client.cancel().unwrap_err().to_string();
    assert!(refused.contains("too late to cancel: the guest that is restored runs"), "{refused}");
    guest.hurry();
    assert_completed(&guest.wait(job));
    guest.assert_free();
}

fn operator(host: &Host, path: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(program());
    command
        .arg("restore")
        .arg("--socket")
        .arg(host.agent.socket())
        .arg(path)
        .args(more)
        .stdin(Stdio::null());
    command.output().unwrap()
}

/// The operator is told why, and the guest that was there runs on, and what is known of its changes
/// is as it was.
#[track_caller]
fn assert_in_vain(host: &Host, guest: &Guest, path: &Path, more: &[&str], why: &str) {
    let (before, files) = (guest.bytes(), host.images.files());
    let resumes = guest.vmm.resumes();
    guest.write(50, resumes + 1);
    let output = operator(host, path, more);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains(why), "{said}");
    assert_failed(&host.status(), &[why]);
    assert_eq!(
        (guest.client.ownership(), guest.vmm.resumes(), guest.losses()),
        (Ownership::Ours, resumes, 0)
    );
    guest.assert_free();
    guest.client.discard(&[guest.range(60, 2)], Punch::Yes).unwrap();
    guest.client.populate(&[guest.range(60, 2)]).unwrap();
    assert!(guest.bytes()[80 * PAGE_SIZE as usize..] == before[80 * PAGE_SIZE as usize..]);
    let chain = guest.saved(host, "after", &on(&host.images.path("tracked"), tracked(paused())));
    guest.check(&chain);
    drop(chain);
    // The next one is built on what this one was.
    std::fs::remove_file(host.images.path("after")).unwrap();
    std::fs::remove_file(host.images.path("tracked")).unwrap();
    guest.saved(host, "tracked", &tracked(paused()));
    assert_eq!(host.images.files(), files);
}

#[test]
fn an_operator_s_restore_that_the_vmm_does_not_want_changes_nothing() {
    let host = Host::new();
    let path = image(&host);
    let guest = Guest::full(&host, PAGES);
    guest.fill(0..PAGES, 5);
    guest.saved(&host, "tracked", &tracked(paused()));
    for more in [&[][..], &["--lazy"]] {
        assert_in_vain(&host, &guest, &path, more, "this VMM does not wait for");
    }
    guest.vmm.on(At::PrepareRestore, || Err(HookError::new("not on a Sunday")));
    for more in [&[][..], &["--lazy"]] {
        assert_in_vain(&host, &guest, &path, more, "not on a Sunday");
    }
}

#[test]
fn an_operator_s_restore_of_an_image_of_no_use_costs_nobody_a_guest() {
    let host = Host::new();
    let path = image(&host);
    let guest = Guest::full(&host, PAGES);
    guest.fill(0..PAGES, 5);
    guest.saved(&host, "tracked", &tracked(paused()));
    guest.vmm.on(At::PrepareRestore, || panic!("it would have given its guest up"));
    let length = std::fs::metadata(&path).unwrap().len();
    let copy = host.images.path("copy");
    let layout = pageferry_agent::image::Chain::open(&path).unwrap();
    let layout = layout.newest().layout();
    let places = [0, 100, layout.states(), layout.extent_sums(), layout.contents(), length - 1];
    for more in [&[][..], &["--lazy"]] {
        for place in places {
            std::fs::copy(&path, &copy).unwrap();
            flip(&copy, place, 0xff);
            assert_in_vain(&host, &guest, &copy, more, "image ");
        }
        for length in [0, 5000, length - 1] {
            std::fs::copy(&path, &copy).unwrap();
            File::options().write(true).open(&copy).unwrap().set_len(length).unwrap();
            assert_in_vain(&host, &guest, &copy, more, "truncated");
        }
        std::fs::copy(&path, &copy).unwrap();
        assert_in_vain(&host, &guest, &host.images.path("nothing"), more, "cannot open it");
    }
}

#[test]
fn an_operator_restores_a_guest_into_a_vmm_that_gives_up_its_own() {
    let host = Host::new();
    let path = image(&host);
    for options in both() {
        let guest = Guest::full(&host, PAGES);
        guest.fill(0..PAGES, 5);
        guest.saved(&host, "tracked", &tracked(paused()));
        let vmm = guest.vmm.clone();
        guest.vmm.on(At::PrepareRestore, move || {
            lock(&vmm.asked).paused = true;
            Ok(())
        });
        let more: &[&str] = if options.mode == RestoreMode::Lazy { &["--lazy"] } else { &[] };
        let output = operator(&host, &path, more);
        assert!(output.status.success(), "{output:?}");
        assert_completed(&host.status());
        assert!(
            (0..PAGES).all(|page| guest.block().read_page(page).unwrap() == page_content(1, page))
        );
        guest.assert_free();
        // Nobody knows what changed between the guest that was saved and this one.
        let increment = on(&host.images.path("tracked"), tracked(paused()));
        let status = guest.wait(guest.snapshot(&host.images.path("increment"), &increment));
        assert_failed(&status, &["a guest was restored"]);
        std::fs::remove_file(host.images.path("tracked")).unwrap();
        if require::uffd() {
            guest.check(&guest.saved(&host, "next", &background()));
            std::fs::remove_file(host.images.path("next")).unwrap();
        }
    }
}

#[test]
fn hooks_that_fail_leave_no_guest_and_the_next_restore_is_complete() {
    let host = Host::new();
    let path = image(&host);
    for options in both() {
        let guest = Guest::new(&host, PAGES);
        for at in [At::LoadState, At::MemoryPending] {
            if at == At::MemoryPending && options.mode == RestoreMode::Eager {
                continue;
            }
            guest.vmm.on(at, || Err(HookError::new("it is raining")));
            assert_failed(&guest.restored(&path, &options), &["it is raining"]);
            assert!(guest.is_hole());
            assert_eq!((guest.vmm.resumes(), guest.losses()), (0, 0));
            guest.vmm.off(at);
        }
        assert_completed(&guest.restored(&path, &options));
        let same = |page| guest.block().read_page(page).unwrap() == page_content(1, page);
        assert!((0..PAGES).all(same));
        wait_until("the guest to run", SOON, || guest.vmm.resumes() == 1).unwrap();
        guest.assert_free();
    }
}
