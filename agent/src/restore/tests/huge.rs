use super::*;

/// Pages of a host page.
const UNIT: u64 = 512;

/// One page in each second host page, and all of the last.
fn thin(_: u32, page: u64) -> Page {
    match page {
        page if page >= 7 * UNIT => Page::Content,
        page if page % (2 * UNIT) == 77 => Page::Content,
        page if page % (2 * UNIT) >= UNIT => Page::Discarded,
        _ => Page::Zero,
    }
}

#[test]
fn host_pages_come_whole_and_only_those_with_content() {
    if !has_userfaultfd() {
        return;
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let free = || std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free = || free().ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
    if free() < 16 {
        assert!(!std::env::var("PAGEFERRY_REQUIRE").unwrap_or_default().contains("hugetlb"), "no huge pages");
        eprintln!("skipped: 16 huge pages are to be free");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let geometries = geometries(&[8 * UNIT]);
    write_image(&path, &geometries, &Base::default(), 0, thin);
    for mode in [RestoreMode::Eager, RestoreMode::Lazy] {
        let ram = Arc::new(Ram::of(&geometries, flags));
        let vmm = Vmm::new(&ram, |ram, hook| {
            if matches!(hook, Hook::LoadState { .. }) {
                assert_eq!((ram.touch(0, 77), ram.touch(0, 78)), (word_of(0, 77), 0));
            }
            Ok(())
        });
        let status = restore_from(&path, &ram, &vmm, RestoreOptions { mode, ..RestoreOptions::default() });
        assert_eq!((status.phase, status.error.as_str()), (Phase::Completed, ""));
        // All but three of the eight have a page with content.
        let stat = rustix::fs::fstat(ram.block(0).backing.fd()).unwrap();
        assert_eq!(stat.st_blocks as u64 * 512, 5 * UNIT * PAGE_SIZE, "{mode:?}");
        let mut bytes = [0; PAGE];
        for page in 0..8 * UNIT {
            ram.block(0).backing.read(page * PAGE_SIZE, &mut bytes).unwrap();
            let word = if thin(0, page) == Page::Content { word_of(0, page) } else { 0 };
            assert!(bytes.chunks(8).all(|bytes| bytes == word.to_le_bytes()), "{mode:?}: page {page}");
            assert_eq!(ram.block(0).discarded.contains(page), thin(0, page) == Page::Discarded);
        }
    }
}
