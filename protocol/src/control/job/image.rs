// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Options of a snapshot and of a restore.

use super::fields::{
    bandwidth, capture_memory, flag, huge_pages, micros, resume, timeout, workers,
};
use super::{HugePages, MAX_ADDRESS, OutgoingOptions, ResumePolicy};
use crate::control::codec::{DecodeError, Decoder, Encoder};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How a snapshot treats the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u16)]
pub enum SnapshotMode {
    /// The guest is paused for a moment and then runs. A page that it is about to write is saved
    /// first.
    #[default]
    Background = 0,
    /// The guest is paused until its memory is saved.
    Paused = 1,
    /// The VMM has stopped the guest and resumes it when it likes. No pause and no resume hook is
    /// called.
    Stopped = 2,
}

impl SnapshotMode {
    /// All modes with the names that users write.
    pub const NAMES: [(&'static str, SnapshotMode); 3] = [
        ("background", SnapshotMode::Background),
        ("paused", SnapshotMode::Paused),
        ("stopped", SnapshotMode::Stopped),
    ];

    fn from_wire(value: u16) -> Result<Self, DecodeError> {
        Self::NAMES.iter().map(|(_, mode)| *mode).find(|mode| *mode as u16 == value).ok_or(
            DecodeError::InvalidValue {
                field: "mode",
                value: value.into(),
                allowed: "0 background, 1 paused, 2 stopped",
            },
        )
    }
}

/// Options of a snapshot. Only the bandwidth can be changed while it runs, by
/// `Client::set_parameters`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotOptions {
    /// What happens to the guest meanwhile.
    pub mode: SnapshotMode,
    /// Threads that save, 1 to [`MAX_STREAMS`](super::MAX_STREAMS).
    pub workers: u16,
    /// Limit in bytes per second, at least [`MIN_BANDWIDTH`](super::MIN_BANDWIDTH); 0 for no limit.
    /// Pages that the guest is about to write or discards are exempt.
    pub bandwidth: u64,
    /// Path of the base of an increment; empty for a full image. See
    /// [`SnapshotOptions::with_base`].
    pub base: String,
    /// Track the writes from now on, so that the next snapshot can be an increment to this one.
    pub track: bool,
    /// Replace an existing file of that name, when the new image is complete.
    pub replace: bool,
    /// Write the image through the page cache, where it stays for a restore that follows soon.
    pub cached: bool,
    /// In the background: most memory in bytes for pages that were captured because the guest wrote
    /// to them, until they are in the image, at least
    /// [`MIN_CAPTURE_MEMORY`](super::MIN_CAPTURE_MEMORY). It is allocated as it is needed. If it is
    /// full, the guest waits for the disk.
    pub capture_memory: u64,
    /// How long the VMM may take to answer a hook.
    pub hook_timeout: Duration,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self {
            mode: SnapshotMode::Background,
            workers: 2,
            bandwidth: 0,
            base: String::new(),
            track: false,
            replace: false,
            cached: false,
            capture_memory: 64 << 20,
            hook_timeout: OutgoingOptions::default().hook_timeout,
        }
    }
}

/// A path that is not UTF-8, which options must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {path:?} is not UTF-8")]
pub struct NotUtf8 {
    /// Name of the option.
    pub what: &'static str,
    /// The path.
    pub path: PathBuf,
}

fn text(what: &'static str, path: &Path) -> Result<String, NotUtf8> {
    path.to_str().map(str::to_owned).ok_or_else(|| NotUtf8 { what, path: path.to_owned() })
}

impl SnapshotOptions {
    /// The same options for an increment to the image at `base`.
    ///
    /// # Errors
    /// If the path is not UTF-8.
    pub fn with_base(self, base: &Path) -> Result<Self, NotUtf8> {
        Ok(Self { base: text("base", base)?, ..self })
    }

    pub(in crate::control) fn encode(&self, encoder: Encoder) -> Encoder {
        encoder
            .u16(self.mode as u16)
            .u16(self.workers)
            .u16(u16::from(self.track))
            .u16(u16::from(self.replace))
            .u16(u16::from(self.cached))
            .u64(self.bandwidth)
            .u64(self.capture_memory)
            .u64(micros(self.hook_timeout))
            .text(&self.base)
    }

    pub(in crate::control) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            mode: SnapshotMode::from_wire(decoder.u16("mode")?)?,
            workers: workers(decoder)?,
            track: flag(decoder, "track")?,
            replace: flag(decoder, "replace")?,
            cached: flag(decoder, "cached")?,
            bandwidth: bandwidth(decoder)?,
            capture_memory: capture_memory(decoder)?,
            hook_timeout: timeout(decoder, "hook_timeout")?,
            base: decoder.text("base", MAX_ADDRESS)?.to_owned(),
        })
    }
}

