// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Images in object stores, under names such as `s3://BUCKET/NAME`. `docs/store.md` in the
//! repository says how they lie there.
//!
//! An image in a store is the image file, in pieces. So whatever reads an image reads a file of the
//! cache, after it has had the pieces of its range brought there ([`StoredFile::ensure`]); and
//! whatever writes one writes a file of the cache, which is uploaded when it is complete
//! ([`NewObject`]). Nothing else of the agent knows of stores.
//!
//! - [`client`]: what the rest of the agent calls. It asks a service, and waits;
//! - `service`: answers, on an asynchronous runtime;
//! - [`process`]: the process in which it runs beside an agent in a sandbox;
//! - `wire`: the messages between the two;
//! - `names`: from a name to a store, with credentials; `profile`: those of a profile;
//! - `fetch`: pieces come into the cache; `latency`: when an answer is late;
//! - `cache`: the folder that all agents of a user share;
//! - `upload`: an image goes into a store;
//! - [`maintain`]: listing images, and removing what belongs to none;
//! - [`error`]: what can go wrong, in words.

mod cache;
pub mod client;
pub mod error;
mod fetch;
mod latency;
pub mod maintain;
mod names;
pub mod process;
mod profile;
mod service;
mod upload;
mod wire;

pub use client::{NewObject, StoredFile, is_stored};
pub use error::{StoreError, StoreErrorKind};
