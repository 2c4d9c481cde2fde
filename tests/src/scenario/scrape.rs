// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Scrapes of an agent's metrics. The reader is strict: it refuses all that OpenMetrics 1.0 does
//! not allow in what pageferry uses of it.

use super::SOON;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Metrics of an agent at one moment.
#[derive(Debug, Clone, Default)]
pub struct Scrape {
    /// The type, the unit and the sentence of each metric, by its name.
    pub metrics: BTreeMap<String, Metric>,
    /// The value of each series, by its name with its labels.
    series: BTreeMap<String, f64>,
}

/// What is known of a metric without its values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metric {
    /// `counter`, `gauge`, `histogram` or `info`.
    pub kind: String,
    /// Its unit; empty if it has none.
    pub unit: String,
    /// Its sentence.
    pub help: String,
}

impl Metric {
    /// What may follow the metric's name in the name of a series.
    fn suffixes(&self) -> &'static [&'static str] {
        match self.kind.as_str() {
            "counter" => &["_total"],
            "gauge" => &[""],
            "histogram" => &["_bucket", "_count", "_sum"],
            "info" => &["_info"],
            other => panic!("type {other}"),
        }
    }
}

impl Scrape {
    /// The metrics of the agent that serves them at `socket`.
    pub fn of(socket: &Path) -> Self {
        let answer = exchange(socket, b"GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
        let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        assert!(head.contains(&format!("\r\nContent-Type: {content_type}\r\n")), "{head}");
        Self::read(body)
    }

    /// Reads a whole text.
    pub fn read(text: &str) -> Self {
        let mut scrape = Self::default();
        let lines = text.strip_suffix("# EOF\n").expect("a text that ends");
        // The metric whose lines are being read.
        let mut name = String::new();
        for line in lines.lines() {
            let words: Vec<_> = line.splitn(4, ' ').collect();
            match words[..] {
                ["#", "HELP", of, help] => {
                    of.clone_into(&mut name);
                    let metric = Metric { help: help.to_owned(), ..Metric::default() };
                    let before = scrape.metrics.insert(name.clone(), metric);
                    assert_eq!(before, None, "{of} comes twice");
                }
                ["#", what, of, value] => {
                    assert_eq!(of, name, "{line}");
                    let metric = scrape.metrics.get_mut(of).unwrap();
                    match what {
                        "TYPE" => value.clone_into(&mut metric.kind),
                        "UNIT" => value.clone_into(&mut metric.unit),
                        _ => panic!("{line}"),
                    }
                    assert!(name.ends_with(&metric.unit), "{line}");
                }
                _ => scrape.read_sample(line, &name),
            }
        }
        scrape
    }

    fn read_sample(&mut self, line: &str, name: &str) {
        let (series, value) = line.rsplit_once(' ').expect(line);
        let (of, labels) = series.split_once('{').unwrap_or((series, "}"));
        let suffix = of.strip_prefix(name).expect(line);
        assert!(self.metrics[name].suffixes().contains(&suffix), "{line}");
        // No value of a label has a comma or a quote.
        let labels = labels.strip_suffix('}').expect(line);
        for label in labels.split_terminator(',') {
            let (key, quoted) = label.split_once('=').expect(line);
            let value = quoted.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
            assert!(!key.is_empty() && !value.expect(line).is_empty(), "{line}");
        }
        let value = value.parse().expect(line);
        assert_eq!(self.series.insert(series.to_owned(), value), None, "{line} comes twice");
    }

    /// The value of a series, which is given with its labels.
    #[track_caller]
    pub fn value(&self, series: &str) -> f64 {
        *self.series.get(series).unwrap_or_else(|| panic!("no {series}"))
    }

    /// The phase of the job.
    pub fn phase(&self) -> &str {
        let entered = self.series.iter().filter(|(_, value)| **value == 1.0);
        let mut phases = entered.filter_map(|(series, _)| {
            series.strip_prefix("pageferry_job_phase{phase=\"")?.strip_suffix("\"}")
        });
        phases.next().expect("a phase")
    }

    /// Checks that both scrapes have the same series, and that no counter is less than `before`.
    #[track_caller]
    pub fn assert_not_less_than(&self, before: &Self) {
        assert!(self.series.keys().eq(before.series.keys()), "series came or went");
        let grows = ["_total", "_bucket", "_count", "_sum"];
        for (series, value) in &self.series {
            let name = series.split('{').next().unwrap();
            if grows.iter().any(|end| name.ends_with(end)) {
                assert!(*value >= before.value(series), "{series}: {value} after more");
            }
        }
    }
}

/// Sends a request to the server at `socket`, and returns its whole answer.
pub fn exchange(socket: &Path, request: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    // The server may refuse the request before it has all of it.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        // It has closed while a part of the request was unread.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        read => drop(read.unwrap()),
    }
    String::from_utf8(answer).unwrap()
}
