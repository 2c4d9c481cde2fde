// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sealing: images that are encrypted and authenticated with the operator's key.
//!
//! [`pageferry_protocol::image::sealing`] has the format. Each image has keys of its own, which are
//! derived from the operator's key and a random salt (HKDF-SHA-256). So no nonce of one image can
//! meet that of another, and nothing of one image can be opened as a part of another. Pages and
//! pieces of sections are sealed with AES-256-GCM, the header has an HMAC-SHA-256.
//!
//! - [`key`]: the operator's key;
//! - [`source`]: where the operator's key is read from: a file or a descriptor;
//! - [`handover`]: the key on its way to the next program of this process;
//! - [`sealer`]: seals what is written, and opens what is read;
//! - `wiped`: memory that is zeroed when its value is dropped.

pub mod handover;
pub mod key;
pub mod sealer;
pub mod source;
mod wiped;

pub use key::ImageKey;
pub use sealer::{Sealer, Unsealer};
pub use source::{KeyError, KeySource};
