// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Streams over UNIX sockets between agents of two users: each end looks at the other.

use pageferry_client::{IncomingOptions, OutgoingOptions, Phase};
use pageferry_tests::require;
use pageferry_tests::scenario::{Agent, Attached, Host, Ram, SOON};
use std::fs::{Permissions, set_permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const PAGES: u64 = 40;

/// An agent of this user, which is root, and one of another user. `None` if this machine has no
/// other user.
fn two_users() -> Option<(Agent, Host)> {
    if !rustix::process::geteuid().is_root() {
        return require::met("nobody", Err("only root can start an agent of another user".into()));
    }
    Some((Agent::spawn(), Host::unprivileged()?))
}

/// Lets everybody connect to a path.
fn open(path: &Path) {
    set_permissions(path, Permissions::from_mode(0o666)).unwrap();
}

/// Root may connect to everybody's socket, and so does the agent of root here. What it finds there
/// is not root's.
#[test]
fn a_source_refuses_a_destination_of_another_user() {
    let Some((ours, theirs)) = two_users() else { return };
    let destination = Attached::new(theirs.agent.socket(), Ram::odd(PAGES));
    let source = Attached::new(ours.socket(), Ram::odd(PAGES).stamped());
    let path = theirs.images.path("stream");
    destination.listen(&path, &IncomingOptions::default());
    let job = source.send(&path, &OutgoingOptions::default());
    let status = source.wait(job);
    assert_eq!(status.phase, Phase::Failed);
    let said = status.error_text();
    assert!(said.contains("stream") && said.contains("user 65534"), "{said}");
    assert!(!source.vmm.is_paused());
    assert_eq!(destination.client.status().unwrap().phase, Phase::Connecting);
}

#[test]
fn a_destination_refuses_a_source_of_another_user_and_waits_on() {
    let Some((ours, theirs)) = two_users() else { return };
    let folder = tempfile::tempdir().unwrap();
    set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let path = folder.path().join("stream");
    let destination = Attached::new(ours.socket(), Ram::odd(PAGES));
    let incoming = destination.listen(&path, &IncomingOptions::default());
    // Somebody has opened it to others by mistake.
    open(&path);
    let source = Attached::new(theirs.agent.socket(), Ram::odd(PAGES).stamped());
    let job = source.send(&path, &OutgoingOptions::default());
    let status = source.wait(job);
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error_text().contains("user 65534"), "{}", status.error_text());
    let Agent::Killed(mut ours, _folder) = ours else { panic!("no process") };
    ours.process().wait_for_line("user 65534", SOON).unwrap();
    assert_eq!(destination.client.status().unwrap().error, None);
    // The right user is served.
    let right = pageferry_tests::scenario::Side::new(Ram::odd(PAGES).stamped());
    pageferry_tests::scenario::arrives_at(&right, &path, &destination, incoming);
}
