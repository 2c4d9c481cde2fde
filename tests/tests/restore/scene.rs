// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An image to restore from, and the phase of its restore.

use pageferry_client::{Phase, RestoreMode, RestoreOptions};
use pageferry_tests::scenario::image_guest::PAGES;
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::{Guest, Host};
use std::path::PathBuf;

/// An image of a guest with content in all its pages.
pub fn image(host: &Host) -> PathBuf {
    let guest = Guest::full(host, PAGES);
    guest.saved(host, "image", &paused());
    host.images.path("image")
}

/// The phase of a restore that is under way. If it is lazy, its guest already runs.
pub fn under_way(options: &RestoreOptions) -> Phase {
    if options.mode == RestoreMode::Lazy { Phase::Prefetching } else { Phase::Restoring }
}
