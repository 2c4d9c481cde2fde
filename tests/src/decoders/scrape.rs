// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! HTTP requests for the metrics.

use super::heap::within;
use pageferry_agent::metrics::request::{MAX_HEAD, parse};

/// Most memory that the parser takes: its headers, and the accepted media types.
const FAIR: usize = 2 * MAX_HEAD;

/// A request is accepted only with a whole head, within the limit. What follows the head changes
/// nothing. Nothing is left undecided once the limit is reached.
pub fn scrape(data: &[u8]) -> bool {
    let parsed = within(FAIR, || parse(data));
    assert!(parsed.is_some() || data.len() < MAX_HEAD, "{} bytes are undecided", data.len());
    if let Some(parsed) = parsed {
        super::same(parse(&[data, b"\r\n\r\nmore"].concat()), Some(parsed));
    }
    match parsed {
        Some(Ok(request)) => {
            let line = data.iter().position(|byte| !b"\r\n".contains(byte)).unwrap_or_default();
            let method: &[u8] = if request.head_only { b"HEAD " } else { b"GET " };
            assert!(data[line..].starts_with(method));
            let head = data.len().min(MAX_HEAD);
            let ends = |end: &[u8]| data[..head].windows(end.len()).any(|bytes| bytes == end);
            assert!(ends(b"\n\r\n") || ends(b"\n\n"), "the head has no end");
            true
        }
        Some(Err(refusal)) => {
            assert!(refusal.status().starts_with('4'));
            super::refused(&refusal)
        }
        None => false,
    }
}

/// Requests of scrapers, and the shortest one.
pub fn scrape_seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = [
        "GET /metrics HTTP/1.1\r\n\r\n",
        "HEAD /metrics HTTP/1.0\r\nHost: a\r\n\r\n",
        "GET /metrics?name[]=a HTTP/1.1\nAccept: text/plain\n\n",
        "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9091\r\nUser-Agent: Prometheus/3.5.0\r\n\
         Accept: application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
         text/plain;version=0.0.4;q=0.2,*/*;q=0.1\r\nAccept-Encoding: gzip\r\n\
         X-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    // What is no text takes no more memory than text.
    let strange = [&b"Accept: "[..], &[0xff; 60], b"\n"].concat().repeat(50);
    seeds.push([&b"GET /metrics HTTP/1.1\n"[..], &strange, b"\n"].concat());
    seeds
}
