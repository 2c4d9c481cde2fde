// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A table of two columns.

use std::fmt::{Display, Formatter};

/// Rows of a name and a value.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<(&'static str, String)>,
}

impl Table {
    /// Adds a row.
    pub fn row(&mut self, name: &'static str, value: impl Display) {
        self.rows.push((name, value.to_string()));
    }
}

impl Display for Table {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        let width = self.rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        self.rows
            .iter()
            .try_for_each(|(name, value)| writeln!(formatter, "  {name:width$}  {value}"))
    }
}
