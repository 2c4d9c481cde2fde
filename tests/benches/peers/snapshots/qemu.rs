// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The same of QEMU: a migration to a file in which each page has its place.

use super::super::image::Image;
use super::super::qemu::{Machine, unlimited};
use super::floor::Took;
use super::{LIMIT, processor_time};
use pageferry_tests::deadline::wait_for;
use serde_json::json;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

/// How it saves.
#[derive(Debug, Clone, Copy)]
pub struct Mode {
    /// Channels of multifd; 0 is without.
    pub channels: u32,
    /// Past the page cache; only with multifd.
    pub direct: bool,
}

/// All that are tried.
pub const MODES: [(&str, Mode); 3] = [
    ("QEMU, mapped-ram", Mode { channels: 0, direct: false }),
    ("QEMU, mapped-ram, multifd 2", Mode { channels: 2, direct: false }),
    ("QEMU, mapped-ram, multifd 2, direct-io", Mode { channels: 2, direct: true }),
];

/// True if it can: from 9.0 on.
pub fn can(folder: &Path) -> bool {
    let image = Image::new(folder, "probe", 128 << 20);
    let sockets = tempfile::tempdir().unwrap();
    let known = Machine::start(sockets.path(), "probe", &image, &["-S"])
        .execute("query-migrate-capabilities", json!({}));
    known.as_array().into_iter().flatten().any(|known| known["capability"] == "mapped-ram")
}

/// Saves a paused guest. QEMU makes the file safe when it closes it; whatever is left of that is
/// done after it.
pub fn save(source: &Image, path: &Path, mode: Mode) -> Took {
    let sockets = tempfile::tempdir().unwrap();
    let mut machine = Machine::start(sockets.path(), "source", source, &["-S"]);
    let on = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let capabilities = [on("mapped-ram", true), on("multifd", mode.channels > 0)];
    machine.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }));
    let mut parameters = unlimited();
    if mode.channels > 0 {
        parameters["multifd-channels"] = json!(mode.channels);
    }
    parameters["direct-io"] = json!(mode.direct);
    machine.execute("migrate-set-parameters", parameters);
    let (started, before) = (Instant::now(), processor_time(machine.process_id()));
    machine.execute("migrate", json!({ "uri": format!("file:{}", path.display()) }));
    let written = wait_for("QEMU's save", LIMIT, || {
        let status = machine.execute("query-migrate", json!({}));
        match status["status"].as_str() {
            Some("completed") => Some(started.elapsed()),
            Some("failed" | "cancelled") => panic!("QEMU's save failed: {status}"),
            _ => None,
        }
    });
    let written = written.unwrap();
    let started = Instant::now();
    File::open(path).unwrap().sync_all().unwrap();
    Took {
        written,
        safe: started.elapsed(),
        processor: processor_time(machine.process_id()) - before,
    }
}

/// Loads what [`save`] wrote into a guest that does not run. How long that takes.
pub fn load(target: &Image, path: &Path, mode: Mode) -> Duration {
    let sockets = tempfile::tempdir().unwrap();
    let mut machine =
        Machine::start(sockets.path(), "target", target, &["-S", "-incoming", "defer"]);
    let on = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let capabilities = [on("mapped-ram", true), on("multifd", mode.channels > 0)];
    machine.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }));
    if mode.channels > 0 {
        machine.execute(
            "migrate-set-parameters",
            json!({ "multifd-channels": mode.channels, "direct-io": mode.direct }),
        );
    }
    let started = Instant::now();
    machine.execute("migrate-incoming", json!({ "uri": format!("file:{}", path.display()) }));
    wait_for("QEMU's load", LIMIT, || {
        let status = machine.execute("query-migrate", json!({}));
        match status["status"].as_str() {
            Some("completed") => Some(started.elapsed()),
            Some("failed" | "cancelled") => panic!("QEMU's load failed: {status}"),
            _ => None,
        }
    })
    .unwrap()
}
