// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command `pageferry image`: info, verify, merge and map.

use pageferry_agent::image::writer::{Base, ImageMetadata};
use pageferry_agent::image::{Chain, Image, ImageWriter};
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::image::{ImageId, id_text};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_tests::process::program;
use pageferry_tests::scenario::images::flip;
use serde_json::{Value, json};
use std::fs::Permissions;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

const PAGES: u64 = 1024;

/// An image of one block. These pages have content, and the last 24 are discarded. With a base it
/// is an increment.
fn write(folder: &Path, name: &str, content: PageRange, base: &Base) -> ImageId {
    let mut table = BlockTable::new();
    let (length, granularity) = (PAGES * PAGE_SIZE, PAGE_SIZE);
    table
        .insert(BlockGeometry { id: 3, name: "ram".into(), gpa: 1 << 30, length, granularity }, 512)
        .unwrap();
    let writer = ImageWriter::create(&folder.join(name), &table, false, false).unwrap();
    writer.put(0, content, &mut vec![7; content.bytes() as usize]).unwrap();
    let (discarded, changed) =
        (MappedBitmap::private(PAGES).unwrap(), MappedBitmap::private(PAGES).unwrap());
    discarded.set(PageRange::new(PAGES - 24, 24));
    changed.set(content);
    let changed = [changed];
    let rest = ImageMetadata {
        guest: RunState::Running,
        discarded: &[discarded],
        changed: (base.id != ImageId::default()).then_some(&changed[..]),
    };
    let state = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&state, b"state").unwrap();
    let id = writer.id();
    let pieces = vec![PieceSize { name: "vcpu\x1b[31m".into(), length: 5 }];
    writer.finish(rest, base, pieces, Some(state.as_fd())).unwrap();
    id
}

/// An increment of 8 pages, on a full image with 16 other pages.
fn chain(folder: &Path) -> [ImageId; 2] {
    let base = write(folder, "monday.img", PageRange::new(100, 16), &Base::default());
    [
        base,
        write(
            folder,
            "tuesday.img",
            PageRange::new(0, 8),
            &Base { id: base, name: "monday.img".into() },
        ),
    ]
}

/// Writes keys into the folder: `old.key`, `new.key`, and `open.key` that others may read.
pub fn keys(folder: &Path) {
    for (name, byte, mode) in [("old", "1f", 0o600), ("new", "2f", 0o400), ("open", "3f", 0o640)] {
        let path = folder.join(format!("{name}.key"));
        std::fs::write(&path, byte.repeat(32)).unwrap();
        // Root's group may read the key of root.
        let mode = if mode == 0o640 && rustix::process::geteuid().is_root() { 0o644 } else { mode };
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    }
}

#[test]
fn an_image_is_sealed_and_gets_another_key_by_a_merge() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let [_, id] = chain(folder);
    keys(folder);
    let tuesday = "tuesday.img";
    let merged = good(folder, &["merge", tuesday, "--new-key", "old.key", "--into", "sealed.img"]);
    assert!(merged.starts_with("merged 2 images into"), "{merged}");
    let without = refused(folder, &["verify", "sealed.img"]);
    assert!(without.contains("it is sealed, and can be used only with its key"), "{without}");
    let said = good(folder, &["verify", "sealed.img", "--key", "old.key"]);
    assert!(said.starts_with("no errors: 1 image, 24 pages"), "{said}");
    let rotate = ["merge", "sealed.img", "--key", "old.key", "--new-key", "new.key", "--json"];
    let into = [&rotate[..], &["--into", "sealed.img", "--replace"]].concat();
    let merged = object(folder, &into);
    assert_eq!((&merged["id"], &merged["sealed"]), (&json!(id_text(&id)), &json!(true)));
    let wrong = refused(folder, &["map", "sealed.img", "--key", "old.key"]);
    assert!(wrong.contains("the key does not fit this image"), "{wrong}");
    assert!(good(folder, &["map", "sealed.img", "--key", "new.key"]).contains("block 3 ram"));
    let shown = object(folder, &["info", "sealed.img", "--key", "new.key", "--json"]);
    assert_eq!((&shown["sealed"], &shown["features"]), (&json!(true), &json!(1)));
    assert_eq!(shown["present_pages"], json!(24));
    let plain = refused(folder, &["info", tuesday, "--key", "new.key"]);
    assert!(plain.contains("it is not sealed, so anybody may have made it"), "{plain}");
    let open = refused(folder, &["info", "sealed.img", "--key", "open.key"]);
    assert!(open.contains("--key open.key: it has mode 6"), "{open}");
}

#[test]
fn the_header_of_a_sealed_image_is_shown_without_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let [_, id] = chain(folder);
    keys(folder);
    good(folder, &["merge", "tuesday.img", "--new-key", "old.key", "--into", "sealed.img"]);
    let output = run(folder, &["info", "sealed.img"]);
    let (shown, said) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("it is sealed, and can be used only with its key"), "{said}");
    assert!(shown.contains("sealed             yes\n") && shown.contains(&id_text(&id)), "{shown}");
    assert!(!shown.contains("block"), "{shown}");
    let output = run(folder, &["info", "sealed.img", "--json"]);
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&shown["sealed"], &shown["id"]), (&json!(true), &json!(id_text(&id))));
    assert!(shown["taken_utc"].is_string() && shown["file_bytes"].is_number());
    assert!(shown["error"].as_str().unwrap().contains("it is sealed"), "{shown}");
    assert_eq!(shown["blocks"], Value::Null);
}

