// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What in QEMU's account of its memory is not understood.

/// An account of RAM that is not understood, or that contradicts itself.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A line that does not have the form of its command.
    #[error("line {line:?} of {command} is not understood: expected {expected}")]
    Line {
        /// The command whose output it is.
        command: &'static str,
        /// The line.
        line: String,
        /// What was expected.
        expected: &'static str,
    },
    /// The address space of the machine is missing.
    #[error("info mtree -f shows no flat view of address space \"memory\"")]
    NoFlatView,
    /// A QMP answer that does not have the form of its command.
    #[error("answer {value} of {command} is not understood: expected {expected}")]
    Answer {
        /// The command.
        command: &'static str,
        /// The part of the answer.
        value: String,
        /// What was expected.
        expected: &'static str,
    },
    /// A name of a memory region that fits more than one RAM block.
    #[error("memory region {region:?} can be RAM block {first:?} or {second:?}")]
    TwoBlocks {
        /// The region.
        region: String,
        /// A block.
        first: String,
        /// Another block.
        second: String,
    },
    /// A RAM block that is nowhere in the guest's address space.
    #[error("RAM block {block:?} has no guest address: it is in no flat view and in no device")]
    NoAddress {
        /// The block.
        block: String,
    },
    /// A range that its block does not have.
    #[error(
        "range {offset:#x} + {length:#x} at guest address {gpa:#x} is outside RAM block {block:?} \
         of {block_length:#x} bytes"
    )]
    OutsideBlock {
        /// The block.
        block: String,
        /// Offset in the block.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Guest physical address.
        gpa: u64,
        /// Size of the block.
        block_length: u64,
    },
    /// Memory that the guest sees at two addresses, neither of which is in the gap of another.
    #[error(
        "offset {offset:#x} of RAM block {block:?} is at guest address {first:#x} and {second:#x}"
    )]
    TwoAddresses {
        /// The block.
        block: String,
        /// Offset in the block.
        offset: u64,
        /// A guest physical address.
        first: u64,
        /// Another one.
        second: u64,
    },
    /// A hidden part of a block that would lie before address 0 or after the last address.
    #[error("offset {offset:#x} of RAM block {block:?} would be outside the guest's addresses")]
    AddressOverflow {
        /// The block.
        block: String,
        /// Offset in the block.
        offset: u64,
    },
    /// Two RAM blocks at one address.
    #[error("RAM blocks {first:?} and {second:?} overlap at guest address {gpa:#x}")]
    Overlap {
        /// A block.
        first: String,
        /// Another block.
        second: String,
        /// First guest physical address that both have.
        gpa: u64,
    },
}
