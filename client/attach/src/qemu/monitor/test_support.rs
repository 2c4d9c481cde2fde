// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A monitor that says what a test wants.

use super::{Monitor, MonitorError};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// What QEMU says first.
pub(in crate::qemu) const GREETING: &str = "{\"QMP\": {}}\r\n";
/// The answer to a command that returns nothing.
pub(in crate::qemu) const DONE: &str = "{\"return\": {}, \"id\": ID}\r\n";

/// Serves one client at `path`: greets, and answers each command with what `answer` makes of it;
/// `ID` in it becomes the id of the command. Ends when `answer` returns nothing, or the client is
/// gone. Returns the commands.
pub(super) fn serve(
    listener: &UnixListener, greeting: &str, mut answer: impl FnMut(&Value) -> Option<String>,
) -> Vec<Value> {
    let mut socket = listener.accept().unwrap().0;
    let lines = BufReader::new(socket.try_clone().unwrap()).lines();
    // Fails if the client does not listen: it only wakes this thread.
    let _ = socket.write_all(greeting.as_bytes());
    let mut commands = Vec::new();
    for line in lines.map_while(Result::ok) {
        let command: Value = serde_json::from_str(&line).unwrap();
        let said = answer(&command);
        let id = command["id"].to_string();
        commands.push(command);
        let Some(said) = said else { break };
        let _ = socket.write_all(said.replace("ID", &id).as_bytes());
    }
    commands
}

/// Runs `test` with the path of a monitor that answers each command by `answer`. Returns what the
/// test returns, and the commands.
pub(in crate::qemu) fn at_monitor<T>(
    answer: impl FnMut(&Value) -> Option<String> + Send, test: impl FnOnce(&Path) -> T,
) -> (T, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(&listener, GREETING, answer));
        let outcome = test(&path);
        (outcome, server.join().unwrap())
    })
}

/// Connects to a monitor that greets with `greeting`, and gives the next of `answers` to each
/// command; after the last one it closes the connection.
pub(in crate::qemu) fn with_monitor<T>(
    greeting: &str, answers: &[&str], test: impl FnOnce(Result<Monitor, MonitorError>) -> T,
) -> T {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let next = self::answers(answers);
    std::thread::scope(|scope| {
        let listener = &listener;
        scope.spawn(move || serve(listener, greeting, next));
        test(Monitor::connect(&path))
    })
}

/// Gives these answers one after the other.
pub(super) fn answers(all: &[&str]) -> impl FnMut(&Value) -> Option<String> {
    let mut all = all.iter().map(ToString::to_string).collect::<Vec<_>>().into_iter();
    move |_: &Value| all.next()
}
