// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The page stream: what travels between two agents, or between an agent and a VMM. A reader needs
//! nothing but the bytes.
//!
//! Everything on a stream, in both directions, is a *record*: a header of 32 bytes and a payload.
//! See `docs/page-stream.md` in the repository.
//!
//! - [`record`]: the header, its limits and its checksum;
//! - [`hello`]: how a stream opens: versions, features, the block table;
//! - [`table`]: comparing the block tables of both sides;
//! - [`answer`]: accept, reject, and errors;
//! - [`payload`]: the payloads of the other records.
//!
//! # Order
//!
//! A pass ends with a barrier record on every stream. The receiver applies nothing of a pass before
//! all streams have ended the previous one. So within one pass no two records may name the same
//! page, and the last pass that names a page is right. Discards that a sync finds are sent before
//! the pages of the next pass, which contains none of those pages.

pub mod answer;
pub mod hello;
pub mod payload;
pub mod record;
pub mod table;

pub use hello::{Hello, STREAM_VERSION};
pub use record::{Kind, MAX_PAYLOAD, RECORD_SIZE, RecordError, RecordHeader};
