// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The head of an HTTP request: `GET` or `HEAD` of `/metrics`.
//!
//! The head may have at most [`MAX_HEAD`] bytes. A body is not read: no request that is answered
//! has one.

use super::format::Format;

/// Longest head of a request, in bytes.
pub const MAX_HEAD: usize = 4096;
/// Most headers of a request.
const MAX_HEADERS: usize = 64;

/// A request that is answered with the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The format that the client accepts.
    pub format: Format,
    /// True if the client asked only for the head of the answer.
    pub head_only: bool,
}

/// A request that is refused. Prints the sentence that the client gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The bytes are no HTTP request.
    #[error("this is no request of HTTP/1.0 or HTTP/1.1")]
    Malformed,
    /// There is something else at the path, which is nothing.
    #[error("the metrics of this agent are at /metrics, and there is nothing else")]
    NotFound,
    /// The method is neither `GET` nor `HEAD`.
    #[error("the metrics can only be read: use GET or HEAD")]
    Method,
    /// The head is too long, or has too many headers.
    #[error("the head of a request may have {MAX_HEAD} bytes and {MAX_HEADERS} headers")]
    TooLong,
}

impl Refusal {
    /// The status code and its text.
    pub fn status(self) -> &'static str {
        match self {
            Self::Malformed => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::Method => "405 Method Not Allowed",
            Self::TooLong => "431 Request Header Fields Too Large",
        }
    }
}

/// Reads the head at the start of `received`. `None` while it is not complete.
pub fn parse(received: &[u8]) -> Option<Result<Request, Refusal>> {
    let head = &received[..received.len().min(MAX_HEAD)];
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => Some(read(&request)),
        Ok(httparse::Status::Partial) if received.len() < MAX_HEAD => None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            Some(Err(Refusal::TooLong))
        }
        Err(_) => Some(Err(Refusal::Malformed)),
    }
}

fn read(request: &httparse::Request<'_, '_>) -> Result<Request, Refusal> {
    let path = request.path.unwrap_or_default();
    if path.split('?').next() != Some("/metrics") {
        return Err(Refusal::NotFound);
    }
    let head_only = match request.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Err(Refusal::Method),
    };
    let accept = request.headers.iter().filter(|h| h.name.eq_ignore_ascii_case("accept"));
    // A name of a format has only ASCII.
    let accept: Vec<_> = accept.filter_map(|header| str::from_utf8(header.value).ok()).collect();
    Ok(Request { format: Format::accepted_by(&accept.join(",")), head_only })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_once_its_head_is_complete() {
        let whole = b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\naccept: text/plain\r\n\r\n";
        for end in 0..whole.len() {
            assert_eq!(parse(&whole[..end]), None, "{end} bytes");
        }
        let expected = Request { format: Format::Prometheus, head_only: false };
        assert_eq!(parse(whole), Some(Ok(expected)));
        assert_eq!(parse(&[whole, &b"more"[..]].concat()), Some(Ok(expected)));
        let strange = b"GET /metrics HTTP/1.1\r\nAccept: text/plain\xff\r\n\r\n";
        assert_eq!(parse(strange), Some(Ok(Request { format: Format::OpenMetrics, ..expected })));
        let head = Request { format: Format::OpenMetrics, head_only: true };
        assert_eq!(parse(b"HEAD /metrics HTTP/1.0\r\n\r\n"), Some(Ok(head)));
    }

    #[test]
    fn another_request_is_refused_with_the_reason() {
        let filler = "a".repeat(MAX_HEAD);
        let headers = "a: b\r\n".repeat(MAX_HEADERS + 1);
        for (request, refusal) in [
            ("GET / HTTP/1.1\r\n\r\n".to_owned(), Refusal::NotFound),
            ("GET /metricsx HTTP/1.1\r\n\r\n".to_owned(), Refusal::NotFound),
            ("POST /metrics HTTP/1.1\r\n\r\n".to_owned(), Refusal::Method),
            ("get it\r\n\r\n".to_owned(), Refusal::Malformed),
            ("GET /metrics HTTP/2.0\r\n\r\n".to_owned(), Refusal::Malformed),
            (format!("GET /{filler}"), Refusal::TooLong),
            (format!("GET /metrics HTTP/1.1\r\nx: {filler}\r\n\r\n"), Refusal::TooLong),
            (format!("GET /metrics HTTP/1.1\r\n{headers}\r\n"), Refusal::TooLong),
        ] {
            assert_eq!(parse(request.as_bytes()), Some(Err(refusal)), "{request}");
            assert!(refusal.status().len() > 4);
        }
    }
}
