//! The page stream: what travels between two agents, or between an agent and a VMM. A reader needs
//! nothing but the bytes.
//!
//! Everything on a stream, in both directions, is a *record*: a header of 32 bytes and a payload.
//! See `docs/page-stream.md`.
//!
//! - [`record`]: the header, its limits and its checksum;
//! - [`hello`]: how a stream opens: versions, features, the block table;
//! - [`table`]: comparing the block tables of both sides;
//! - [`answer`]: accept, reject, and errors;
//! - [`payload`]: the payloads of the other records.
//!
//! # Order
//!
//! A pass ends with a barrier record on every stream, and the receiver applies nothing of a pass
//! before all streams ended the one before. So within one pass no two records may speak of the same
//! page, and the last pass that speaks of it is right. Discards found at a sync go out before the
//! pages of the pass that follows, and no page of theirs is in it.

pub mod answer;
pub mod hello;
pub mod payload;
pub mod record;
pub mod table;

pub use hello::{Hello, STREAM_VERSION};
pub use record::{Kind, MAX_PAYLOAD, RECORD_SIZE, RecordError, RecordHeader};
