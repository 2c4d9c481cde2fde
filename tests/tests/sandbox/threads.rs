// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The threads of a real agent are in the sandbox.

use pageferry_tests::deadline::wait_for;
use pageferry_tests::process::{AgentProcess, program};
use signal_hook::consts::{SIGTERM, SIGUSR2};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

/// The fields of `/proc/PID/task/TID/status` of each thread, by its name.
fn threads(pid: u32) -> BTreeMap<String, BTreeMap<String, String>> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // A thread may end meanwhile.
    let status = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.ok()?.path().join("status")).ok()
    };
    let statuses = tasks.filter_map(status);
    let fields = |status: String| -> BTreeMap<String, String> {
        let fields = status.lines().filter_map(|line| line.split_once(':'));
        fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
    };
    statuses.map(fields).map(|fields| (fields["Name"].clone(), fields)).collect()
}

fn threads_named(pid: u32, name: &str) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let is_named = |task: std::io::Result<std::fs::DirEntry>| {
        let found = std::fs::read_to_string(task.ok()?.path().join("comm")).ok()?;
        (found.trim() == name).then_some(())
    };
    tasks.filter_map(is_named).count()
}

/// True for the first thread and the one that executes programs, which have no filter of a kind.
fn is_wide(name: &str, fields: &BTreeMap<String, String>) -> bool {
    fields["Pid"] == fields["Tgid"] || name == "upgrade"
}

#[test]
fn every_thread_has_a_filter_and_no_privilege() {
    let folder = tempfile::tempdir().unwrap();
    let metrics = folder.path().join("metrics");
    let metrics = format!("unix:{}", metrics.display());
    let options = ["--metrics", metrics.as_str()];
    let agent =
        AgentProcess::start_with(&mut Command::new(program()), folder.path(), "agent", &options)
            .unwrap();
    let _connection = std::os::unix::net::UnixStream::connect(agent.socket()).unwrap();
    let wanted = ["log", "metrics", "session-drop", "upgrade", "connection-"];
    let all = wait_for("its threads", Duration::from_secs(60), || {
        let all = threads(agent.id());
        let has = |name: &&str| all.keys().any(|found| found.starts_with(name));
        // A thread that has just been started has the name of the first one for a moment.
        let leader = all.values().find(|fields| fields["Pid"] == fields["Tgid"])?;
        let names = threads_named(agent.id(), &leader["Name"]);
        // It has its name before its filter.
        let has_begun = |(name, fields): (&String, &BTreeMap<String, String>)| {
            let filters: u32 = fields["Seccomp_filters"].parse().unwrap();
            is_wide(name, fields) || filters == 3
        };
        (wanted.iter().all(has) && names == 1 && all.iter().all(has_begun)).then_some(all)
    })
    .unwrap();
    for (name, fields) in &all {
        assert_eq!((&*fields["Seccomp"], &*fields["NoNewPrivs"]), ("2", "1"), "{name}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(fields[set].trim_start_matches('0'), "", "{name}: {set}");
        }
        let filters: u32 = fields["Seccomp_filters"].parse().unwrap();
        let is_wide = is_wide(name, fields);
        assert_eq!(filters, if is_wide { 2 } else { 3 }, "{name}");
        // What a handler does, the others may not do.
        let blocked = u64::from_str_radix(&fields["SigBlk"], 16).unwrap();
        let ends = 1u64 << (SIGTERM - 1) | 1 << (SIGUSR2 - 1);
        assert_eq!(blocked & ends, if is_wide { 0 } else { ends }, "{name}");
    }
}
