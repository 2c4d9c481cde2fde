// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty tracking: which pages the guest has written.
//!
//! - [`tracker`]: what every tracker does;
//! - [`log_tracker`]: the dirty log that the VMM shares with its back-ends;
//! - [`hook_tracker`]: the VMM's own tracker, such as KVM's dirty log, through hooks;
//! - [`scan_tracker`]: write-protect scanning of the VMM's mappings as a tracker;
//! - [`trackers`]: the trackers of a job, and how the job asks them together;
//! - [`dirty_pages`]: the set of dirty pages;
//! - [`checkpoint`]: what is known about changes since the last image;
//! - [`error`]: why it is not known which pages are dirty.

pub mod checkpoint;
pub mod dirty_pages;
pub mod error;
pub mod hook_tracker;
pub mod log_tracker;
pub mod scan_tracker;
pub mod tracker;
pub mod trackers;

pub use dirty_pages::DirtyPages;
pub use error::TrackingError;
pub use hook_tracker::LazyClear;
pub use log_tracker::LogTracker;
pub use tracker::Tracker;
pub use trackers::{TrackerChoice, Trackers, check_discards};
