// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use proptest::prelude::*;

use super::{Error, MemoryFile, Plan, Purpose, RAM, Settings, plan};

const MIB: u64 = 1 << 20;

fn settings() -> Settings<'static> {
    Settings {
        purpose: Purpose::Run,
        monitor: Path::new("/run/q"),
        huge_page_size: None,
        default_huge_page_size: 2 * MIB,
    }
}

/// Plans for arguments after the program's name; /huge has pages of 1 GiB.
fn plan_with(settings: &Settings<'_>, arguments: &[&str]) -> Result<Plan, Error> {
    let mut all = vec![OsString::from("qemu")];
    all.extend(arguments.iter().map(OsString::from));
    plan(&all, settings, &|path| (path == Path::new("/huge")).then_some(1 << 30))
}

fn run(arguments: &[&str]) -> Result<Plan, Error> {
    plan_with(&settings(), arguments)
}

/// The new command line in words; the file of index i has descriptor 100 + i.
fn words(plan: &Plan) -> Vec<String> {
    let arguments = plan.arguments(|index| 100 + i32::try_from(index).unwrap());
    arguments.into_iter().map(|argument| argument.into_string().unwrap()).collect()
}

/// The sizes of the files in mebibytes.
fn sizes(arguments: &[&str]) -> Vec<(String, u64)> {
    let plan = run(arguments).unwrap();
    plan.files().iter().map(|file| (file.name.clone(), file.size / MIB)).collect()
}

const MONITOR: [&str; 2] = ["-qmp", "unix:/run/q,server=on,wait=off"];

#[test]
fn plain_memory_becomes_an_object_of_the_machine() {
    let plan = run(&["-m", "512", "-M", "q35"]).unwrap();

    assert_eq!(
        plan.files(),
        [MemoryFile { name: RAM.into(), size: 512 * MIB, huge_page_size: None }]
    );
    let mut expected = vec!["qemu"];
    expected.extend(MONITOR);
    expected.extend(["-machine", "memory-backend=pageferry-ram", "-object"]);
    expected.push(
        "memory-backend-file,id=pageferry-ram,size=536870912,share=on,mem-path=/proc/self/fd/100",
    );
    expected.extend(["-m", "512", "-M", "q35"]);
    assert_eq!(words(&plan), expected);
}

#[test]
fn size_of_the_machine_is_what_qemu_makes_of_it() {
    for (arguments, mebibytes) in [
        (&[][..], 128),
        (&["-m", "512M"], 512),
        (&["--m", "1.5G"], 1536),
        (&["-m", "size=512M,slots=2,maxmem=4G"], 512),
        (&["-m", "256", "-m", "slots=2,maxmem=4G"], 256),
        (&["-m", "256", "-m", "512"], 512),
        (&["-m", "0"], 128),
        (&["-m", ""], 128),
        (&["-machine", "pc,memory.size=256M"], 256),
        (&["-m", "300", "-machine", "memory.size=256M"], 300),
        (&["-append", "-m 5", "-name", "-m", "-kernel", "-m"], 128),
    ] {
        assert_eq!(sizes(arguments), [(RAM.to_owned(), mebibytes)], "{arguments:?}");
    }
}

#[test]
fn odd_sizes_are_rounded_as_qemu_rounds_them() {
    assert_eq!(run(&["-m", "600000001b"]).unwrap().files()[0].size, 600_006_656);
}

#[test]
fn memory_of_the_user_replaces_that_of_the_machine() {
    let object = "memory-backend-ram,id=m,size=256M";
    assert_eq!(
        sizes(&["-object", object, "-machine", "pc,memory-backend=m", "-m", "256"]),
        [("m".to_owned(), 256)]
    );
    let second = "memory-backend-memfd,id=n,size=128M";
    assert_eq!(
        sizes(&[
            "-object",
            object,
            "--object",
            second,
            "-m",
            "384",
            "-numa",
            "node,nodeid=0,memdev=m",
            "-numa",
            "node,nodeid=1,memdev=n"
        ]),
        [("m".to_owned(), 256), ("n".to_owned(), 128)]
    );
    // Memory of a device is beside that of the machine.
    assert_eq!(
        sizes(&["-object", object, "-device", "virtio-mem-pci,memdev=m", "-m", "64"]),
        [("m".to_owned(), 256), (RAM.to_owned(), 64)]
    );
}

#[test]
fn a_shared_file_of_the_user_can_be_the_memory_of_the_machine() {
    let arguments = [
        "-machine",
        "memory-backend=m",
        "-object",
        "memory-backend-file,id=m,size=256M,share=on,mem-path=/dev/shm/m",
    ];
    let plan = run(&arguments).unwrap();
    assert!(plan.files().is_empty());
    assert_eq!(words(&plan)[3..], arguments);
}

#[test]
fn memory_that_is_nowhere_is_an_error() {
    assert_eq!(
        run(&["-machine", "memory-backend=m"]),
        Err(Error::NoSuchBackend { id: "m".into() })
    );
}

#[test]
fn mem_path_is_replaced_and_decides_about_huge_pages() {
    let plan = run(&["-mem-path", "/huge", "-m", "2G", "-mem-prealloc"]).unwrap();
    assert_eq!(plan.files()[0].huge_page_size, Some(1 << 30));
    assert_eq!(words(&plan)[7..], ["-m", "2G", "-mem-prealloc"]);

    let plan = run(&["-mem-path", "/dev/shm", "-m", "2G"]).unwrap();
    assert_eq!(plan.files()[0].huge_page_size, None);
}