/// Runs the command in the folder, so that the names are relative.
pub fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(program()).arg("image").args(arguments).current_dir(folder).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

pub fn good(folder: &Path, arguments: &[&str]) -> String {
    let output = run(folder, arguments);
    assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    text(&output.stdout)
}

pub fn object(folder: &Path, arguments: &[&str]) -> Value {
    serde_json::from_str(&good(folder, arguments)).unwrap()
}

/// The error of a command that fails.
pub fn refused(folder: &Path, arguments: &[&str]) -> String {
    let output = run(folder, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
    let error = text(&output.stderr);
    assert!(
        error.starts_with("pageferry: ") && error.lines().count() == 1,
        "{arguments:?}: {error}"
    );
    error
}

#[test]
fn an_image_is_shown_with_all_that_it_builds_on() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let [base, id] = chain(folder);
    let shown = object(folder, &["info", "tuesday.img", "--json"]);
    assert_eq!(shown["id"], json!(id_text(&id)));
    assert_eq!(shown["base"]["id"], json!(id_text(&base)));
    assert_eq!(shown["chain"][1]["path"], json!(folder.join("monday.img").to_str().unwrap()));
    let counts = |value: &Value| {
        ["present", "zero", "discarded", "unchanged"]
            .map(|name| value[format!("{name}_pages")].as_u64().unwrap())
    };
    assert_eq!(counts(&shown["blocks"][0]), [8, 0, 24, 992]);
    assert_eq!((counts(&shown), counts(&shown["chain"][1])), ([8, 0, 24, 992], [16, 984, 24, 0]));
    assert_eq!((&shown["state"][0]["bytes"], &shown["error"]), (&json!(5), &Value::Null));
    let disk = shown["disk_bytes"].as_u64().unwrap();
    assert!(disk < shown["file_bytes"].as_u64().unwrap() / 4, "{shown}");

    let shown = good(folder, &["info", "tuesday.img"]);
    for line in [
        format!("id                 {}", id_text(&id)),
        format!("base               {} monday.img", id_text(&base)),
        "block 3            ram, gpa 0x40000000 + 0x400000 (4.0 MiB), discards of 4.0 KiB".into(),
        "  changed          8 pages (32.0 KiB)".into(),
        "state of the VMM   5 B, 1 piece".into(),
        // Text from a file must not control the terminal.
        "                   vcpu\\u{1b}[31m (5 B)".into(),
        format!(
            "builds on          {}, id {}",
            folder.join("monday.img").display(),
            id_text(&base)
        ),
    ] {
        assert!(shown.lines().any(|found| found == line), "{line}:\n{shown}");
    }

    std::fs::remove_file(folder.join("monday.img")).unwrap();
    let output = run(folder, &["info", "tuesday.img", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(shown["error"].as_str().unwrap().contains("monday.img: cannot open it"), "{shown}");
    assert!(
        refused(folder, &["info", "nothing.img"])
            .contains("nothing.img: cannot open it: No such file")
    );
}

#[test]
fn an_image_is_good_or_each_place_that_is_not_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    chain(folder);
    assert_eq!(
        good(folder, &["verify", "tuesday.img"]),
        "no errors: 2 images, 24 pages with content (96.0 KiB)\n"
    );
    let report = object(folder, &["verify", "tuesday.img", "--json", "--threads", "1"]);
    assert_eq!(
        (&report["status"], &report["pages"], &report["errors"]),
        (&json!("good"), &json!(24), &json!([]))
    );
    let layout = Image::open(&folder.join("monday.img")).unwrap().layout().clone();
    let places = [layout.page(0, 90), layout.page(0, 101), layout.page(0, 115)];
    places.into_iter().for_each(|at| flip(&folder.join("monday.img"), at, 0xff));
    let error = refused(folder, &["verify", "tuesday.img"]);
    assert!(
        error.contains("monday.img: block 3: page 0x") && error.ends_with("the image is damaged\n"),
        "{error}"
    );

    let output = run(folder, &["verify", "tuesday.img", "--all"]);
    assert_eq!((output.status.code(), output.stdout), (Some(1), vec![]));
    let errors = text(&output.stderr);
    assert_eq!(errors.lines().count(), 3, "{errors}");
    for (line, place) in errors.lines().zip(places) {
        assert!(line.contains(&format!("at byte {place:#x}")), "{errors}");
    }
    let output = run(folder, &["verify", "tuesday.img", "--all", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&report["status"], report["errors"].as_array().unwrap().len()),
        (&json!("damaged"), 3)
    );
}

#[test]
fn what_cannot_be_read_is_not_called_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    chain(folder);
    std::fs::rename(folder.join("monday.img"), folder.join("moved.img")).unwrap();
    let status = |image: &str| {
        let output = run(folder, &["verify", image, "--all", "--json"]);
        assert_eq!(output.status.code(), Some(1));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["status"].clone()
    };
    // A wrong name, a folder, and an image whose base is gone.
    for image in ["mist.img", ".", "tuesday.img"] {
        assert_eq!(status(image), json!("unreadable"), "{image}");
    }
    let place = Image::open_contents(&folder.join("tuesday.img"), None).unwrap().layout().states();
    flip(&folder.join("tuesday.img"), place, 0xff);
    assert_eq!(status("tuesday.img"), json!("damaged"));
}

