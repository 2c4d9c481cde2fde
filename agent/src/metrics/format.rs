// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two formats of the metrics.

use prometheus_client::encoding::{prometheus_text, text};
use prometheus_client::registry::Registry;

/// A text format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// OpenMetrics 1.0.
    #[default]
    OpenMetrics,
    /// The older text format of Prometheus, version 0.0.4, which has no units.
    Prometheus,
}

impl Format {
    /// The value of the header `Content-Type`.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => prometheus_text::CONTENT_TYPE,
        }
    }

    /// The format for a client that accepts `media_types`, the value of the header `Accept`. It is
    /// OpenMetrics unless the client asks for text only.
    pub fn accepted_by(media_types: &str) -> Self {
        let types = || media_types.split(',').map(|entry| entry.split(';').next().unwrap_or(entry));
        let accepts = |wanted: &[&str]| {
            types().any(|entry| wanted.iter().any(|name| entry.trim().eq_ignore_ascii_case(name)))
        };
        if accepts(&["text/plain", "text/*"])
            && !accepts(&["application/openmetrics-text", "application/*", "*/*"])
        {
            return Self::Prometheus;
        }
        Self::OpenMetrics
    }

    /// The metrics of `registry` in this format.
    pub(super) fn encode(self, registry: &Registry) -> Result<String, std::fmt::Error> {
        let mut encoded = String::new();
        match self {
            Self::OpenMetrics => text::encode(&mut encoded, registry)?,
            Self::Prometheus => prometheus_text::encode(&mut encoded, registry)?,
        }
        Ok(encoded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_sent_only_to_a_client_that_accepts_nothing_better() {
        for accepted in [
            "",
            "*/*",
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.2",
            "text/plain, */*;q=0.1",
            "text/html",
        ] {
            assert_eq!(Format::accepted_by(accepted), Format::OpenMetrics, "{accepted}");
        }
        for accepted in ["text/plain", "TEXT/Plain;version=0.0.4", "text/html, text/*;q=0.5"] {
            assert_eq!(Format::accepted_by(accepted), Format::Prometheus, "{accepted}");
        }
    }
}
