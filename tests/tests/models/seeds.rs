// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The number of cases of a model, and their seeds.
//!
//! `PAGEFERRY_CASES` is their number. `PAGEFERRY_SEED` repeats the case of a failure. What its
//! threads do may differ from run to run.

use proptest::prelude::ProptestConfig;
use std::str::FromStr;

fn variable<T: FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// The cases of a model. There are `usual` of them unless the environment sets a number.
pub fn cases(usual: u32) -> ProptestConfig {
    ProptestConfig {
        cases: variable("PAGEFERRY_CASES").unwrap_or(usual),
        max_shrink_iters: 0,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// The seed of the case to repeat.
pub fn given() -> Option<u64> {
    variable("PAGEFERRY_SEED")
}

/// The seed of this case, unless the environment names another one.
pub fn repeated(seed: u64) -> u64 {
    given().unwrap_or(seed)
}