#[test]
fn a_chain_is_folded_in_place_and_what_builds_on_it_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let [_, id] = chain(folder);
    write(folder, "wednesday.img", PageRange::new(4, 8), &Base { id, name: "tuesday.img".into() });
    let error = refused(folder, &["merge", "tuesday.img", "--into", "tuesday.img"]);
    assert!(error.contains("the file exists"), "{error}");
    let merged =
        object(folder, &["merge", "tuesday.img", "--into", "tuesday.img", "--replace", "--json"]);
    let found = ["status", "id", "images", "present_pages", "discarded_pages"]
        .map(|name| merged[name].clone());
    assert_eq!(found, [json!("merged"), json!(id_text(&id)), json!(2), json!(24), json!(24)]);
    std::fs::remove_file(folder.join("monday.img")).unwrap();
    assert!(good(folder, &["verify", "wednesday.img"]).starts_with("no errors: 2 images"));
    let chain = Chain::open(&folder.join("wednesday.img")).unwrap();
    assert_eq!(chain.present(0).count(chain.present(0).all()), 12 + 16);
    assert!(
        good(folder, &["merge", "wednesday.img", "--into", "whole.img"])
            .starts_with("merged 2 images into ")
    );
}

#[test]
fn a_map_is_drawn_in_letters_without_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    chain(folder);
    let drawn = good(folder, &["map", "tuesday.img", "--width", "64", "--height", "1"]);
    let lines: Vec<&str> = drawn.lines().collect();
    assert_eq!(lines[0], "# changed   + some changed   . zero   - discarded   = as in the base");
    assert!(
        lines[2].starts_with("block 3 ram, 4.0 MiB, a cell is 64.0 KiB: changed 0.8 %"),
        "{drawn}"
    );
    assert_eq!(lines[3], format!("0x00000040000000  #{}--", "=".repeat(61)));
    let drawn = good(folder, &["map", "tuesday.img", "--whole", "--width", "64", "--height", "1"]);
    assert_eq!(
        drawn.lines().last().unwrap(),
        format!("0x00000040000000  #.....#+{}-", ".".repeat(55))
    );
    let map = object(folder, &["map", "tuesday.img", "--width", "4", "--height", "1", "--json"]);
    let cells = json!([[8, 0, 0, 248], [0, 0, 0, 256], [0, 0, 0, 256], [0, 0, 24, 232]]);
    assert_eq!(
        (&map["blocks"][0]["pages_per_cell"], &map["blocks"][0]["cells"]),
        (&json!(256), &cells)
    );

    good(folder, &["map", "tuesday.img", "--png", "tuesday.png"]);
    assert!(std::fs::read(folder.join("tuesday.png")).unwrap().starts_with(b"\x89PNG\r\n\x1a\n"));
    assert!(
        refused(folder, &["map", "monday.img", "--png", "tuesday.png"]).contains("the file exists")
    );
    let map = object(folder, &["map", "monday.img", "--png", "tuesday.png", "--replace", "--json"]);
    assert_eq!(
        (&map["picture"]["width"], &map["picture"]["pages_per_pixel"]),
        (&json!(32), &json!(1))
    );
}

#[test]
fn files_of_another_kind_are_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    chain(folder);
    let image = std::fs::read(folder.join("monday.img")).unwrap();
    std::fs::write(folder.join("letter"), "precious").unwrap();
    for (arguments, kind) in [
        (&["map", "monday.img", "--png", "monday.img", "--replace"][..], "a PNG picture"),
        (&["map", "monday.img", "--png", "letter", "--replace"], "a PNG picture"),
        (&["merge", "tuesday.img", "--into", "letter", "--replace"], "an image"),
    ] {
        let output = run(folder, arguments);
        let error = text(&output.stderr);
        assert!(
            !output.status.success() && error.contains(&format!("the file is not {kind}, and so")),
            "{error}"
        );
    }
    assert_eq!(std::fs::read(folder.join("monday.img")).unwrap(), image);
    assert_eq!(std::fs::read(folder.join("letter")).unwrap(), b"precious");
    // A picture may be replaced by a picture.
    assert!(run(folder, &["map", "monday.img", "--png", "picture"]).status.success());
    assert!(run(folder, &["map", "monday.img", "--png", "picture", "--replace"]).status.success());
    std::fs::write(folder.join("empty"), "").unwrap();
    let error = text(&run(folder, &["info", "empty"]).stderr);
    assert!(error.contains("the file has 0 bytes, but the header of an image has 4096"), "{error}");
}
