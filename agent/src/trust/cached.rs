// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What was read from files, as long as the files stay the same.

use super::TrustError;
use crate::lock::lock;
use crate::opener;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Identifies the content of files, by what the kernel says of each: device, inode, size, change.
type Stamp = Vec<Option<(u64, u64, u64, i64, i64)>>;

/// What was read from files, as long as the files stay the same.
#[derive(Debug)]
pub(super) struct Cached<T>(Mutex<Option<(Stamp, Arc<T>)>>);

impl<T> Default for Cached<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> Cached<T> {
    /// What `read` has made of the files, which is called if one of them has changed.
    ///
    /// # Errors
    /// Those of `read`.
    pub(super) fn get(
        &self, files: &[PathBuf], read: impl FnOnce() -> Result<T, TrustError>,
    ) -> Result<Arc<T>, TrustError> {
        let mut cache = lock(&self.0);
        // Before the files are read: if one changes meanwhile, it is read again the next time.
        let stamp: Stamp = files.iter().map(|file| opener::metadata(file).ok().map(of)).collect();
        if let Some((known, read)) = &*cache
            && *known == stamp
        {
            return Ok(read.clone());
        }
        let read = Arc::new(read()?);
        *cache = Some((stamp, read.clone()));
        Ok(read)
    }
}

fn of(file: Metadata) -> (u64, u64, u64, i64, i64) {
    (file.dev(), file.ino(), file.size(), file.ctime(), file.ctime_nsec())
}

/// Checks that nobody except its owner may read a file.
///
/// # Errors
/// If somebody may, or the file cannot be examined.
pub(super) fn check_mode(path: &Path, file: &Metadata) -> Result<(), TrustError> {
    let mode = file.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(TrustError::KeyIsOpen { path: path.to_owned(), mode });
    }
    Ok(())
}