#[test]
fn huge_pages_of_the_launcher_win_over_mem_path() {
    let settings = Settings { huge_page_size: Some(2 * MIB), ..settings() };
    let plan = plan_with(&settings, &["-m", "2G", "-mem-path", "/huge"]).unwrap();
    assert_eq!(plan.files()[0].huge_page_size, Some(2 * MIB));

    let error = plan_with(&settings, &["-m", "513"]).unwrap_err();
    assert_eq!(
        error,
        Error::SizeNotInPages { name: RAM.into(), size: 513 * MIB, page_size: 2 * MIB }
    );
}

#[test]
fn receive_waits_for_a_guest_and_remembers_the_pause_of_the_user() {
    let settings = Settings { purpose: Purpose::Receive, ..settings() };

    let plan = plan_with(&settings, &["-m", "64"]).unwrap();
    assert!(!plan.starts_paused());
    assert_eq!(words(&plan)[3..6], ["-incoming", "defer", "-S"]);

    let plan = plan_with(&settings, &["-m", "64", "-S"]).unwrap();
    assert!(plan.starts_paused());
    assert_eq!(words(&plan).iter().filter(|word| *word == "-S").count(), 1);
}

#[test]
fn commas_in_the_path_of_the_monitor_are_doubled() {
    let settings = Settings { monitor: Path::new("/run/a,b,,c"), ..settings() };
    let plan = plan_with(&settings, &[]).unwrap();
    assert!(words(&plan)[2].starts_with("unix:/run/a,,b,,,,c,server"));
}

#[test]
fn a_path_that_is_not_utf8_is_kept() {
    let monitor = Path::new(OsStr::from_bytes(b"/run/\xff"));
    let plan = plan_with(&Settings { monitor, ..settings() }, &[]).unwrap();
    assert!(plan.arguments(|_| 3)[2].as_bytes().starts_with(b"unix:/run/\xff,server"));
}

#[test]
fn sizes_that_are_none_are_named() {
    for (arguments, named) in [
        (["-m", "lots"], "-m \"lots\""),
        (["-m", "size=0x200"], "-m \"0x200\""),
        (["-machine", "memory.size=x"], "-machine memory.size \"x\""),
    ] {
        let text = run(&arguments).unwrap_err().to_string();
        assert!(text.starts_with(named), "{text}");
    }
    assert_eq!(plan(&[], &settings(), &|_| None), Err(Error::NoProgram));
}

/// Arguments that are bytes, among them many that look like options.
fn argument() -> impl Strategy<Value = OsString> {
    let word = prop::sample::select(vec![
        "-m",
        "512",
        "-S",
        "-append",
        "-name",
        "-object",
        "iothread,id=i",
        "-machine",
        "q35",
        "-device",
        "virtio-net",
        "-numa",
        "dist,src=0",
        "-x-new",
        "disk.img",
        "-",
        "--",
        "",
    ]);
    let bytes = prop::collection::vec(any::<u8>(), 0..8);
    prop_oneof![
        word.prop_map(OsString::from),
        bytes.prop_map(|bytes| OsStr::from_bytes(&bytes).to_owned()),
    ]
}

proptest! {
    #[test]
    fn what_is_not_memory_passes_untouched(user in prop::collection::vec(argument(), 0..12)) {
        let mut all = vec![OsString::from("qemu")];
        all.extend(user.iter().cloned());

        // Sizes that are none are refused. Whatever is planned ends with the user's arguments.
        if let Ok(plan) = plan(&all, &settings(), &|_| None) {
            let arguments = plan.arguments(|_| 3);
            prop_assert_eq!(&arguments[0], "qemu");
            prop_assert_eq!(&arguments[arguments.len() - user.len()..], &user[..]);
            prop_assert_eq!(plan.files().len(), 1);
        }
    }

    #[test]
    fn every_descriptor_is_asked_for_once(
        types in prop::collection::vec(
            prop::sample::select(vec!["ram", "memfd", "shm", "file"]), 0..5,
        ),
    ) {
        let objects = types.iter().enumerate().flat_map(|(index, kind)| {
            let path = if *kind == "file" { ",mem-path=/x" } else { "" };
            ["-object".into(), format!("memory-backend-{kind},id=m{index},size=4M{path}")]
        });
        let all: Vec<_> = ["qemu".to_owned()].into_iter().chain(objects).collect();
        let all: Vec<_> = all.into_iter().map(OsString::from).collect();

        let plan = plan(&all, &settings(), &|_| None).unwrap();

        // One for each object, and that of the machine.
        let words = words(&plan);
        for (index, file) in plan.files().iter().enumerate() {
            let path = format!("mem-path=/proc/self/fd/{}", 100 + index);
            let users: Vec<_> = words.iter().filter(|word| word.ends_with(&path)).collect();
            prop_assert_eq!(users.len(), 1);
            let id = format!(",id={},", file.name);
            prop_assert!(users[0].contains(&id));
        }
        prop_assert_eq!(plan.files().len(), types.len() + 1);
    }
}
