// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What this process does with a signal, as the kernel tells it.

use std::fs::read_to_string;

/// True if this process ignores the signal.
pub fn is_ignored(signal: i32) -> bool {
    let status = read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}
