// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The commands `pageferry image import` and `export`.

use crate::image::{good, keys, object, refused, run, text};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::wait_for;
use pageferry_tests::process::{AgentProcess, Process, mock_vmm, program};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PAGE: usize = PAGE_SIZE as usize;
const GIB: u64 = 1 << 30;

/// A sparse file of `length` bytes. These pages, by their offsets, are filled with these bytes.
fn write(folder: &Path, name: &str, length: u64, pages: &[(u64, u8)]) {
    let file = File::create(folder.join(name)).unwrap();
    file.set_len(length).unwrap();
    pages.iter().for_each(|(at, byte)| file.write_all_at(&[*byte; PAGE], *at).unwrap());
}

/// True if the page at this offset is filled with `byte`.
fn is_filled(folder: &Path, name: &str, at: u64, byte: u8) -> bool {
    let mut page = [!byte; PAGE];
    File::open(folder.join(name)).unwrap().read_exact_at(&mut page, at).unwrap();
    page == [byte; PAGE]
}

/// The blocks of an image: id, name, address, length.
fn blocks(shown: &Value) -> Vec<(u64, String, u64, u64)> {
    let number = |block: &Value, name: &str| block[name].as_u64().unwrap();
    let block = |block: &Value| {
        let name = block["name"].as_str().unwrap().to_owned();
        (number(block, "id"), name, number(block, "gpa"), number(block, "length"))
    };
    shown["blocks"].as_array().unwrap().iter().map(block).collect()
}

#[test]
fn a_memory_file_of_firecracker_is_sealed_in_an_image_and_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    keys(folder);
    let length = 3 * GIB + 3 * PAGE_SIZE;
    let pages = [(0, 1), (5 * PAGE_SIZE, 0), (3 * GIB - PAGE_SIZE, 2), (3 * GIB, 3)];
    write(folder, "vm.mem", length, &pages);
    std::fs::write(folder.join("vm.state"), "opaque").unwrap();
    let layout = ["--layout", "firecracker", "--state", "vmstate=vm.state"];
    let files = ["vm.mem", "vm.img", "--key", "old.key", "--json"];
    let imported = object(folder, &[&["import"], &layout[..], &files].concat());
    assert_eq!(
        ["status", "sealed", "blocks", "present_pages"].map(|name| &imported[name]),
        [&json!("imported"), &json!(true), &json!(2), &json!(3)]
    );
    assert_eq!(imported["zero_pages"], json!(length / PAGE_SIZE - 3));
    let shown = object(folder, &["info", "vm.img", "--key", "old.key", "--json"]);
    assert_eq!(shown["id"], imported["id"]);
    assert_eq!(
        blocks(&shown),
        [(0, "ram0".into(), 0, 3 * GIB), (1, "ram1".into(), 4 * GIB, 3 * PAGE_SIZE)]
    );
    assert_eq!(shown["state"], json!([{ "name": "vmstate", "bytes": 6 }]));
    let verified = good(folder, &["verify", "vm.img", "--key", "old.key"]);
    assert!(verified.starts_with("no errors: 1 image, 3 pages"), "{verified}");

    let error = refused(folder, &["export", "vm.img", "back.mem"]);
    assert!(error.contains("can be used only with its key"), "{error}");
    let state = ["--state", "vmstate=back.state", "--key", "old.key"];
    let exported = good(folder, &[&["export", "vm.img", "back.mem"], &state[..]].concat());
    assert!(
        exported.starts_with("exported 1 image to ")
            && exported.ends_with("back.mem: 3.0 GiB, content 12.0 KiB\n"),
        "{exported}"
    );
    assert_eq!(std::fs::read(folder.join("back.state")).unwrap(), b"opaque");
    for (at, byte) in pages.into_iter().chain([(3 * GIB + PAGE_SIZE, 0), (PAGE_SIZE, 0)]) {
        assert!(is_filled(folder, "back.mem", at, byte), "{at:#x}");
    }
    let written = std::fs::metadata(folder.join("back.mem")).unwrap();
    assert_eq!(written.len(), length);
    assert!(written.blocks() * 512 <= 64 << 10, "{} sectors", written.blocks());
}

