// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a command line cannot be rewritten.

/// A command line that pageferry does not start.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The first argument is missing.
    #[error("the command line is empty; it must begin with the program, as qemu-system-x86_64")]
    NoProgram,
    /// An option that cannot be combined with pageferry.
    #[error("{option} cannot be used under pageferry: {advice}")]
    Refused {
        /// The option with the part of its value that matters.
        option: String,
        /// The reason, and what to do instead.
        advice: &'static str,
    },
    /// A value of ours that is not text.
    #[error("{option} {value:?} is not UTF-8; memory options must be UTF-8")]
    NotUtf8 {
        /// The option.
        option: &'static str,
        /// Its value, with replacement characters.
        value: String,
    },
    /// A JSON value that mentions memory and is not JSON.
    #[error(
        "{option} {value} is not JSON that is understood: {reason}; strings must be in double \
         quotes, and sizes must be numbers of bytes"
    )]
    NotJson {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What the JSON parser, or QEMU's schema, does not allow.
        reason: String,
    },
    /// A property that is not there.
    #[error("{object} has no {property}=; QEMU needs one")]
    PropertyMissing {
        /// The option or object.
        object: String,
        /// The property.
        property: &'static str,
    },
    /// A size that QEMU does not understand.
    #[error(
        "{what} {value:?} is not a size; allowed are numbers with an optional fraction and suffix, \
         as 512M or 1.5G (suffixes b, k, M, G, T, P, E)"
    )]
    NotASize {
        /// The option or property.
        what: String,
        /// Its value.
        value: String,
    },
    /// A size that no file with pages of that size can have.
    #[error(
        "size {size} of memory {name:?} is not allowed; it must be a positive multiple of its page \
         size, {page_size}"
    )]
    SizeNotInPages {
        /// The memory object.
        name: String,
        /// Bytes asked for.
        size: u64,
        /// Bytes of a page.
        page_size: u64,
    },
    /// A switch that is neither on nor off.
    #[error("{property}={value} of memory {name:?} is neither on nor off")]
    NotASwitch {
        /// The memory object.
        name: String,
        /// The property.
        property: String,
        /// Its value.
        value: String,
    },
    /// The machine's memory is an object that is not in the command line.
    #[error(
        "-machine memory-backend={id} names no memory object of this command line; add an -object \
         memory-backend-ram with id={id}, or leave memory-backend out"
    )]
    NoSuchBackend {
        /// The name.
        id: String,
    },
}
