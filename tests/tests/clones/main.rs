// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Clones: guests of one image that share the pages which none of them has written.
//!
//! That each finds what was saved, whatever it does, and whatever ends its agents, is in
//! `models/restore.rs`; that it can be saved while it runs, in `models/snapshot.rs`.
//!
//! - [`sharing`]: what clones share, and what they do not; [`bases`]: the files that they share;
//! - [`guests`]: clones move, and are saved, with every tracker;
//! - [`deaths`]: agents that are killed; [`refusals`]: what cannot be done with a clone;
//! - [`figures`]: a hundred clones, for the documentation.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod bases;
mod deaths;
mod figures;
mod guests;
mod refusals;
mod sharing;

use pageferry_client::RestoreOptions;
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::scenario::image_guest::{PAGES, assert_completed, cloning};
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::{Guest, Host};
use std::path::{Path, PathBuf};

/// An agent with an image in which every third page has content.
pub fn image() -> (Host, PathBuf) {
    let host = Host::start();
    let guest = Guest::new(&host, PAGES);
    (0..PAGES).step_by(3).for_each(|page| guest.write(page, content(page)));
    guest.saved(&host, "image", &paused());
    let path = host.images.path("image");
    drop(guest);
    (host, path)
}

/// What a page of that image holds.
pub fn content(page: u64) -> u64 {
    if page.is_multiple_of(3) { 1000 + page } else { 0 }
}

/// A clone with its agent, which ends after it.
pub struct Clone {
    /// The clone.
    pub guest: Guest,
    /// Its agent.
    pub host: Host,
}

impl Clone {
    /// A clone that has all its memory.
    #[track_caller]
    pub fn of(image: &Path) -> Self {
        Self::on(Host::start(), image, &cloning())
    }

    /// The same, on this agent and with these options.
    #[track_caller]
    pub fn on(host: Host, image: &Path, options: &RestoreOptions) -> Self {
        let guest = Guest::clone_of(&host, image);
        assert_completed(&guest.restored(image, options));
        Self { guest, host }
    }

    /// The content of a page, as the guest sees it.
    pub fn word(&self, page: u64) -> u64 {
        self.guest.block().load(page * PAGE_SIZE + 8).unwrap()
    }
}
