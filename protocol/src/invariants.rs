// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rules that the documentation cites by name, such as `one-owner`. This module has no code: it
//! is `docs/invariants.md` of the repository.
//!
#![doc = include_str!("invariants.md")]