/// Whether a restored guest runs before its memory is here or afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u16)]
pub enum RestoreMode {
    /// All memory is read first.
    #[default]
    Eager = 0,
    /// The guest runs first. Pages that it accesses are read at once, and the others afterwards.
    Lazy = 1,
}

impl RestoreMode {
    /// All modes with the names that users write.
    pub const NAMES: [(&'static str, RestoreMode); 2] =
        [("eager", RestoreMode::Eager), ("lazy", RestoreMode::Lazy)];

    fn from_wire(value: u16) -> Result<Self, DecodeError> {
        Self::NAMES.iter().map(|(_, mode)| *mode).find(|mode| *mode as u16 == value).ok_or(
            DecodeError::InvalidValue {
                field: "mode",
                value: value.into(),
                allowed: "0 eager, 1 lazy, 2 lazy with a shared base",
            },
        )
    }
}

/// [`RestoreMode::Lazy`] with [`RestoreOptions::shared_base`], as it travels. An older agent
/// refuses it, and does not restore something else.
const LAZY_WITH_SHARED_BASE: u16 = 2;

/// Options of a restore. Only the bandwidth can be changed while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreOptions {
    /// When the guest runs.
    pub mode: RestoreMode,
    /// Threads that read, 1 to [`MAX_STREAMS`](super::MAX_STREAMS).
    pub workers: u16,
    /// Limit in bytes per second, at least [`MIN_BANDWIDTH`](super::MIN_BANDWIDTH); 0 for no limit.
    /// Pages that the guest waits for are exempt.
    pub bandwidth: u64,
    /// With [`RestoreMode::Lazy`]: path of the working set. If the file exists, its pages are read
    /// ahead. Otherwise the pages that the guest accesses first are written to it. Empty for none.
    /// See [`RestoreOptions::with_working_set`].
    pub working_set: String,
    /// Whether the guest is resumed once it is here.
    pub resume: ResumePolicy,
    /// How long the VMM may take to answer a hook.
    pub hook_timeout: Duration,
    /// With [`RestoreMode::Eager`]: whether the guest gets huge pages where the image has all of
    /// them.
    pub huge_pages: HugePages,
    /// The guest is a clone: its memory is private mappings of the base of the image, whose pages
    /// it shares with all other clones. Implies [`RestoreMode::Lazy`].
    pub shared_base: bool,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        let SnapshotOptions { workers, bandwidth, hook_timeout, .. } = SnapshotOptions::default();
        let (mode, resume) = (RestoreMode::Eager, ResumePolicy::Auto);
        let (working_set, huge_pages, shared_base) = (String::new(), HugePages::Auto, false);
        Self {
            mode,
            workers,
            bandwidth,
            working_set,
            resume,
            hook_timeout,
            huge_pages,
            shared_base,
        }
    }
}

impl RestoreOptions {
    /// The same, with the working set in `file`.
    ///
    /// # Errors
    /// If the path is not UTF-8.
    pub fn with_working_set(self, file: &Path) -> Result<Self, NotUtf8> {
        Ok(Self { working_set: text("working_set", file)?, ..self })
    }

    pub(in crate::control) fn encode(&self, encoder: Encoder) -> Encoder {
        let mode = if self.shared_base { LAZY_WITH_SHARED_BASE } else { self.mode as u16 };
        let encoder =
            encoder.u16(mode).u16(self.workers).u16(self.resume as u16).u64(self.bandwidth);
        let encoder = encoder.u64(micros(self.hook_timeout)).u16(self.huge_pages as u16);
        encoder.text(&self.working_set)
    }

    pub(in crate::control) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let (mode, shared_base) = match decoder.u16("mode")? {
            LAZY_WITH_SHARED_BASE => (RestoreMode::Lazy, true),
            mode => (RestoreMode::from_wire(mode)?, false),
        };
        let options = Self {
            mode,
            shared_base,
            workers: workers(decoder)?,
            resume: resume(decoder)?,
            bandwidth: bandwidth(decoder)?,
            hook_timeout: timeout(decoder, "hook_timeout")?,
            huge_pages: huge_pages(decoder)?,
            working_set: decoder.text("working_set", MAX_ADDRESS)?.to_owned(),
        };
        if options.mode != RestoreMode::Lazy && !options.working_set.is_empty() {
            let (value, allowed) = (options.mode as u64, "1 lazy with a working_set");
            return Err(DecodeError::InvalidValue { field: "mode", value, allowed });
        }
        Ok(options)
    }
}
