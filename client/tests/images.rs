// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots and restores: when they may start, and the paths that the agent gets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use pageferry_client::{
    Error, ErrorCode, Ownership, PathError, RestoreMode, RestoreOptions, SnapshotOptions,
};
use pageferry_protocol::control::request::Request;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use support::*;

fn lazy(working_set: &str) -> RestoreOptions {
    RestoreOptions {
        mode: RestoreMode::Lazy,
        working_set: working_set.into(),
        ..RestoreOptions::default()
    }
}

fn on(base: &str) -> SnapshotOptions {
    SnapshotOptions { base: base.into(), ..SnapshotOptions::default() }
}

/// The path for the agent, which has another current directory.
fn here(path: &str) -> String {
    std::env::current_dir().unwrap().join(path).to_str().unwrap().to_owned()
}

#[test]
fn agent_is_told_paths_from_the_root() {
    let (client, _hooks, agent) = client(|mut agent| {
        let mut told = Vec::new();
        while let Some((request, _)) = agent.request() {
            agent.started(&request);
            told.push(request);
        }
        told
    });
    client.start_snapshot("new".as_ref(), &on("old/one")).unwrap();
    client.start_snapshot("/images/new".as_ref(), &on("")).unwrap();
    assert_eq!(client.ownership(), Ownership::Ours);
    client.start_restore("new".as_ref(), &lazy("touched")).unwrap();
    client.start_restore("/images/new".as_ref(), &lazy("")).unwrap();
    drop(client);
    let expected = [
        Request::StartSnapshot { path: here("new"), options: on(&here("old/one")) },
        Request::StartSnapshot { path: "/images/new".into(), options: on("") },
        Request::StartRestore { path: here("new"), options: lazy(&here("touched")) },
        Request::StartRestore { path: "/images/new".into(), options: lazy("") },
    ];
    assert_eq!(agent.join().unwrap(), expected);
}

#[test]
fn path_that_cannot_be_told_is_refused_before_anything_happens() {
    let (client, _hooks, agent) =
        client(|mut agent| assert!(agent.request().is_none(), "the agent gets no request"));
    let long = format!("/{}", "x".repeat(5000));
    let no_text = PathBuf::from(OsStr::from_bytes(b"/images/\xff"));
    let plain = Path::new("/images/one");
    let snapshot = |image: &Path, base: &str| client.start_snapshot(image, &on(base)).unwrap_err();
    let restore = |image: &Path, working_set: &str| {
        client.start_restore(image, &lazy(working_set)).unwrap_err()
    };
    for (error, whose) in [
        (snapshot(long.as_ref(), ""), "image"),
        (snapshot(plain, &long), "base"),
        (restore(long.as_ref(), ""), "image"),
        (restore(plain, &long), "working_set"),
    ] {
        let Error::Path { what, source: PathError::TooLong { length: 5001 }, .. } = error else {
            panic!("{error:?}")
        };
        assert_eq!(what, whose);
    }
    for error in [snapshot(&no_text, ""), restore(&no_text, "")] {
        assert!(
            matches!(error, Error::Path { what: "image", source: PathError::NotUtf8, .. }),
            "{error:?}"
        );
    }
    for (option, whose) in [
        (SnapshotOptions::default().with_base(&no_text).unwrap_err(), "base"),
        (RestoreOptions::default().with_working_set(&no_text).unwrap_err(), "working_set"),
    ] {
        assert_eq!(option.to_string(), format!(r#"{whose} "/images/\xFF" is not UTF-8"#));
        let error = Error::from(option);
        assert!(
            matches!(&error, Error::Path { what, source: PathError::NotUtf8, .. } if *what == whose),
            "{error:?}"
        );
    }
    assert_eq!(SnapshotOptions::default().with_base(plain).unwrap(), on("/images/one"));
    let error = snapshot(Path::new(""), "");
    assert!(
        matches!(error, Error::Path { source: PathError::NotAbsolute { .. }, .. }),
        "{error:?}"
    );
    assert_eq!(error.to_string(), r#"image """#);
    for error in [snapshot("https://host/one".as_ref(), ""), restore(plain, "https://host/set")] {
        let Error::Path { source: PathError::UnknownScheme { scheme }, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(scheme, "https");
    }
    assert_eq!(client.ownership(), Ownership::Ours);
    drop(client);
    agent.join().unwrap();
}

#[test]
fn restore_makes_the_guest_not_ours_unless_it_is_refused() {
    let (client, _hooks, agent) = client(|mut agent| {
        let (request, _) = agent.request().unwrap();
        agent.refuse(&request, ErrorCode::NotFound, "/images/one: no such file");
        let (request, _) = agent.request().unwrap();
        agent.started(&request);
        assert!(agent.request().is_none(), "the agent gets no request for a snapshot");
    });
    let image = Path::new("/images/one");
    let refused = client.start_restore(image, &RestoreOptions::default()).unwrap_err();
    assert!(matches!(refused, Error::Refused { code: ErrorCode::NotFound, .. }), "{refused:?}");
    assert_eq!(client.ownership(), Ownership::Ours);
    client.start_restore(image, &RestoreOptions::default()).unwrap();
    assert_eq!(client.ownership(), Ownership::Awaiting);
    let error = client.start_snapshot(image, &SnapshotOptions::default()).unwrap_err();
    assert!(matches!(error, Error::NotOurs { ownership: Ownership::Awaiting }), "{error:?}");
    drop(client);
    agent.join().unwrap();
}

#[test]
fn restore_without_an_agent_changes_nothing() {
    let (client, _hooks, agent) = client(drop);
    agent.join().unwrap();
    assert_lost(client.status());
    assert_lost(client.start_restore("/images/one".as_ref(), &RestoreOptions::default()));
    assert_eq!(client.ownership(), Ownership::Ours);
}