#[test]
fn the_ranges_of_cloud_hypervisor_come_from_its_state_json() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (low, high) = (16 * PAGE_SIZE, 600 * PAGE_SIZE);
    // The zones are in no order, and the upper one comes first here.
    let slot = |slot: u32, gpa: u64, size: u64, zone: &str| json!({ "slot": slot, "gpa": gpa, "size": size, "zone_id": zone, "virtio_mem": false, "file_offset": 0 });
    let memory = json!({
        "memory_ranges": { "data": [
            { "gpa": 4 * GIB, "length": high }, { "gpa": 0, "length": low },
        ]},
        "guest_ram_mappings": [slot(0, 0, low, "mem0"), slot(1, 4 * GIB, high, "mem1")],
    });
    let manager = json!({ "snapshots": {}, "snapshot_data": { "state": memory.to_string() } });
    let tree = json!({ "snapshots": { "memory-manager": manager }, "snapshot_data": null });
    std::fs::write(folder.join("state.json"), tree.to_string()).unwrap();
    write(folder, "memory-ranges", low + high, &[(0, 1), (high - PAGE_SIZE, 2), (high, 3)]);
    let layout = ["--cloud-hypervisor", "state.json"];
    let state = ["--state", "state.json=state.json"];
    let said =
        good(folder, &[&["import"], &layout[..], &state, &["memory-ranges", "vm.img"]].concat());
    assert!(said.starts_with("imported 2 blocks into "), "{said}");
    let shown = object(folder, &["info", "vm.img", "--json"]);
    assert_eq!(blocks(&shown), [(0, "mem0.0".into(), 0, low), (1, "mem1.1".into(), 4 * GIB, high)]);
    // By default in the order of the addresses, and with its layout as it was.
    good(folder, &["export", "vm.img", "sorted"]);
    for (at, byte) in [(0, 3), (low, 1), (low + high - PAGE_SIZE, 2)] {
        assert!(is_filled(folder, "sorted", at, byte), "{at:#x}");
    }
    good(folder, &[&["export", "vm.img", "back"], &layout[..]].concat());
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    assert!(read("back") == read("memory-ranges"));

    std::fs::write(folder.join("config.json"), "{}").unwrap();
    let other = ["import", "--cloud-hypervisor", "config.json", "memory-ranges", "new.img"];
    let error = refused(folder, &other);
    assert!(
        error.contains("--cloud-hypervisor config.json: it has no snapshots.memory"),
        "{error}"
    );
}

#[test]
fn blocks_of_any_layout_are_imported_and_later_files_are_like_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write(folder, "qemu.ram", 5 * PAGE_SIZE, &[(0, 1), (2 * PAGE_SIZE, 2)]);
    let low = "0:pc.ram=0+8K@12K";
    let blocks_of = |more: &[&'static str]| [&["import", "--block", low], more].concat();
    let import = blocks_of(&["--block", "4096:high=4G+12K@0", "qemu.ram", "one.img"]);
    good(folder, &[&import[..], &["--granularity", "2M"]].concat());
    let shown = object(folder, &["info", "one.img", "--json"]);
    assert_eq!(
        blocks(&shown),
        [(0, "pc.ram".into(), 0, 8 << 10), (4096, "high".into(), 4 * GIB, 12 << 10)]
    );
    assert_eq!(shown["blocks"][0]["granularity"], json!(2 << 20));
    // The blocks are in the order of their addresses: page 0 is now one of the first block.
    good(folder, &["import", "--like", "one.img", "qemu.ram", "two.img"]);
    let like = object(folder, &["info", "two.img", "--json"]);
    let counts = |shown: &Value| [0, 1].map(|at| shown["blocks"][at]["present_pages"].clone());
    assert_eq!((blocks(&like), counts(&like)), (blocks(&shown), [json!(1), json!(1)]));
    assert_eq!(counts(&shown), [json!(0), json!(2)]);
    good(folder, &["export", "one.img", "high.ram", "--block", "any=4G+12K"]);
    assert_eq!(std::fs::metadata(folder.join("high.ram")).unwrap().len(), 3 * PAGE_SIZE);
    assert!(is_filled(folder, "high.ram", 2 * PAGE_SIZE, 2));
}

