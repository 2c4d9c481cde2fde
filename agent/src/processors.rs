// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How many processors this process may use.

use std::num::NonZero;
use std::sync::OnceLock;
use std::thread::available_parallelism;

/// How many they are, as of the first call: also by the limit of its control group, which a thread
/// in the sandbox cannot look up.
pub fn count() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| available_parallelism().map_or(1, NonZero::get))
}
