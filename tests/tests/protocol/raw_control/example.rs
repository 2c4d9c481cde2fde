// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The example of the document: two VMMs that say nothing but its bytes, and agents that answer
//! with nothing else.

use super::bodies::PAGE;
use super::document::section;
use super::frames::Frames;
use super::hook_thread::hook_pair;
use super::vmm::{Fence, Host, Ram};
use pageferry_tests::require;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

/// Code of an event on the hook socket.
const EVENT: u32 = 0x200a;

/// A frame in the document. A byte that differs from run to run is `None`.
#[derive(Debug)]
struct Line {
    is_hook: bool,
    from_vmm: bool,
    descriptors: Vec<&'static str>,
    bytes: Vec<Option<u8>>,
}

/// The frames of one side.
fn lines(heading: &str) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for text in section(heading).lines().filter_map(|line| line.strip_prefix("    ")) {
        match text.strip_prefix("  ") {
            Some(bytes) => lines.last_mut().unwrap().bytes.extend(bytes_of(bytes)),
            None => {
                let (who, what) = text.split_once(": ").unwrap();
                let descriptors = what.split_once(" + ").map(|(_, names)| names.split(", "));
                lines.push(Line {
                    is_hook: who.starts_with("hooks, "),
                    from_vmm: who.ends_with(", VMM"),
                    descriptors: descriptors.into_iter().flatten().collect(),
                    bytes: Vec::new(),
                });
            }
        }
    }
    assert!(lines.iter().all(|line| line.bytes.len() >= 12));
    lines
}

fn bytes_of(text: &str) -> Vec<Option<u8>> {
    if let Some(count) = text.strip_prefix(".. x ") {
        return vec![None; count.parse().unwrap()];
    }
    let byte = |word| if word == ".." { None } else { Some(u8::from_str_radix(word, 16).unwrap()) };
    text.split_whitespace().map(byte).collect()
}

/// Plays one side. Returns its memory, and the bytes of the state that came.
fn play(heading: &str, stream: OwnedFd, write: impl Fn(&Ram)) -> (Ram, Vec<u8>) {
    let host = Host::start();
    let (ram, fence, control) = (Ram::new(), Fence::new(), host.connect());
    write(&ram);
    let (hooks, agents) = hook_pair();
    let mut state = tempfile::tempfile().unwrap();
    state.write_all(b"hello").unwrap();
    let mut loaded = Vec::new();
    let mut sequence = [0; 8];
    for line in lines(heading) {
        let socket = if line.is_hook { &hooks } else { &control };
        if line.from_vmm {
            let named = |name: &&'static str| -> BorrowedFd<'_> {
                match *name {
                    "fence word" => fence.file.as_fd(),
                    "log" => ram.log.as_fd(),
                    "hook socket" => agents.as_fd(),
                    "memory" => ram.file.as_fd(),
                    "discard bitmap" => ram.discards.as_fd(),
                    "stream" => stream.as_fd(),
                    "state" => state.as_fd(),
                    other => panic!("descriptor {other}"),
                }
            };
            let fds: Vec<BorrowedFd<'_>> = line.descriptors.iter().map(named).collect();
            let mut number = sequence.into_iter();
            let bytes = line.bytes.iter().map(|byte| byte.or_else(|| number.next()).unwrap());
            socket.send_bytes(&bytes.collect::<Vec<_>>(), &fds);
            continue;
        }
        let frame = expect(socket, &line);
        if line.is_hook {
            sequence.copy_from_slice(&frame.body[..8]);
        }
        assert_eq!(frame.fds.len(), line.descriptors.len(), "{line:?}");
        match line.descriptors.as_slice() {
            ["pidfd"] => fence.admit(1),
            ["state"] => {
                loaded = vec![0; 5];
                File::from(frame.fds[0].try_clone().unwrap())
                    .read_exact_at(&mut loaded, 0)
                    .unwrap();
            }
            _ => {}
        }
    }
    (ram, loaded)
}

/// The next frame, which must be that of the document. Events before it are left out there.
fn expect(socket: &Frames, line: &Line) -> super::frames::Frame {
    loop {
        let frame = socket.receive().unwrap();
        let bytes = frame.bytes();
        let fits = |(expected, byte): (&Option<u8>, &u8)| expected.is_none_or(|one| one == *byte);
        if bytes.len() == line.bytes.len() && line.bytes.iter().zip(&bytes).all(fits) {
            return frame;
        }
        assert_eq!(frame.code, EVENT, "expected {line:02x?},\nnot {bytes:02x?}");
    }
}

#[test]
fn two_vmms_that_say_its_bytes_move_a_guest() {
    // Without userfaultfd the last status says that pages are placed otherwise.
    if !require::uffd() {
        return;
    }
    let (from, to) = UnixStream::pair().unwrap();
    let written = |ram: &Ram| (1..7).for_each(|page| ram.write(page, page as u8));
    let destination = std::thread::spawn(move || play("### The destination", to.into(), |_| ()));
    let (source, _) = play("### The source", from.into(), written);
    let (arrived, state) = destination.join().unwrap();
    assert_eq!(state, b"hello");
    assert_eq!(arrived.pages()[..8], [0, 1, 2, 3, 4, 0, 6, 0]);
    assert!(source.is_discarded(5) && arrived.is_discarded(5));
    // The block has 16 pages, and the files have more.
    assert!(source.length() > 16 * PAGE);
}
