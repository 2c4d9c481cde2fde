// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table of figures.

use serde_json::{Value, json};
use std::fmt::Write;

/// One figure that was measured several times.
#[derive(Debug, Clone)]
struct Row {
    work: String,
    who: String,
    unit: &'static str,
    samples: Vec<f64>,
    /// The figure it is compared with: its name, and the factor by which this one is better.
    ratios: Vec<(String, f64)>,
    remark: String,
}

/// Which direction is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// Less is better, as for times.
    Less,
    /// More is better, as for bytes per second.
    More,
}

/// All figures of a run.
#[derive(Debug, Default)]
pub struct Table {
    notes: Vec<String>,
    rows: Vec<Row>,
}

/// The median of some figures.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0,
    }
}

impl Table {
    /// Adds a note about the whole run.
    pub fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// Adds a figure.
    pub fn add(
        &mut self, work: &str, who: &str, unit: &'static str, samples: &[f64], remark: String,
    ) {
        let (work, who) = (work.to_owned(), who.to_owned());
        self.rows.push(Row {
            work,
            who,
            unit,
            samples: samples.to_vec(),
            ratios: Vec::new(),
            remark,
        });
    }

    /// Compares a figure with another one of the same work.
    pub fn compare(&mut self, work: &str, who: &str, with: &str, better: Better) {
        let middle = |who: &str| {
            let row = self.rows.iter().find(|row| row.work == work && row.who == who)?;
            Some(median(&row.samples))
        };
        let (Some(own), Some(other)) = (middle(who), middle(with)) else { return };
        let ratio = if better == Better::More { own / other } else { other / own };
        if let Some(row) = self.rows.iter_mut().find(|row| row.work == work && row.who == who) {
            row.ratios.push((with.to_owned(), ratio));
        }
    }

    /// The same with the median of the ratios of each round: for a machine whose speed changes from
    /// round to round in the same way for all.
    pub fn compare_rounds(&mut self, work: &str, who: &str, with: &str, better: Better) {
        let samples = |who: &str| {
            let row = self.rows.iter().find(|row| row.work == work && row.who == who)?;
            Some(row.samples.clone())
        };
        let (Some(own), Some(other)) = (samples(who), samples(with)) else { return };
        let ratio = |(own, other): (&f64, &f64)| {
            if better == Better::More { own / other } else { other / own }
        };
        let ratios: Vec<f64> = own.iter().zip(&other).map(ratio).collect();
        if let Some(row) = self.rows.iter_mut().find(|row| row.work == work && row.who == who) {
            row.ratios.push((with.to_owned(), median(&ratios)));
        }
    }

    /// The table as text.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for note in &self.notes {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{note}  ");
        }
        let _ = writeln!(
            text,
            "\n| work | who | median | min | max | unit | ratio | |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
        );
        for row in &self.rows {
            let low = row.samples.iter().copied().fold(f64::INFINITY, f64::min);
            let high = row.samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let ratios: Vec<String> =
                row.ratios.iter().map(|(with, ratio)| format!("{ratio:.2} x {with}")).collect();
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} | {} |",
                row.work,
                row.who,
                figure(median(&row.samples)),
                figure(low),
                figure(high),
                row.unit,
                ratios.join(", "),
                row.remark
            );
        }
        text
    }

    /// The table as JSON.
    pub fn json(&self) -> String {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let ratios: serde_json::Map<String, Value> =
                    row.ratios.iter().map(|(with, ratio)| (with.clone(), json!(ratio))).collect();
                json!({
                    "work": row.work, "who": row.who, "unit": row.unit, "median": median(&row.samples),
                    "samples": row.samples, "ratios": ratios, "remark": row.remark,
                })
            })
            .collect();
        format!("{:#}", json!({ "notes": self.notes, "rows": rows }))
    }
}

/// A number with three significant digits.
fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
