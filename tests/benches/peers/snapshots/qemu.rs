// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The same with QEMU: a migration to a file with a fixed place for each page (mapped-ram).

use super::super::image::Image;
use super::super::qemu::{Machine, unlimited};
use super::floor::Took;
use super::{LIMIT, processor_time};
use pageferry_tests::deadline::wait_for;
use serde_json::json;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

/// The way it saves.
#[derive(Debug, Clone, Copy)]
pub struct Mode {
    /// Channels of multifd. 0 is without multifd.
    pub channels: u32,
    /// Bypasses the page cache. Only with multifd.
    pub direct: bool,
}

/// The ways that are measured.
pub const MODES: [(&str, Mode); 3] = [
    ("QEMU, mapped-ram", Mode { channels: 0, direct: false }),
    ("QEMU, mapped-ram, multifd 2", Mode { channels: 2, direct: false }),
    ("QEMU, mapped-ram, multifd 2, direct-io", Mode { channels: 2, direct: true }),
];

/// True if this QEMU supports it, which is since version 9.0.
pub fn can(folder: &Path) -> bool {
    let image = Image::new(folder, "probe", 128 << 20);
    let sockets = tempfile::tempdir().unwrap();
    let known = Machine::start(sockets.path(), "probe", &image, &["-S"])
        .execute("query-migrate-capabilities", json!({}));
    known.as_array().into_iter().flatten().any(|known| known["capability"] == "mapped-ram")
}

/// Saves a paused guest. QEMU syncs the file when it closes it. The rest of the sync is done
/// afterwards.
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

/// Loads the file of [`save`] into a guest that does not run. Returns the time.
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
