// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! pageferry against naive models, with cases from a seed. A simple model says what must hold, and
//! the seed decides what the guest, the VMM and the connections do.
//!
//! - [`bitmap`]: the shared bitmap against a set of page numbers;
//! - [`migration`]: precopy while the guest writes, discards, frees and populates;
//! - [`postcopy`]: the same, also at the destination, over connections that break;
//! - [`postcopy_deaths`]: the same, while the agents of the destination die;
//! - [`snapshot`]: an image is one moment of its guest; [`restore`]: a restored guest has the
//!   memory of its image;
//! - [`queued`]: queued discards and frees, while agents are killed and replaced;
//! - [`soak`]: a hundred lost connections under a guest that always writes;
//! - [`loading`]: a guest that works while its memory is loaded; [`killer`]: kills its agents;
//! - [`source`]: the guest at the source of a migration; [`blocks`]: the blocks of the models of
//!   images; [`seeds`]: the number of cases, and their seeds.
//!
//! A case that fails prints its seed: `PAGEFERRY_SEED=7 PAGEFERRY_CASES=1` repeats it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod bitmap;
mod blocks;
mod killer;
mod loading;
mod migration;
mod postcopy;
mod postcopy_deaths;
mod queued;
mod restore;
mod seeds;
mod snapshot;
mod soak;
mod source;
