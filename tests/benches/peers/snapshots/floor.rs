// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The simplest program that saves memory: it reads the allocated pages, writes them to a file, and
//! syncs it.

use super::super::image::Image;
use super::{MIB, processor_time};
use pageferry_agent::memory::PageBuffer;
use rustix::fs::{OFlags, SeekFrom, seek};
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// The cost of a save.
#[derive(Debug, Clone, Copy)]
pub struct Took {
    /// Time until everything was written.
    pub written: Duration,
    /// Time of the sync after that.
    pub safe: Duration,
    /// Processor time of the process that saved.
    pub processor: Duration,
}

impl Took {
    /// The total time.
    pub fn total(&self) -> Duration {
        self.written + self.safe
    }
}

/// The allocated ranges, in parts of at most 1 MiB.
fn parts(image: &Image) -> Vec<(u64, usize)> {
    let mut parts = Vec::new();
    let mut at = 0;
    while let Ok(data) = seek(&image.file, SeekFrom::Data(at)) {
        at = seek(&image.file, SeekFrom::Hole(data)).unwrap();
        parts.extend(
            (data..at).step_by(MIB as usize).map(|start| (start, MIB.min(at - start) as usize)),
        );
    }
    parts
}

/// Copies with this many threads, each with its own part. With `direct` it bypasses the page cache.
pub fn copy(source: &Image, path: &Path, threads: usize, direct: bool) -> Took {
    let flags = if direct { OFlags::DIRECT } else { OFlags::empty() };
    let (started, before) = (Instant::now(), processor_time(std::process::id()));
    let file = File::options()
        .write(true)
        .create_new(true)
        .custom_flags(flags.bits() as i32)
        .open(path)
        .unwrap();
    let parts = parts(source);
    std::thread::scope(|scope| {
        for share in parts.chunks(parts.len().div_ceil(threads)) {
            let file = &file;
            scope.spawn(move || {
                let mut buffer = PageBuffer::new(MIB as usize);
                for &(at, length) in share {
                    source.file.read_exact_at(&mut buffer[..length], at).unwrap();
                    file.write_all_at(&buffer[..length], at).unwrap();
                }
            });
        }
    });
    let written = started.elapsed();
    let started = Instant::now();
    file.sync_all().unwrap();
    Took {
        written,
        safe: started.elapsed(),
        processor: processor_time(std::process::id()) - before,
    }
}
