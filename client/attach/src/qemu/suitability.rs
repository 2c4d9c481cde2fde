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

/// Refuses a QEMU whose memory or devices pageferry cannot serve.
///
/// # Errors
/// The first thing that stands in the way.
pub fn check(monitor: &mut Monitor) -> Result<(), Unsuitable> {
    check_backends(monitor)?;
    check_devices(monitor)?;
    check_networks(monitor)?;
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
        if matches!(kind.as_str(), "memory-backend-memfd" | "memory-backend-shm") {
            return Err(Unsuitable::Unnamed { id: id.to_owned(), kind });
        }
        if backend.get("share").and_then(Value::as_bool) != Some(true) {
            return Err(Unsuitable::PrivateMemory { id: id.to_owned() });
        }
    }
    Ok(())
}

fn check_devices(monitor: &mut Monitor) -> Result<(), Unsuitable> {
    for folder in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let devices = monitor.command("qom-list", json!({ "path": folder }))?;
        for device in devices.as_array().into_iter().flatten() {
            let text = |field: &str| device.get(field).and_then(Value::as_str).unwrap_or_default();
            let kind = text("type").trim_start_matches("child<").trim_end_matches('>');
            if let Some((_, why)) = REFUSED.iter().find(|(start, _)| kind.starts_with(start)) {
                return Err(Unsuitable::Device {
                    device: text("name").to_owned(),
                    kind: kind.to_owned(),
                    why,
                });
            }
        }
    }
    Ok(())
}

fn check_networks(monitor: &mut Monitor) -> Result<(), Unsuitable> {
    let networks = monitor.human("info network")?;
    let refused =
        |line: &&str| ["type=vhost-user", "type=vhost-vdpa"].iter().any(|k| line.contains(k));
    match networks.lines().find(refused) {
        Some(line) => Err(Unsuitable::Network { line: line.trim().to_owned() }),
        None => Ok(()),
    }
}
