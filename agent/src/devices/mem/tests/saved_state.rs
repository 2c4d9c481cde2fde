// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state that travels with a migration.

use super::*;

#[test]
fn state_comes_back_with_the_plugged_blocks_of_the_memory() {
    let memory = Memory::new();
    let mut source = device(&memory, 4);
    source.process(plug(1, 3));
    source.set_requested_size(BLOCK).unwrap();
    let mut destination = VirtioMem::new(REGION, &memory).unwrap();
    destination.load(&source.save()).unwrap();
    assert_eq!(destination.config(), source.config());
    assert_eq!(destination.save(), source.save());
}

#[test]
fn state_that_is_not_valid_is_refused_by_field_and_changes_nothing() {
    let memory = Memory::new();
    let mut device = device(&memory, 4);
    device.process(plug(1, 3));
    let (saved, before) = (device.save(), device.config());
    let mut with = |at: usize, value: u64| {
        let mut state = saved.clone();
        state[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let error = device.load(&state).unwrap_err();
        assert_eq!(device.config(), before);
        error.to_string()
    };
    let fields = [
        (4, "block_size", "0x10000000"),
        (12, "addr", "0x100000000"),
        (20, "region_size", "0xc0000000"),
        (28, "has_node_id", "0x1"),
        (36, "node_id", "0x3"),
    ];
    for (at, field, configured) in fields {
        assert_eq!(
            with(at, 7),
            format!("{field} is 0x7 in the saved state, allowed: {configured} as configured here")
        );
    }
    assert_eq!(
        with(44, 7),
        "requested_size is 7 bytes, allowed: multiples of the block_size 256 MiB"
    );
    assert_eq!(with(44, 13 * BLOCK), "requested_size is 3328 MiB, allowed: 0 bytes to 3 GiB");
    assert_eq!(with(52, 3 * BLOCK), "usable_region_size is 768 MiB, allowed: 1 GiB to 3 GiB");
    assert!(with(52, 8 * BLOCK + 1).starts_with("usable_region_size is 2147483649 bytes"));
    let error = device.load(&[&saved[..], &[0]].concat()).unwrap_err();
    assert_eq!(error, LoadError::Decode(DecodeError::TrailingBytes { extra: 1 }));
    let newer = [&(STATE_VERSION + 1).to_le_bytes()[..], &saved[4..]].concat();
    let error = device.load(&newer).unwrap_err();
    assert_eq!(error.source().unwrap().to_string(), "version is 0x2, allowed: 1");
}

proptest! {
    #[test]
    fn state_that_is_cut_or_changed_never_panics_and_leaves_a_valid_device(
        keep in 0usize..70, at in 0usize..60,
        bytes in prop::collection::vec(any::<u8>(), 0..10),
    ) {
        let memory = Memory::new();
        let mut device = device(&memory, 4);
        let mut state = device.save();
        state.truncate(keep);
        state.splice(at.min(keep).min(state.len()).., bytes);
        if device.load(&state).is_ok() {
            let (requested, usable, _) = sizes(&device);
            prop_assert!(requested <= usable && usable <= BLOCKS);
        }
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let memory = Memory::new();
        let mut device = device(&memory, 4);
        prop_assert!(device.load(&bytes).is_err());
        prop_assert_eq!(device.handle(&bytes, RESPONSE_SIZE).is_ok(), bytes.len() >= 24);
    }
}
