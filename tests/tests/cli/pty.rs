// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A terminal of 80 columns, and what a command draws on it.

use pageferry_tests::deadline::wait_until;
use pageferry_tests::vmm::PATIENCE;
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A command with a terminal as standard output and standard error.
pub struct OnTerminal {
    pub child: Child,
    drawn: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl OnTerminal {
    pub fn spawn(command: &mut Command) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        tcsetwinsize(&ours, Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 })
            .unwrap();
        let path = ptsname(&ours, Vec::new()).unwrap();
        let theirs =
            open(&path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let theirs = File::from(theirs);
        let child = command
            .env("TERM", "xterm")
            .stdin(Stdio::null())
            .stdout(theirs.try_clone().unwrap())
            .stderr(theirs)
            .spawn()
            .unwrap();
        // The command holds the terminal too, which then has no end.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let drawn = Arc::new(Mutex::new(Vec::new()));
        let (mut terminal, sink) = (File::from(ours), drawn.clone());
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // The kernel reports EIO when the last process has closed the terminal.
            while let Ok(count @ 1..) = terminal.read(&mut buffer) {
                sink.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        Self { child, drawn, reader: Some(reader) }
    }

    /// All that was drawn until now, without control sequences. Each redraw begins a line.
    pub fn text(&self) -> String {
        let drawn = String::from_utf8_lossy(&self.drawn.lock().unwrap()).into_owned();
        let mut text = String::new();
        let mut rest = drawn.chars();
        while let Some(letter) = rest.next() {
            match letter {
                // A control sequence: ESC, [, parameters, and a letter.
                '\u{1b}' => {
                    rest.by_ref().skip(1).find(char::is_ascii_alphabetic);
                }
                '\r' => text.push('\n'),
                letter => text.push(letter),
            }
        }
        text
    }

    /// Waits until a line with `wanted` was drawn.
    pub fn wait_for(&self, wanted: &str) {
        wait_until(wanted, PATIENCE, || self.text().contains(wanted))
            .unwrap_or_else(|error| panic!("{error}: {}", self.text()));
    }

    /// Waits for its end.
    pub fn end(&mut self) -> (ExitStatus, String) {
        let status = self.child.wait().unwrap();
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        (status, self.text())
    }
}
