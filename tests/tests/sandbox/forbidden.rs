// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What somebody who has taken an agent over would try is refused in each kind of thread.

use pageferry_agent::sandbox::KINDS;
use pageferry_tests::forbidden::OF_FIRST_THREAD;
use pageferry_tests::process::program;
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::process::Command;

/// What came of each attempt in a thread of this kind, and the log.
fn attempts(kind: &str) -> (BTreeMap<String, String>, String) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("secret"), "precious").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut command = Command::new(program());
    command.args(["forbidden", kind]).arg(folder.path()).arg(port.to_string());
    let output = command.output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{kind}: {:?}, {log}", output.status);
    assert_eq!(std::fs::read(folder.path().join("secret")).unwrap(), b"precious");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "nobody has connected");
    let said = String::from_utf8(output.stdout).unwrap();
    let lines = said.lines().filter_map(|line| line.split_once(' '));
    (lines.map(|(name, came)| (name.to_owned(), came.to_owned())).collect(), log)
}

#[test]
fn each_kind_of_thread_is_refused_what_it_does_not_need() {
    for kind in KINDS.map(|kind| format!("{kind:?}")).iter().map(String::as_str).chain(["first"]) {
        let (came, log) = attempts(kind);
        assert!(came.len() > 25, "{kind}: {came:?}");
        assert_eq!(came["dumpable"], "Ok(NotDumpable)");
        for (name, came) in came.iter().filter(|(name, _)| *name != "dumpable") {
            if kind == "first" && OF_FIRST_THREAD.contains(&name.as_str()) {
                continue;
            }
            let refused = ["Operation not permitted", "Permission denied"];
            assert!(refused.iter().any(|why| came.starts_with(why)), "{kind}: {name} {came}");
        }
        assert!(log.contains("the sandbox has refused system call"), "{kind}: {log}");
    }
}
