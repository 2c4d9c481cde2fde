// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pipe by which a VMM sees that this program is gone.
//!
//! The kernel closes the writing end when the process exits, and also when it executes another
//! program for an upgrade: then no thread of this one runs any more, and none of its mappings is
//! left. The process itself stays in that case, so its pidfd does not tell.

use std::io::{self, PipeReader, PipeWriter, pipe};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

/// Never dropped.
static PIPE: OnceLock<(PipeReader, PipeWriter)> = OnceLock::new();

/// A duplicate of the reading end.
///
/// # Errors
/// If the kernel refuses descriptors.
pub(super) fn reading_end() -> io::Result<OwnedFd> {
    let (reader, _writer) = match PIPE.get() {
        Some(pipe) => pipe,
        None => {
            let pipe = pipe()?;
            // If another thread was faster, this pipe is closed again.
            PIPE.get_or_init(|| pipe)
        }
    };
    Ok(reader.try_clone()?.into())
}