#[test]
fn what_does_not_fit_is_refused_with_the_file_and_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write(folder, "vm.mem", 4 * PAGE_SIZE, &[(0, 1)]);
    write(folder, "odd.mem", 4 * PAGE_SIZE + 1, &[]);
    let block = |block: &'static str| ["import", "--block", block, "vm.mem", "vm.img"];
    let layout = |file: &'static str| ["import", "--layout", "firecracker", file, "vm.img"];
    for (arguments, expected) in [
        (layout("odd.mem"), "odd.mem: the file has 0x4001 bytes, but memory has a multiple of"),
        (layout("gone.mem"), "gone.mem: cannot open it: No such file"),
        (layout("."), "it is not a regular file"),
        (block("ram=0+8K"), "vm.mem: the file has 0x4000 bytes, but this layout needs exactly"),
        (block("ram=1+16K"), "vm.mem: block 0: gpa 0x1 is not a multiple"),
        (block("ram=0+16K@1"), "vm.mem: memory 0x0 + 0x4000 at byte 0x1: address, length"),
        (block("=0+16K"), "vm.mem: block 0: name of 0 bytes"),
    ] {
        let error = refused(folder, &arguments);
        assert!(error.contains(expected), "{error}");
    }
    let overlap = ["import", "--block", "a=0+8K", "--block", "b=4K+8K", "vm.mem", "vm.img"];
    let error = refused(folder, &overlap);
    assert!(error.contains("vm.mem: block 1: 0x1000 + 0x2000 overlaps block 0"), "{error}");
    for wrong in [
        &["import", "vm.mem", "vm.img"][..],
        &["import", "--layout", "qemu", "vm.mem", "vm.img"],
        &["import", "--layout", "raw", "--block", "a=0+16K", "vm.mem", "vm.img"],
    ] {
        assert_eq!(run(folder, wrong).status.code(), Some(2), "{wrong:?}");
    }
    assert!(!folder.join("vm.img").exists());

    good(folder, &layout("vm.mem"));
    assert!(refused(folder, &layout("vm.mem")).contains("vm.img: the file exists"));
    good(folder, &[&layout("vm.mem")[..], &["--replace"]].concat());
    let onto_itself = ["import", "--layout", "raw", "vm.mem", "vm.mem", "--replace"];
    assert!(refused(folder, &onto_itself).contains("the file is not an image"));
    let error = refused(folder, &["export", "vm.img", "vm.img", "--replace"]);
    assert!(error.contains("vm.img: the file is not a memory file of the same length"), "{error}");
    let error = refused(folder, &["export", "vm.img", "vm.mem"]);
    assert!(error.contains("memory file") && error.contains("the file exists"), "{error}");
    good(folder, &["export", "vm.img", "vm.mem", "--replace"]);
    let error = refused(folder, &["export", "vm.img", "new.mem", "--state", "cpu=cpu.state"]);
    assert!(error.contains("the image has no such state, but: none"), "{error}");
    assert!(!folder.join("new.mem").exists());
}

#[test]
fn a_vmm_gets_the_memory_of_an_imported_file() {
    const SIZE: u64 = 8 << 20;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write(folder, "vm.mem", SIZE, &[(0, 1), (3 << 20, 2), (SIZE - PAGE_SIZE, 3)]);
    let size = format!("ram=0+{SIZE}");
    good(folder, &["import", "--block", &size, "vm.mem", "vm.img"]);
    write(folder, "guest", SIZE, &[(PAGE_SIZE, 9)]);
    let agent = AgentProcess::spawn(program(), folder, "agent").unwrap();
    let mut vmm = mock_vmm("destination", SIZE, agent.socket(), &folder.join("guest"));
    let _vmm = Process::spawn("vmm", &mut vmm).unwrap();
    let socket = agent.socket().to_str().unwrap();
    let command = |arguments: &[&str]| {
        Command::new(program()).args(arguments).current_dir(folder).output().unwrap()
    };
    let is_there = || command(&["status", "--socket", socket]).stdout;
    let attached = || text(&is_there()).contains("in 1 block").then_some(());
    wait_for("a VMM", Duration::from_secs(20), attached).unwrap();
    let restored = command(&["restore", "--socket", socket, "vm.img"]);
    assert!(restored.status.success(), "{restored:?}");
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    assert!(read("guest") == read("vm.mem"));
}
