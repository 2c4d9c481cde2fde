// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! pageferry against naive models, case after case from a seed: what a reader believes at a glance
//! says what must hold, and the guest, the VMM and the wire do whatever the seed says.
//!
//! - [`bitmap`]: the shared bitmap against a set of page numbers;
//! - [`migration`]: precopy while the guest writes, discards, frees and populates;
//! - [`postcopy`]: the same, also at the destination, over connections that break;
//! - [`snapshot`]: an image is one moment of its guest; [`restore`]: and comes back as it was;
//! - [`soak`]: a hundred lost connections under a guest that never rests;
//! - [`source`]: the guest at the source of a migration; [`blocks`]: the blocks of the models of
//!   images; [`seeds`]: how many cases run, and which.
//!
//! A case that fails prints its seed: `PAGEFERRY_SEED=7 PAGEFERRY_CASES=1` repeats it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod bitmap;
mod blocks;
mod migration;
mod postcopy;
mod restore;
mod seeds;
mod snapshot;
mod soak;
mod source;
