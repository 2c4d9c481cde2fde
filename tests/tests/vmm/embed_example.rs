// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The example of a VMM that embeds the client: it works, and its glue is short.

use pageferry_tests::process::program;
use pageferry_tests::require;
use std::process::Command;

#[expect(dead_code, reason = "its main function, and the agent that it is itself")]
#[path = "../../../examples/embed.rs"]
mod embed;

/// Most lines of glue, without empty ones.
const MOST: usize = 120;

fn agent() -> Command {
    let mut command = Command::new(program());
    command.args(["agent", "--stdin"]).env("RUST_LOG", "off");
    command
}

#[test]
fn it_moves_saves_and_resets_its_guest_and_survives_its_agents() {
    if require::kvm() {
        embed::run(agent).unwrap();
    }
}

#[test]
fn its_glue_is_short() {
    let lines = include_str!("../../../examples/embed.rs").lines().map(str::trim);
    let glue = lines.skip_while(|line| *line != "// glue begins").skip(1);
    let glue = glue.take_while(|line| *line != "// glue ends");
    let count = glue.filter(|line| !line.is_empty()).count();
    assert!((50..=MOST).contains(&count), "{count} lines of glue, at most {MOST} are allowed");
}
