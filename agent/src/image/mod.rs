// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Image files of guests. [`pageferry_protocol::image`], and `docs/image.md` in the repository,
//! describe the format.
//!
//! - [`bytes`]: reads and writes at an offset, and where a file has data;
//! - [`mod@file`]: the file of an image that is read, of this machine or from a store;
//! - [`new_file`]: creating a file atomically;
//! - [`writer`]: writing a new image;
//! - [`sums`]: the checksums or seals of pages, collected before they are written;
//! - `sections`: the parts of the file that are not pages;
//! - [`seal`]: images that are encrypted and authenticated with the operator's key;
//! - [`reader`]: reading an image. Each part is checked before it is used;
//! - [`blocks`]: comparing the blocks of two tables;
//! - [`chain`]: an increment with the images that it builds on;
//! - [`verify`]: checking all bytes of a chain;
//! - [`mod@copy`]: copying an image as it is, also from and to stores;
//! - [`merge`]: merging a chain into one full image;
//! - [`map_picture`]: counting the pages of a guest by their state, and drawing them;
//! - [`raw`]: importing raw files of guest memory as images, and exporting images as raw files;
//! - [`workers`]: sharing work on extents among threads;
//! - [`error`]: what is wrong with an image.

pub mod blocks;
pub mod bytes;
pub mod chain;
pub mod copy;
pub mod error;
pub mod file;
pub mod map_picture;
pub mod merge;
pub mod new_file;
pub mod raw;
pub mod reader;
pub mod seal;
mod sections;
pub mod sums;
pub mod verify;
pub mod workers;
pub mod writer;

pub use chain::Chain;
pub use error::{ImageError, ImageFault};
pub use reader::Image;
pub use seal::ImageKey;
pub use writer::ImageWriter;

#[cfg(test)]
mod sealed_tests;
#[cfg(test)]
pub(crate) mod test_support;
#[cfg(test)]
mod tests;
