// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a process does with a signal, as the kernel tells it.

use std::fmt::Display;
use std::fs::read_to_string;

/// What may become of a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Nothing: it is ignored.
    Ignored,
    /// A handler of the process runs.
    Caught,
}

/// True if this is what becomes of the signal in `process`: a number, or `self`. False also if
/// there is no such process.
pub fn is(disposition: Disposition, signal: i32, process: impl Display) -> bool {
    let field = match disposition {
        Disposition::Ignored => "SigIgn:",
        Disposition::Caught => "SigCgt:",
    };
    let status = read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix(field));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}
