// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests, responses and the configuration space of virtio-mem as bytes.
//!
//! The layouts are those of virtio 1.3, sections 5.15.4 and 5.15.6, and of the kernel's
//! `linux/virtio_mem.h`. All numbers are little-endian.

use zerocopy::byteorder::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The device id of virtio-mem (`VIRTIO_ID_MEM`).
pub const DEVICE_ID: u32 = 24;
/// Length of a request in bytes.
pub const REQUEST_SIZE: usize = size_of::<RawRequest>();
/// Length of a response in bytes.
pub const RESPONSE_SIZE: usize = size_of::<RawResponse>();
/// Length of the configuration space in bytes.
pub const CONFIG_SIZE: usize = size_of::<RawConfig>();

/// Feature: `node_id` is valid and is a proximity domain of ACPI (`VIRTIO_MEM_F_ACPI_PXM`).
pub const FEATURE_ACPI_PXM: u64 = 1 << 0;
/// Feature: the driver does not read unplugged memory (`VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`).
pub const FEATURE_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// The bits of virtio's features that belong to the type of the device (virtio 1.3, section 2.2).
pub const DEVICE_FEATURES: u64 = (1 << 24) - 1;

/// Why a buffer of the driver, or a read of the configuration space, cannot be served. It breaks
/// the protocol, and there is no answer to the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The request is too short.
    #[error("the request has {length} bytes, allowed: at least {REQUEST_SIZE}")]
    ShortRequest {
        /// Its length in bytes.
        length: usize,
    },
    /// The buffer for the response is too short.
    #[error("the response buffer has {length} bytes, allowed: at least {RESPONSE_SIZE}")]
    ShortResponse {
        /// Its length in bytes.
        length: usize,
    },
    /// The read ends outside the configuration space.
    #[error(
        "a read of {size} bytes at offset {offset} of the configuration space, allowed: \
         up to byte {CONFIG_SIZE}"
    )]
    OutsideConfig {
        /// Offset of the read in bytes.
        offset: u32,
        /// Size of the read in bytes.
        size: u32,
    },
}

/// Consecutive blocks, as the driver names them: nothing is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRun {
    /// Guest physical address of the first block.
    pub addr: u64,
    /// Number of blocks.
    pub count: u16,
}

/// A request of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Plug blocks that are unplugged.
    Plug(BlockRun),
    /// Unplug blocks that are plugged.
    Unplug(BlockRun),
    /// Unplug all blocks.
    UnplugAll,
    /// Report the state of blocks.
    State(BlockRun),
    /// A type that the specification does not define.
    Unknown(u16),
}

impl Request {
    /// Decodes a request. Padding, and bytes after the request, are ignored as the specification
    /// demands.
    ///
    /// # Errors
    /// If there are fewer than [`REQUEST_SIZE`] bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (raw, _) = RawRequest::ref_from_prefix(bytes)
            .map_err(|_| WireError::ShortRequest { length: bytes.len() })?;
        let blocks = BlockRun { addr: raw.addr.get(), count: raw.nb_blocks.get() };
        Ok(match raw.kind.get() {
            0 => Self::Plug(blocks),
            1 => Self::Unplug(blocks),
            2 => Self::UnplugAll,
            3 => Self::State(blocks),
            kind => Self::Unknown(kind),
        })
    }
}

/// The state of a run of blocks. The values are those in the response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum BlockState {
    /// All are plugged.
    Plugged = 0,
    /// All are unplugged.
    Unplugged = 1,
    /// Some are plugged and some are not.
    Mixed = 2,
}

/// The answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Response {
    /// Done.
    Ack,
    /// The answer to [`Request::State`].
    State(BlockState),
    /// The driver would have more than the requested size.
    Nack,
    /// Not now. Linux tries again after 50 seconds or more, and at once after a configuration
    /// interrupt.
    Busy,
    /// The request is wrong. Linux then gives up the device for good.
    Error,
}

impl Response {
    /// The bytes of the response.
    pub fn encode(self) -> [u8; RESPONSE_SIZE] {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::State(state) => (0, state as u16),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        zerocopy::transmute!(RawResponse {
            kind: kind.into(),
            padding: [0; 6],
            state: state.into()
        })
    }
}

/// The fields of the configuration space. All are read-only for the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Size and alignment of a block in bytes.
    pub block_size: u64,
    /// Proximity domain of ACPI; has no meaning without [`FEATURE_ACPI_PXM`].
    pub node_id: u16,
    /// Guest physical address of the region.
    pub addr: u64,
    /// Size of the region in bytes.
    pub region_size: u64,
    /// Bytes from the start of the region in which the driver may plug blocks.
    pub usable_region_size: u64,
    /// Plugged memory in bytes.
    pub plugged_size: u64,
    /// Plugged memory that the operator wants, in bytes.
    pub requested_size: u64,
}

impl Config {
    /// The bytes of the configuration space.
    pub fn encode(&self) -> [u8; CONFIG_SIZE] {
        zerocopy::transmute!(RawConfig {
            block_size: self.block_size.into(),
            node_id: self.node_id.into(),
            padding: [0; 6],
            addr: self.addr.into(),
            region_size: self.region_size.into(),
            usable_region_size: self.usable_region_size.into(),
            plugged_size: self.plugged_size.into(),
            requested_size: self.requested_size.into(),
        })
    }

