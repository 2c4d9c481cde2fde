// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The layout of Cloud Hypervisor's file `memory-ranges`, from the `state.json` beside it.
//!
//! `state.json` is a tree of snapshots. That of `memory-manager` has its state as JSON in a string:
//! `memory_ranges.data`, the ranges of the file one after another, each with `gpa` and `length`;
//! and `guest_ram_mappings`, the memory slots, each with `slot`, `gpa`, `size` and `zone_id`
//! (`vm-migration/src/lib.rs` and `vmm/src/memory_manager.rs` of Cloud Hypervisor).
//!
//! Each slot becomes a block. The ranges are not in the order of their addresses. They leave out
//! memory of virtio-mem that is not plugged, which becomes zero. They also leave out zones that are
//! files of their own. Such a guest is refused, because half of its memory would be missing.

use super::layout::{LayoutError, RawLayout};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, MAX_BLOCKS};
use serde_json::Value;

/// Largest `state.json` in bytes. It has the state of all devices and vCPUs.
pub const MAX_STATE_JSON: usize = 256 << 20;

/// Why no layout can be read from a `state.json`.
#[derive(Debug, thiserror::Error)]
pub enum StateJsonError {
    /// It is not JSON.
    #[error("{what} is not JSON")]
    Json {
        /// Which text.
        what: &'static str,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A field is missing or of another type.
    #[error(
        "it has no {field}, or that is not {expected}: it is not Cloud Hypervisor's state.json"
    )]
    Field {
        /// Path of the field.
        field: &'static str,
        /// What it must be.
        expected: &'static str,
    },
    /// Memory of a slot is in another file.
    #[error(
        "{missing:#x} bytes of slot {slot}, zone {zone:?}, are not in memory-ranges: a zone that is \
         a file of its own cannot be imported"
    )]
    OtherFile {
        /// Number of the slot.
        slot: u32,
        /// Its zone.
        zone: String,
        /// Bytes that are missing.
        missing: u64,
    },
    /// The ranges or slots are not possible.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// Reads the layout of `memory-ranges` from the bytes of `state.json`. The blocks have the numbers
/// of their slots as ids, and names like `mem0.1`: the zone and the slot.
///
/// # Errors
/// If a field is missing, or the ranges are not possible.
pub fn layout_of(state_json: &[u8], granularity: u64) -> Result<RawLayout, StateJsonError> {
    const STATE: &str = "snapshots.memory-manager.snapshot_data.state";
    let json = |what| move |source| StateJsonError::Json { what, source };
    let root: Value = serde_json::from_slice(state_json).map_err(json("it"))?;
    let state = root
        .pointer("/snapshots/memory-manager/snapshot_data/state")
        .and_then(Value::as_str)
        .ok_or(StateJsonError::Field { field: STATE, expected: "a string" })?;
    let state: Value = serde_json::from_str(state).map_err(json(STATE))?;

    let (mut table, mut always_there) = (BlockTable::new(), Vec::new());
    for slot in list(&state, "/guest_ram_mappings", "guest_ram_mappings")? {
        let number = number(slot, "slot", "guest_ram_mappings.slot")?;
        let id = u32::try_from(number).map_err(|_| StateJsonError::Field {
            field: "guest_ram_mappings.slot",
            expected: "a number of 32 bits",
        })?;
        let zone = slot.get("zone_id").and_then(Value::as_str).ok_or(StateJsonError::Field {
            field: "guest_ram_mappings.zone_id",
            expected: "a string",
        })?;
        let block = BlockGeometry {
            id,
            name: format!("{zone}.{id}"),
            gpa: self::number(slot, "gpa", "guest_ram_mappings.gpa")?,
            length: self::number(slot, "size", "guest_ram_mappings.size")?,
            granularity,
        };
        if slot.get("virtio_mem").and_then(Value::as_bool) != Some(true) {
            always_there.push((zone, block.clone()));
        }
        table.insert(block, MAX_BLOCKS).map_err(LayoutError::from)?;
    }
    let ranges = list(&state, "/memory_ranges/data", "memory_ranges.data")?.iter().map(|range| {
        let gpa = number(range, "gpa", "memory_ranges.data.gpa")?;
        Ok((gpa, number(range, "length", "memory_ranges.data.length")?))
    });
    let ranges = ranges.collect::<Result<Vec<_>, StateJsonError>>()?;
    let layout = RawLayout::of_ranges(table, ranges)?;
    for (zone, block) in always_there {
        let missing = block.length - layout.bytes_of(&block);
        if missing > 0 {
            return Err(StateJsonError::OtherFile { slot: block.id, zone: zone.into(), missing });
        }
    }
    Ok(layout)
}

