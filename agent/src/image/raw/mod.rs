// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Raw files of guest memory: importing them as images, and exporting images as raw files.
//!
//! A raw file has the memory of a guest and nothing else: no header and no checksums. Firecracker,
//! Cloud Hypervisor and QEMU have such files. What is at which offset is not in the file, so it
//! comes from elsewhere: a [`RawLayout`].
//!
//! - [`layout`]: which guest memory is at which offset of a raw file;
//! - [`named`]: the layouts that follow from the length of the file;
//! - [`cloud_hypervisor`]: the layout in Cloud Hypervisor's `state.json`;
//! - [`file`](mod@file): a raw file that is read, and which of its pages have data;
//! - [`import`](mod@import): a raw file becomes an image;
//! - [`export`](mod@export): an image becomes a raw file;
//! - [`pieces`]: pieces of the VMM's state and their files;
//! - [`error`]: what is wrong with a raw file.

pub mod cloud_hypervisor;
pub mod error;
pub mod export;
pub mod file;
pub mod import;
pub mod layout;
pub mod named;
pub mod pieces;

pub use error::{RawError, RawFault};
pub use export::{Exported, export};
pub use file::RawFile;
pub use import::{Imported, import};
pub use layout::{LayoutError, RawBlock, RawLayout};
pub use pieces::Piece;

use std::fmt;
use std::path::Path;

/// Where an import or an export writes, and how.
#[derive(Clone, Copy)]
pub struct Output<'a> {
    /// The new file.
    pub path: &'a Path,
    /// Whether files that exist may be replaced.
    pub replace: bool,
    /// Number of threads.
    pub threads: usize,
    /// Called with the number of pages that are done, and of all pages.
    pub show: &'a (dyn Fn(u64, u64) + Sync),
}

impl fmt::Debug for Output<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, replace, threads, .. } = self;
        let mut shown = f.debug_struct("Output");
        shown.field("path", path).field("replace", replace).field("threads", threads);
        shown.finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
