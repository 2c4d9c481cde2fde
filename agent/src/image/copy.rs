// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Copying an image as it is, sealed or not: from and to files and stores.
//!
//! Holes stay holes. Whoever wants to know whether the image is whole verifies the copy: nothing of
//! it but the header is looked at, which needs no key.

use super::bytes::write_at;
use super::error::{ImageError, kernel};
use super::new_file::{FileKind, NewFile};
use super::reader::Image;
use super::workers::share_among_threads;
use pageferry_protocol::image::Header;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a thread copies at once, in bytes.
const PART: u64 = 4 << 20;
/// Zeroes of this size are not written.
const BLOCK: usize = 4096;

/// Copies the image at `path` to `into`, on `threads` threads. `show` is called with the bytes that
/// are done and with all bytes.
///
/// # Errors
/// If the image cannot be read, is none, or the new one cannot be written. Then nothing is left of
/// the new one, and a file at `into` is unchanged.
pub fn copy(
    path: &Path, into: &Path, replace: bool, threads: usize, show: &(dyn Fn(u64, u64) + Sync),
) -> Result<Header, ImageError> {
    let (header, file) = Image::peek(path)?;
    let to_new = |fault: super::ImageFault| fault.of(into);
    let new = NewFile::create(into, FileKind::IMAGE, replace).map_err(to_new)?;
    let length = header.file_length;
    rustix::fs::ftruncate(&new, length)
        .map_err(kernel("set the length of the file"))
        .map_err(to_new)?;
    let (parts, done) = (length.div_ceil(PART), AtomicU64::new(0));
    share_among_threads(threads, parts, Vec::new, |buffer: &mut Vec<u8>, part| {
        let range = part * PART..length.min((part + 1) * PART);
        for data in file.data_in(range.clone()) {
            buffer.resize((data.end - data.start) as usize, 0);
            file.read_at(buffer, data.start).map_err(|fault| fault.of(path))?;
            for (at, block) in (data.start..).step_by(BLOCK).zip(buffer.chunks(BLOCK)) {
                if block.iter().fold(0, |sum, byte| sum | byte) != 0 {
                    write_at(new.as_fd(), block, at).map_err(to_new)?;
                }
            }
        }
        let bytes = range.end - range.start;
        show(done.fetch_add(bytes, Ordering::Relaxed) + bytes, length);
        Ok(())
    })?;
    new.finish().map_err(to_new)?;
    Ok(header)
}
