// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a QEMU can be moved and saved from outside, and if not, what stands in the way.

use super::monitor::{Monitor, MonitorError};
use serde_json::{Value, json};

/// What stands in the way.
#[derive(Debug, thiserror::Error)]
pub enum Unsuitable {
    /// The monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// Memory that is not shared travels in QEMU's own stream, page by page, while the guest is
    /// paused.
    #[error(
        "memory backend {id} is private: pageferry can only serve memory with share=on. Start QEMU with \
         `pageferry qemu run`, which sets it"
    )]
    PrivateMemory {
        /// Its id.
        id: String,
    },
    /// QEMU does not leave the memory of a memory-backend-memfd out of its own stream.
    #[error(
        "memory backend {id} is a {kind}, whose memory QEMU sends by itself, since it has no name: use \
         memory-backend-file,share=on, or start QEMU with `pageferry qemu run`, which does it"
    )]
    Unnamed {
        /// Its id.
        id: String,
        /// The type of the object.
        kind: String,
    },
    /// A device writes guest memory behind QEMU's back.
    #[error("device {device} ({kind}) {why}")]
    Device {
        /// Its id, or its name in QEMU's tree of objects.
        device: String,
        /// Its type.
        kind: String,
        /// Why it stands in the way.
        why: &'static str,
    },
    /// A disk whose reads go straight into guest memory, so its writes cannot be tracked.
    #[error(
        "disk {device} bypasses the page cache (cache.direct=on, as with cache=none, or SCSI commands of the guest): \
         the kernel may write to guest memory after pageferry has looked, and nobody would notice. Move this guest \
         with --mode postcopy, and save it without --track and --base; or start QEMU with cache=writeback"
    )]
    DirectDisk {
        /// Its name in QEMU.
        device: String,
    },
    /// A network back-end writes guest memory behind QEMU's back.
    #[error(
        "network {line}: the other process writes guest memory without a log that pageferry can read"
    )]
    Network {
        /// What QEMU says about it.
        line: String,
    },
    /// QEMU itself cannot migrate.
    #[error("QEMU says that it cannot migrate: {reasons}")]
    Blocked {
        /// What it says.
        reasons: String,
    },
}

const OTHER_PROCESS: &str =
    "is served by another process, which writes guest memory without a log that pageferry can read";
const PASSED_THROUGH: &str = "is passed through: it writes guest memory without anyone knowing";
const SHARED_WITH_OTHERS: &str = "shares its memory with other virtual machines";

/// Types of devices that cannot be served, by their beginnings.
const REFUSED: [(&str, &str); 7] = [
    ("vfio-", PASSED_THROUGH),
    ("vhost-user-", OTHER_PROCESS),
    ("vhost-vdpa-", PASSED_THROUGH),
    ("vhost-scsi", OTHER_PROCESS),
    ("ivshmem", SHARED_WITH_OTHERS),
    ("x-remote", OTHER_PROCESS),
    ("x-vfio-user", OTHER_PROCESS),
];

/// Types of devices whose guest sends SCSI commands to a device of the host.
const SCSI_COMMANDS: [&str; 2] = ["scsi-block", "scsi-generic"];