    /// `size` bytes of the configuration space from `offset`.
    ///
    /// A read that ends outside is an error and is not filled up with zeroes. The peer takes the
    /// device for one with more fields, zeroes would confirm that, and a peer must not be able to
    /// make this side allocate what it asks for. vhost-user has an answer for such a read: an empty
    /// payload.
    ///
    /// # Errors
    /// If the read ends outside the configuration space.
    pub fn read(&self, offset: u32, size: u32) -> Result<Vec<u8>, WireError> {
        let (first, length) = (offset as usize, size as usize);
        let bytes = self.encode();
        let read = bytes.get(first..).and_then(|rest| rest.get(..length));
        read.map(<[u8]>::to_vec).ok_or(WireError::OutsideConfig { offset, size })
    }
}

/// `struct virtio_mem_req`.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRequest {
    kind: U16,
    _padding: [u8; 6],
    addr: U64,
    nb_blocks: U16,
    _more_padding: [u8; 6],
}

/// `struct virtio_mem_resp`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct RawResponse {
    kind: U16,
    padding: [u8; 6],
    state: U16,
}

/// `struct virtio_mem_config`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct RawConfig {
    block_size: U64,
    node_id: U16,
    padding: [u8; 6],
    addr: U64,
    region_size: U64,
    usable_region_size: U64,
    plugged_size: U64,
    requested_size: U64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CONFIG: Config = Config {
        block_size: 0x0102_0304_0506_0708,
        node_id: 0x090a,
        addr: 0x1112_1314_1516_1718,
        region_size: 0x2122_2324_2526_2728,
        usable_region_size: 0x3132_3334_3536_3738,
        plugged_size: 0x4142_4344_4546_4748,
        requested_size: 0x5152_5354_5556_5758,
    };

    #[test]
    fn sizes_are_those_of_the_specification() {
        assert_eq!((REQUEST_SIZE, RESPONSE_SIZE, CONFIG_SIZE), (24, 10, 56));
    }

    #[test]
    fn request_ignores_padding_and_what_follows() {
        let mut bytes = [0xff; 40];
        bytes[8..16].copy_from_slice(&0x1_2345_6000u64.to_le_bytes());
        bytes[16..18].copy_from_slice(&[2, 1]);
        let blocks = BlockRun { addr: 0x1_2345_6000, count: 0x102 };
        let expected = [
            Request::Plug(blocks),
            Request::Unplug(blocks),
            Request::UnplugAll,
            Request::State(blocks),
            Request::Unknown(4),
            Request::Unknown(0x100),
        ];
        for (kind, request) in [0u16, 1, 2, 3, 4, 0x100].into_iter().zip(expected) {
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            assert_eq!(Request::decode(&bytes), Ok(request));
            assert_eq!(Request::decode(&bytes[1..24]), Err(WireError::ShortRequest { length: 23 }));
        }
    }

    #[test]
    fn response_has_its_type_first_and_the_state_last() {
        let ends = |response: Response| {
            let bytes = response.encode();
            assert_eq!(bytes[1..8], [0; 7]);
            (bytes[0], bytes[8], bytes[9])
        };
        assert_eq!(ends(Response::Ack), (0, 0, 0));
        assert_eq!(ends(Response::State(BlockState::Plugged)), (0, 0, 0));
        assert_eq!(ends(Response::State(BlockState::Unplugged)), (0, 1, 0));
        assert_eq!(ends(Response::State(BlockState::Mixed)), (0, 2, 0));
        assert_eq!(ends(Response::Nack), (1, 0, 0));
        assert_eq!(ends(Response::Busy), (2, 0, 0));
        assert_eq!(ends(Response::Error), (3, 0, 0));
    }

    #[test]
    fn config_fields_are_at_their_offsets() {
        let fields = [
            (0, CONFIG.block_size),
            (8, CONFIG.node_id.into()),
            (16, CONFIG.addr),
            (24, CONFIG.region_size),
            (32, CONFIG.usable_region_size),
            (40, CONFIG.plugged_size),
            (48, CONFIG.requested_size),
        ];
        for (offset, value) in fields {
            assert_eq!(CONFIG.read(offset, 8), Ok(value.to_le_bytes().to_vec()), "at {offset}");
        }
    }

    #[test]
    fn config_read_outside_is_an_error_with_its_numbers() {
        assert_eq!(CONFIG.read(0, 56).unwrap().len(), 56);
        assert_eq!(CONFIG.read(56, 0), Ok(vec![]));
        for (offset, size) in [(0, 57), (49, 8), (57, 0), (u32::MAX, 1), (1, u32::MAX)] {
            assert_eq!(CONFIG.read(offset, size), Err(WireError::OutsideConfig { offset, size }));
        }
        let error = CONFIG.read(49, 8).unwrap_err().to_string();
        assert_eq!(
            error,
            "a read of 8 bytes at offset 49 of the configuration space, allowed: up to byte 56"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_too_short(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(Request::decode(&bytes).is_ok(), bytes.len() >= REQUEST_SIZE);
        }

        #[test]
        fn any_config_read_is_a_part_of_the_whole(
            offset in prop_oneof![0u32..70, any::<u32>()],
            size in prop_oneof![0u32..70, any::<u32>()],
        ) {
            let (first, length) = (offset as usize, size as usize);
            match CONFIG.read(offset, size) {
                Ok(bytes) => prop_assert_eq!(&bytes, &CONFIG.encode()[first..first + length]),
                Err(_) => prop_assert!(first + length > CONFIG_SIZE),
            }
        }
    }
}
