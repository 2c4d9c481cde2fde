// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QMP `query-memory-devices` and `query-memdev`: devices with memory, and memory objects.

use serde_json::Value;

use super::Error;

/// A device whose memory has a fixed place in the guest's address space: a DIMM, or virtio-mem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryDevice {
    /// Type, as `dimm` or `virtio-mem`.
    pub kind: String,
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes of its address range; of virtio-mem also those that are not plugged.
    pub length: u64,
    /// QOM path of its memory object, as `/objects/mem1`.
    pub memdev: String,
}

/// A memory object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryBackend {
    /// Its name. Objects that QEMU makes itself may have none.
    pub id: Option<String>,
    /// Bytes.
    pub size: u64,
    /// Whether other processes see what the guest writes.
    pub share: bool,
}

/// Reads the answer of `query-memory-devices`. Devices without memory objects are left out.
///
/// # Errors
///
/// Fails at the first device without address or size.
pub fn parse_devices(answer: &Value) -> Result<Vec<MemoryDevice>, Error> {
    let expects = |value: &Value, expected| Error::Answer {
        command: "query-memory-devices",
        value: value.to_string(),
        expected,
    };
    let mut devices = Vec::new();
    for device in answer.as_array().ok_or_else(|| expects(answer, "a list"))? {
        let kind = device["type"].as_str().ok_or_else(|| expects(device, "a type"))?;
        let properties = &device["data"];
        let Some(memdev) = properties["memdev"].as_str() else { continue };
        let number = |names: [&str; 2]| names.iter().find_map(|name| properties[name].as_u64());
        devices.push(MemoryDevice {
            kind: kind.to_owned(),
            gpa: number(["addr", "memaddr"]).ok_or_else(|| expects(device, "addr or memaddr"))?,
            length: number(["max-size", "size"]).ok_or_else(|| expects(device, "a size"))?,
            memdev: memdev.to_owned(),
        });
    }
    Ok(devices)
}

/// Reads the answer of `query-memdev`.
///
/// # Errors
///
/// Fails at the first object without size, or that does not say whether it is shared.
pub fn parse_backends(answer: &Value) -> Result<Vec<MemoryBackend>, Error> {
    let expects = |value: &Value, expected| Error::Answer {
        command: "query-memdev",
        value: value.to_string(),
        expected,
    };
    let backends = answer.as_array().ok_or_else(|| expects(answer, "a list"))?;
    backends
        .iter()
        .map(|backend| {
            Ok(MemoryBackend {
                id: backend["id"].as_str().map(str::to_owned),
                size: backend["size"].as_u64().ok_or_else(|| expects(backend, "a size"))?,
                share: backend["share"].as_bool().ok_or_else(|| expects(backend, "share"))?,
            })
        })
        .collect()
}