fn list<'a>(
    state: &'a Value, pointer: &str, field: &'static str,
) -> Result<&'a Vec<Value>, StateJsonError> {
    let found = state.pointer(pointer).and_then(Value::as_array);
    found.ok_or(StateJsonError::Field { field, expected: "a list" })
}

fn number(object: &Value, key: &str, field: &'static str) -> Result<u64, StateJsonError> {
    let found = object.get(key).and_then(Value::as_u64);
    found.ok_or(StateJsonError::Field { field, expected: "a number" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::memory::PAGE_SIZE;
    use serde_json::json;

    fn state_json(memory: &Value) -> Vec<u8> {
        let data = json!({ "state": memory.to_string() });
        let memory = json!({ "snapshots": {}, "snapshot_data": data });
        let others = json!({ "snapshots": {}, "snapshot_data": { "state": "{}" } });
        let tree = json!({ "snapshots": { "cpu-manager": others, "memory-manager": memory } });
        tree.to_string().into_bytes()
    }

    /// A slot. That of zone `hot` is memory of virtio-mem.
    fn slot(slot: u32, gpa: u64, size: u64, zone: &str) -> Value {
        json!({ "slot": slot, "gpa": gpa, "size": size, "zone_id": zone, "file_offset": 0,
                "virtio_mem": zone == "hot" })
    }

    #[test]
    fn the_ranges_are_in_the_order_of_the_table_and_each_slot_is_a_block() {
        let memory = json!({
            "memory_ranges": { "data": [
                { "gpa": 4u64 << 30, "length": 2u64 << 20 },
                { "gpa": 0, "length": 3u64 << 30 },
                { "gpa": (4u64 << 30) + (8 << 20), "length": 2u64 << 20 },
            ]},
            "guest_ram_mappings": [slot(0, 0, 3 << 30, "mem0"), slot(7, 4 << 30, 1 << 30, "hot")],
            "next_memory_slot": 8,
        });
        let layout = layout_of(&state_json(&memory), PAGE_SIZE).unwrap();
        let parts: Vec<_> =
            layout.parts().iter().map(|part| (part.gpa, part.length, part.offset)).collect();
        let high = (4u64 << 30) + (8 << 20);
        assert_eq!(
            parts,
            [(4 << 30, 2 << 20, 0), (0, 3 << 30, 2 << 20), (high, 2 << 20, (3 << 30) + (2 << 20))]
        );
        let blocks: Vec<_> =
            layout.table().blocks().iter().map(|block| (block.id, &block.name[..])).collect();
        assert_eq!(blocks, [(0, "mem0.0"), (7, "hot.7")]);
    }

    #[test]
    fn what_is_not_a_state_json_is_refused_with_the_field() {
        let error = |bytes: &[u8]| crate::error::chain(&layout_of(bytes, PAGE_SIZE).unwrap_err());
        assert!(error(b"no").starts_with("it is not JSON"));
        assert!(error(b"{}").contains("no snapshots.memory-manager.snapshot_data.state"));
        let no_slots = json!({ "memory_ranges": { "data": [] } });
        assert!(error(&state_json(&no_slots)).contains("no guest_ram_mappings"));
        let outside = json!({
            "memory_ranges": { "data": [{ "gpa": 4096, "length": 4096 }] },
            "guest_ram_mappings": [slot(0, 0, 4096, "mem0")],
        });
        let said = error(&state_json(&outside));
        assert!(said.contains("0x1000 + 0x1000 does not lie in one block"), "{said}");
        // A file of its own is no part of memory-ranges.
        let other_file = json!({
            "memory_ranges": { "data": [{ "gpa": 0, "length": 4096 }] },
            "guest_ram_mappings": [slot(0, 0, 4096, "mem0"), slot(1, 8192, 8192, "shared")],
        });
        let said = error(&state_json(&other_file));
        assert!(said.starts_with("0x2000 bytes of slot 1, zone \"shared\", are not in"), "{said}");
    }
}
