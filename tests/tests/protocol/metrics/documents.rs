// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `docs/metrics.md` and `docs/grafana-dashboard.json` name the metrics that there are.

use super::Side;
use pageferry_tests::scenario::Scrape;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    std::fs::read_to_string(path).unwrap()
}

fn scrape() -> Scrape {
    let folder = tempfile::tempdir().unwrap();
    Side::new(folder.path(), "agent", 16).scrape()
}

/// The name of a metric as users write it, and its type.
fn named(scrape: &Scrape) -> BTreeMap<String, String> {
    let name = |name: &str, kind: &str| match kind {
        "counter" => format!("{name}_total"),
        "info" => format!("{name}_info"),
        _ => name.to_owned(),
    };
    let metrics = scrape.metrics.iter();
    metrics.map(|(of, metric)| (name(of, &metric.kind), metric.kind.clone())).collect()
}

/// All words in `text` that begin as a metric does.
fn words(text: &str) -> BTreeSet<&str> {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    words.filter(|word| word.starts_with("pageferry_")).collect()
}

#[test]
fn every_metric_is_documented_with_its_type() {
    let text = document("metrics.md");
    let documented: BTreeMap<_, _> = text
        .lines()
        .filter_map(|line| {
            let row = line.strip_prefix("| `pageferry_")?;
            let (name, row) = row.split_once("` | ")?;
            let (kind, _) = row.split_once(" | ")?;
            Some((format!("pageferry_{name}"), kind.to_owned()))
        })
        .collect();
    assert_eq!(documented, named(&scrape()));
}

#[test]
fn alerts_and_examples_name_only_metrics_that_there_are() {
    let text = document("metrics.md");
    let metrics = named(&scrape());
    for word in words(&text) {
        let known = metrics.contains_key(word.trim_end_matches("_bucket"));
        assert!(known || word == "pageferry_job_", "{word}");
    }
}

#[test]
fn the_dashboard_shows_every_metric_and_no_other() {
    let dashboard: Value = serde_json::from_str(&document("grafana-dashboard.json")).unwrap();
    let mut expressions = Vec::new();
    let mut rows = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        if panel["type"] == "row" {
            rows.push(panel["title"].as_str().unwrap());
            continue;
        }
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{panel}");
        for target in panel["targets"].as_array().unwrap() {
            let expression = target["expr"].as_str().unwrap();
            assert!(expression.contains("{job=~\"$job\",instance=~\"$instance\"}"), "{expression}");
            expressions.push(expression);
        }
    }
    assert_eq!(
        rows,
        ["Job", "Throughput", "Dirty memory", "Downtime", "Faults", "Memory and agent"]
    );
    let all = expressions.join(" ");
    let shown: BTreeSet<_> =
        words(&all).into_iter().map(|word| word.trim_end_matches("_bucket").to_owned()).collect();
    assert_eq!(shown, named(&scrape()).into_keys().collect());
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<_> = variables.iter().map(|variable| &variable["name"]).collect();
    assert_eq!(names, ["datasource", "job", "instance"]);
}
