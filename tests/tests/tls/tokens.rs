// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Peers with a token instead of certificates.

use super::scene::{Host, PAGES, moves};
use pageferry_client::{Compression, Mode, OutgoingOptions, Phase};
use pageferry_tests::certificates::Authority;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::program;
use pageferry_tests::require;
use pageferry_tests::scenario::{Ram, SOON};
use std::fs::{Permissions, rename, set_permissions, write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Files with tokens.
pub struct Tokens(TempDir);

impl Tokens {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A file with this token.
    pub fn file(&self, name: &str, token: &str) -> PathBuf {
        let (path, new) = (self.0.path().join(name), self.0.path().join("new"));
        write(&new, token).unwrap();
        set_permissions(&new, Permissions::from_mode(0o600)).unwrap();
        // At once, as whoever renews a token should do it.
        rename(new, &path).unwrap();
        path
    }
}

pub const ONE: &str = "4pXq0bN1r7yEw5s8Jk2dTz6uQm3vLh9c\n";
pub const OTHER: &str = "other-4pXq0bN1r7yEw5s8Jk2dTz6uQm3vLh9c\n";

pub fn source(token: &Path) -> Host {
    Host::with_token(Ram::odd(PAGES).stamped(), token)
}

pub fn destination(token: &Path) -> Host {
    Host::with_token(Ram::odd(PAGES), token)
}

/// The source fails with `here`, and the destination waits on and says `there`.
#[track_caller]
fn fails(source: &Host, destination: &Host, port: u16, here: &str, there: &str) {
    let status = source.send(&format!("tls:localhost:{port}"), &OutgoingOptions::default());
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error_text().contains(here), "{}", status.error_text());
    source.assert_keeps_guest();
    let waiting = || destination.attached.client.status().unwrap();
    wait_until("the reason at the destination", SOON, || waiting().error_text().contains(there))
        .unwrap_or_else(|_| panic!("{}", waiting().error_text()));
    assert_eq!(waiting().phase, Phase::Connecting);
}

#[test]
fn guests_move_in_every_mode() {
    let tokens = Tokens::new();
    let token = tokens.file("token", ONE);
    let modes = [Mode::Precopy, Mode::Postcopy, Mode::Hybrid];
    for mode in modes.into_iter().filter(|mode| *mode == Mode::Precopy || require::uffd()) {
        for (streams, compression) in [(1, Compression::None), (4, Compression::Lz4)] {
            let ram = Ram::odd(PAGES);
            let ram = if mode == Mode::Precopy { ram } else { ram.mapped() };
            let (source, destination) = (source(&token), Host::with_token(ram, &token));
            let waits = destination.listen();
            // Postcopy has urgent streams besides.
            let options = OutgoingOptions { mode, streams, compression, ..Default::default() };
            moves(&source, &destination, waits, &options);
        }
    }
}

#[test]
fn wrong_token_is_named_at_both_ends() {
    let tokens = Tokens::new();
    let (one, other) = (tokens.file("one", ONE), tokens.file("other", OTHER));
    let there = destination(&one);
    let waits = there.listen();
    let words = "the peer has another token";
    fails(&source(&other), &there, waits.1, words, words);
    moves(&source(&one), &there, waits, &OutgoingOptions::default());
}

#[test]
fn name_of_the_host_plays_no_role_with_a_token() {
    let tokens = Tokens::new();
    let token = tokens.file("token", ONE);
    for name in ["127.0.0.1", "localhost"] {
        let (source, destination) = (source(&token), destination(&token));
        let (job, port) = destination.listen();
        let status = source.send(&format!("tls:{name}:{port}"), &OutgoingOptions::default());
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        let status = destination.attached.client.wait(job, SOON).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    }
}

#[test]
fn token_against_certificates_is_named_at_both_ends() {
    let tokens = Tokens::new();
    let token = tokens.file("token", ONE);
    let certificates = Authority::new("ca").folder(["localhost", "host-a"]);
    let with_certificates = || Host::source(certificates.path());
    let there = destination(&token);
    let waits = there.listen();
    let here = "this side has certificates (--tls), and the peer seems to have a token";
    let said = "this side has a token (--token-file), and the peer has certificates (--tls)";
    fails(&with_certificates(), &there, waits.1, here, said);
    moves(&source(&token), &there, waits, &OutgoingOptions::default());

    let there = Host::destination(certificates.path());
    let waits = there.listen();
    let here = "this side has a token (--token-file), and the peer seems to have certificates";
    let said = "this side has certificates (--tls), and the peer has a token (--token-file)";
    fails(&source(&token), &there, waits.1, here, said);
    moves(&with_certificates(), &there, waits, &OutgoingOptions::default());
}

#[test]
fn token_is_changed_while_the_agent_waits() {
    let tokens = Tokens::new();
    let (ours, theirs) = (tokens.file("ours", OTHER), tokens.file("theirs", ONE));
    let (here, there) = (source(&ours), destination(&theirs));
    let waits = there.listen();
    fails(&here, &there, waits.1, "another token", "another token");
    tokens.file("theirs", OTHER);
    moves(&here, &there, waits, &OutgoingOptions::default());
}

/// What an agent says that does not start with these arguments.
#[track_caller]
fn refused(arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(program());
    command.args(["agent", "--socket"]).arg(folder.path().join("agent.sock")).args(arguments);
    let output = command.output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn token_that_cannot_be_used_is_refused_at_the_start() {
    let tokens = Tokens::new();
    let path = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let missing = path(&tokens.file("token", ONE).with_file_name("missing"));
    let said = refused(&["--token-file", &missing]);
    assert!(said.contains("--token-file: cannot read") && said.contains("missing"), "{said}");
    let short = path(&tokens.file("short", " 0123456789abcdef0123456789abcde \n"));
    let said = refused(&["--token-file", &short]);
    assert!(said.contains("a token of 31 bytes, allowed: 32 to 4096"), "{said}");
    assert!(said.contains("head -c 32 /dev/urandom | base64"), "{said}");
    let open = tokens.file("open", ONE);
    set_permissions(&open, Permissions::from_mode(0o640)).unwrap();
    let said = refused(&["--token-file", &path(&open)]);
    assert!(said.contains("has mode 640, but nobody except its owner"), "{said}");
    assert!(!said.contains(ONE.trim()), "{said}");
    let said = refused(&["--token-file", &short, "--tls", "/nowhere"]);
    assert!(said.contains("cannot be used with"), "{said}");
}