/// Drivers of disks that let a device of the host, or another process, write guest memory.
const DEVICE_DRIVERS: [&str; 4] =
    ["nvme", "virtio-blk-vfio-pci", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa"];

/// Refuses a QEMU whose memory or devices pageferry cannot serve.
///
/// # Errors
/// The first thing that stands in the way.
pub fn check(monitor: &mut Monitor) -> Result<(), Unsuitable> {
    check_backends(monitor)?;
    check_devices(monitor)?;
    check_networks(monitor)?;
    check_disk_drivers(monitor)?;
    let migration = monitor.command("query-migrate", Value::Null)?;
    let reasons: Vec<&str> = migration
        .get("blocked-reasons")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    if reasons.is_empty() {
        Ok(())
    } else {
        Err(Unsuitable::Blocked { reasons: reasons.join("; ") })
    }
}

fn check_backends(monitor: &mut Monitor) -> Result<(), Unsuitable> {
    let backends = monitor.command("query-memdev", Value::Null)?;
    for backend in backends.as_array().into_iter().flatten() {
        let Some(id) = backend.get("id").and_then(Value::as_str) else { continue };
        let path = json!({ "path": format!("/objects/{id}"), "property": "type" });
        let kind = monitor.command("qom-get", path)?;
        let kind = kind.as_str().unwrap_or("memory-backend").to_owned();
        // Also a memory-backend-ram with share=on, which is a memfd inside QEMU.
        let is_shared = backend.get("share").and_then(Value::as_bool) == Some(true);
        if is_shared && kind != "memory-backend-file" {
            return Err(Unsuitable::Unnamed { id: id.to_owned(), kind });
        }
        if backend.get("share").and_then(Value::as_bool) != Some(true) {
            return Err(Unsuitable::PrivateMemory { id: id.to_owned() });
        }
    }
    Ok(())
}

fn check_devices(monitor: &mut Monitor) -> Result<(), Unsuitable> {
    for (device, kind) in devices(monitor)? {
        if let Some((_, why)) = REFUSED.iter().find(|(start, _)| kind.starts_with(start)) {
            return Err(Unsuitable::Device { device, kind, why });
        }
    }
    Ok(())
}

/// Refuses a QEMU whose writes cannot be tracked: those of a disk that bypasses the page cache.
///
/// The kernel writes to the pages of a direct read when the disk has answered. If they were
/// protected again meanwhile, nobody notices that. QEMU waits for its disks when it pauses the
/// guest, so a job that does not compare two moments needs no tracking and loses nothing.
///
/// # Errors
/// The first such disk.
pub fn check_tracking(monitor: &mut Monitor) -> Result<(), Unsuitable> {
    let disks = monitor.command("query-block", Value::Null)?;
    for disk in disks.as_array().into_iter().flatten() {
        let is_direct = disk.pointer("/inserted/cache/direct").and_then(Value::as_bool);
        if is_direct == Some(true) {
            return Err(Unsuitable::DirectDisk { device: name_of_disk(disk) });
        }
    }
    // A file below a format, which has its own setting.
    let nodes = monitor.command("query-named-block-nodes", json!({ "flat": true }))?;
    for node in nodes.as_array().into_iter().flatten() {
        if node.pointer("/cache/direct").and_then(Value::as_bool) == Some(true) {
            let name = node.get("node-name").and_then(Value::as_str).unwrap_or("?");
            return Err(Unsuitable::DirectDisk { device: name.to_owned() });
        }
    }
    for (name, kind) in devices(monitor)? {
        if SCSI_COMMANDS.contains(&kind.as_str()) {
            return Err(Unsuitable::DirectDisk { device: name });
        }
    }
    Ok(())
}

/// The driver of a disk may have a device of the host write to guest memory.
fn check_disk_drivers(monitor: &mut Monitor) -> Result<(), Unsuitable> {
    let disks = monitor.command("query-block", Value::Null)?;
    for disk in disks.as_array().into_iter().flatten() {
        let driver = disk.pointer("/inserted/drv").and_then(Value::as_str).unwrap_or_default();
        if DEVICE_DRIVERS.contains(&driver) {
            let (device, kind) = (name_of_disk(disk), driver.to_owned());
            return Err(Unsuitable::Device { device, kind, why: PASSED_THROUGH });
        }
    }
    Ok(())
}

fn name_of_disk(disk: &Value) -> String {
    let text = |field: &str| disk.get(field).and_then(Value::as_str).unwrap_or_default();
    let name = [text("device"), text("qdev")].into_iter().find(|name| !name.is_empty());
    name.unwrap_or("?").to_owned()
}

/// The names and types of the devices that the user gave.
fn devices(monitor: &mut Monitor) -> Result<Vec<(String, String)>, MonitorError> {
    let mut found = Vec::new();
    for folder in DEVICE_FOLDERS {
        let devices = monitor.command("qom-list", json!({ "path": folder }))?;
        for device in devices.as_array().into_iter().flatten() {
            let text = |field: &str| device.get(field).and_then(Value::as_str).unwrap_or_default();
            found.push((text("name").to_owned(), kind_of(text("type")).to_owned()));
        }
    }
    Ok(found)
}

fn kind_of(child: &str) -> &str {
    child.trim_start_matches("child<").trim_end_matches('>')
}

/// Where QEMU's tree of objects has the devices that the user gave.
pub(super) const DEVICE_FOLDERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

fn check_networks(monitor: &mut Monitor) -> Result<(), Unsuitable> {
    let networks = monitor.human("info network")?;
    let refused =
        |line: &&str| ["type=vhost-user", "type=vhost-vdpa"].iter().any(|k| line.contains(k));
    match networks.lines().find(refused) {
        Some(line) => Err(Unsuitable::Network { line: line.trim().to_owned() }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::monitor::test_support::at_monitor;

    /// What [`check`] says of a QEMU with these answers by command, where the answers are not those
    /// of a QEMU that can be served.
    fn checked(answers: &[(&str, Value)]) -> Result<(), String> {
        asked(check, answers)
    }

    fn asked(
        check: fn(&mut Monitor) -> Result<(), Unsuitable>, answers: &[(&str, Value)],
    ) -> Result<(), String> {
        let answer = |command: &Value| {
            let (name, arguments) = (command["execute"].as_str().unwrap(), &command["arguments"]);
            let key = format!("{name}{}", arguments["path"].as_str().unwrap_or_default());
            let said = answers.iter().find(|(command, _)| *command == key);
            let said = said.map_or_else(
                || match name {
                    "query-memdev" | "qom-list" | "query-block" | "query-named-block-nodes" => {
                        json!([])
                    }
                    "human-monitor-command" => json!(""),
                    _ => json!({}),
                },
                |(_, said)| said.clone(),
            );
            Some(format!("{}\n", json!({ "return": said, "id": command["id"] })))
        };
        let (outcome, _) = at_monitor(answer, |path| {
            check(&mut Monitor::connect(path).unwrap()).map_err(|error| error.to_string())
        });
        outcome
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        let shared = json!([{ "id": "m", "share": true }]);
        let memfd = json!("memory-backend-memfd");
        let device = |kind: &str| json!([{ "name": "d0", "type": format!("child<{kind}>") }]);
        assert_eq!(checked(&[]), Ok(()));
        let file = ("qom-get/objects/m", json!("memory-backend-file"));
        assert_eq!(checked(&[("query-memdev", shared.clone()), file]), Ok(()));
        for (answers, named) in [
            (
                vec![("query-memdev", json!([{ "id": "m", "share": false }]))],
                "memory backend m is private",
            ),
            (
                vec![("query-memdev", shared), ("qom-get/objects/m", memfd)],
                "memory backend m is a memory-backend-memfd",
            ),
            (vec![("qom-list/machine/peripheral", device("vfio-pci"))], "device d0 (vfio-pci)"),
            (
                vec![("qom-list/machine/peripheral-anon", device("vhost-user-fs-pci"))],
                "device d0 (vhost-user-fs-pci)",
            ),
            (
                vec![("human-monitor-command", json!("net0: type=user\nnet1: type=vhost-user\n"))],
                "network net1: type=vhost-user",
            ),
            (
                vec![("query-migrate", json!({ "blocked-reasons": ["a", "b"] }))],
                "cannot migrate: a; b",
            ),
        ] {
            let said = checked(&answers).unwrap_err();
            assert!(said.contains(named), "{said}");
        }
        assert_eq!(checked(&[("qom-list/machine/peripheral", device("virtio-net-pci"))]), Ok(()));
    }

    #[test]
    fn writes_of_direct_disks_cannot_be_tracked() {
        let disk = |direct: bool, driver: &str| json!([{ "device": "d0", "inserted": { "cache": { "direct": direct }, "drv": driver } }]);
        let tracked = |answers: &[(&str, Value)]| asked(check_tracking, answers);
        assert_eq!(tracked(&[("query-block", disk(false, "qcow2"))]), Ok(()));
        let direct = [("query-block", disk(true, "qcow2"))];
        assert!(tracked(&direct).unwrap_err().starts_with("disk d0 bypasses"));
        assert_eq!(checked(&direct), Ok(()));
        let below = json!([{ "node-name": "f0", "cache": { "direct": true } }]);
        let said = tracked(&[("query-named-block-nodes", below)]).unwrap_err();
        assert!(said.starts_with("disk f0 bypasses"), "{said}");
        let scsi = json!([{ "name": "s0", "type": "child<scsi-block>" }]);
        let scsi = [("qom-list/machine/peripheral", scsi)];
        assert!(tracked(&scsi).unwrap_err().starts_with("disk s0 bypasses"));
        let said = checked(&[("query-block", disk(false, "nvme"))]).unwrap_err();
        assert!(said.contains("device d0 (nvme) is passed through"), "{said}");
    }
}
