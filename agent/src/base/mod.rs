// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bases: files whose pages all clones of an image share.
//!
//! A base is a file on tmpfs. It says of which image it is, and has a bitmap of filled pages for
//! each block of the image, and then the blocks one after another. The blocks are a hole at first.
//! The agents of the clones fill it together: each puts the pages into it that its guest touches,
//! and then all others ([`crate::memory::base_placer`]). So a page is read from the image once for
//! all clones, and is in memory once. A clone maps the base privately, so no guest writes to it.
//!
//! - [`files`]: the folder of the bases, and which are in use;
//! - [`name`]: which images have the same base, and where its blocks lie.

pub mod files;
pub mod name;

pub use files::{BaseFiles, open, open_again};
pub use name::{BaseName, Layout, Place};
