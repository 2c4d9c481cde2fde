// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What every decoder must do with arbitrary bytes.
//!
//! A [`Target`] is an ordinary function over bytes. It panics if a decoder panics, if decoding
//! takes more memory than the bytes account for, or if the decoded value does not match the bytes.
//! For that, the value is encoded again. The result is compared with the bytes if the encoding is
//! unique. Otherwise, with reserved fields or a free order, it is decoded again and the values are
//! compared. If there is a naive model, the decoder must refuse exactly what the model refuses.
//!
//! The same functions run twice: as a normal test over thousands of repeatable inputs
//! ([`hammer()`]), and under libFuzzer (`tests/fuzz`).
//!
//! - [`control`]: frames, requests, replies, hooks, vhost-user's own bodies; [`stream`]: what
//!   travels between agents;
//! - [`handshake`]: what comes before a peer has proved who it is;
//! - [`image`]: the file of a saved guest, and its index in a store; [`memory`]: ranges and blocks;
//!   [`address`](mod@address): addresses that a user writes; [`scrape`](mod@scrape): HTTP requests
//!   for the metrics;
//! - [`queues`]: queues of the agent's devices; [`relay`]: messages of their front-ends;
//! - [`heap`]: how much memory a decoder takes; [`mod@hammer`]: random and mutated inputs;
//!   [`mod@kept`]: what fuzzers have found.

pub mod address;
pub mod control;
pub mod hammer;
pub mod handshake;
pub mod heap;
pub mod image;
pub mod kept;
pub mod memory;
pub mod queues;
pub mod relay;
pub mod scrape;
pub mod stream;

pub use hammer::hammer;

/// A decoder and the check of its results.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, which is also the name of its file in `tests/fuzz/fuzz_targets`.
    pub name: &'static str,
    /// Decodes the bytes and checks the result. Returns whether they were accepted.
    pub run: fn(&[u8]) -> bool,
    /// Inputs that are accepted, with at least one for each form.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: [Target; 31] = [
    Target { name: "control_frame", run: control::control_frame, seeds: control::frame_seeds },
    Target { name: "request", run: control::request, seeds: control::request_seeds },
    Target { name: "reply", run: control::reply, seeds: control::reply_seeds },
    Target { name: "hook", run: control::hook, seeds: control::hook_seeds },
    Target { name: "journal", run: control::journal, seeds: control::journal_seeds },
    Target { name: "vhost_user", run: control::vhost_user, seeds: control::vhost_user_seeds },
    Target { name: "hello", run: stream::hello, seeds: stream::hello_seeds },
    Target { name: "record", run: stream::record, seeds: stream::record_seeds },
    Target {
        name: "record_stream",
        run: stream::record_stream,
        seeds: stream::record_stream_seeds,
    },
    Target { name: "payload", run: stream::payload, seeds: stream::payload_seeds },
    Target { name: "tls_stranger", run: handshake::tls_stranger, seeds: handshake::stranger_seeds },
    Target {
        name: "tls_certificate",
        run: handshake::tls_certificate,
        seeds: handshake::certificate_seeds,
    },
    Target {
        name: "tls_disturbed",
        run: handshake::tls_disturbed,
        seeds: handshake::disturbed_seeds,
    },
    Target { name: "image_header", run: image::image_header, seeds: image::image_header_seeds },
    Target {
        name: "image_contents",
        run: image::image_contents,
        seeds: image::image_contents_seeds,
    },
    Target { name: "image_states", run: image::image_states, seeds: image::image_states_seeds },
    Target { name: "working_set", run: image::working_set, seeds: image::working_set_seeds },
    Target {
        name: "sealed_working_set",
        run: image::sealed_working_set,
        seeds: image::sealed_working_set_seeds,
    },
    Target { name: "stored_index", run: image::stored_index, seeds: image::stored_index_seeds },
    Target { name: "image_key", run: image::image_key, seeds: image::image_key_seeds },
    Target { name: "geometry", run: memory::geometry, seeds: memory::geometry_seeds },
    Target { name: "range", run: memory::range, seeds: memory::range_seeds },
    Target { name: "address", run: address::address, seeds: address::address_seeds },
    Target {
        name: "balloon_inflate",
        run: queues::balloon_inflate,
        seeds: queues::page_number_seeds,
    },
    Target {
        name: "balloon_deflate",
        run: queues::balloon_deflate,
        seeds: queues::page_number_seeds,
    },
    Target {
        name: "balloon_statistics",
        run: queues::balloon_statistics,
        seeds: queues::statistics_seeds,
    },
    Target { name: "balloon_hints", run: queues::balloon_hints, seeds: queues::hint_seeds },
    Target { name: "balloon_reports", run: queues::balloon_reports, seeds: queues::report_seeds },
    Target { name: "mem_requests", run: queues::mem_requests, seeds: queues::mem_request_seeds },
    Target {
        name: "device_messages",
        run: relay::device_messages,
        seeds: relay::device_message_seeds,
    },
    Target { name: "scrape", run: scrape::scrape, seeds: scrape::scrape_seeds },
];

/// The first byte, which chooses among several decoders, and the rest.
fn choice(bytes: &[u8]) -> (u8, &[u8]) {
    bytes.split_first().map_or((0, bytes), |(first, rest)| (*first, rest))
}

/// Fails if two values differ. An error on either side is shown as the user would see it.
#[track_caller]
fn same<T: PartialEq + std::fmt::Debug>(again: T, value: T) {
    assert_eq!(again, value, "what was decoded is encoded to something else");
}

/// Checks a refusal: it must have a sentence that says why. Returns false, for not accepted.
fn refused(error: &impl std::error::Error) -> bool {
    assert!(!error.to_string().is_empty());
    false
}
