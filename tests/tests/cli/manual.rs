// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Man pages, completions, and what `check` prints.

use pageferry_tests::process::program;
use serde_json::Value;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(program()).args(arguments).output().unwrap()
}

#[test]
fn man_pages_of_all_commands_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let done = run(&["man", folder.path().to_str().unwrap()]);
    assert!(done.status.success(), "{done:?}");
    for page in ["pageferry", "pageferry-agent", "pageferry-migrate", "pageferry-image-merge"] {
        let text = std::fs::read_to_string(folder.path().join(format!("{page}.1"))).unwrap();
        assert!(text.contains(".SH NAME") && text.contains(".SH OPTIONS"), "{page}: {text}");
    }
    let first = std::fs::read_to_string(folder.path().join("pageferry.1")).unwrap();
    assert!(first.contains("Exit codes"), "{first}");

    let refused = run(&["man", "/nonexistent/folder"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("cannot write man pages to /nonexistent/folder"), "{said}");
}

#[test]
fn bash_loads_its_completions() {
    let printed = run(&["completions", "bash"]);
    assert!(printed.status.success(), "{printed:?}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("completions");
    std::fs::write(&file, printed.stdout).unwrap();
    let loaded = Command::new("bash")
        .args(["-ec", "source \"$0\"; complete -p pageferry"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(loaded.status.success(), "{loaded:?}");
}

#[test]
fn check_names_what_it_found_and_what_a_lack_rules_out() {
    let table = run(&["check"]);
    assert_eq!(table.status.code(), Some(0));
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("kernel               yes  Linux "), "{text}");
    let json = run(&["check", "--json"]);
    let findings: Value = serde_json::from_slice(&json.stdout).unwrap();
    let names: Vec<_> = findings
        .as_array()
        .unwrap()
        .iter()
        .map(|finding| finding["name"].as_str().unwrap())
        .collect();
    for name in
        ["kernel", "userfaultfd", "PAGEMAP_SCAN", "hugetlb pool", "kvm", "qemu", "qemu attach"]
    {
        assert!(names.contains(&name), "{names:?}");
    }
    // What is missing is no failure, except a QEMU that somebody has named.
    let table = run(&["check", "--qemu", "/nowhere/qemu"]);
    assert_eq!(table.status.code(), Some(1));
    let said = String::from_utf8_lossy(&table.stderr);
    assert!(said.starts_with("pageferry: /nowhere/qemu: No such file"), "{said}");
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("qemu                 no   /nowhere/qemu: No such file"), "{text}");
}
