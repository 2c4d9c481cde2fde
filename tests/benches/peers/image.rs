// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory as a file on tmpfs, prepared once and used by all programs.

use pageferry_agent::memory::Backing;
use pageferry_agent::memory::huge_page_supply::HugePageSupply;
use pageferry_agent::memory::large_pages::LargePages;
use pageferry_agent::memory::spare_memory::SpareMemory;
use pageferry_protocol::memory::HUGE_PAGE;
use pageferry_tests::random::{Random, page_text};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file that is removed on drop.
#[derive(Debug)]
pub struct Image {
    /// Its path.
    pub path: PathBuf,
    /// The file.
    pub file: File,
    /// Its size in bytes.
    pub size: u64,
    /// Whether dropping it removes the file.
    owned: bool,
}

/// Bytes of a buffer.
const BUFFER: usize = 1 << 20;

impl Image {
    /// A file of `size` bytes. All of it is a hole.
    pub fn new(folder: &Path, name: &str, size: u64) -> Self {
        let path = folder.join(format!("pageferry-bench-{}-{name}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(size).unwrap();
        Self { path, file, size, owned: true }
    }

    /// The same file once more, for another reader.
    pub fn again(other: &Self) -> Self {
        Self {
            path: other.path.clone(),
            file: other.file.try_clone().unwrap(),
            size: other.size,
            owned: false,
        }
    }

    /// Zeroes the first bytes of all pages, which a guest uses as counters.
    pub fn zero_counters(&self) {
        for at in (0..self.size).step_by(4096) {
            self.file.write_all_at(&[0; 4], at).unwrap();
        }
    }

    /// Fills a range with bytes that neither repeat nor compress.
    pub fn fill(&self, start: u64, length: u64) {
        let mut random = Random::new(start + 1);
        let mut buffer = vec![0u8; BUFFER];
        for at in (0..length).step_by(BUFFER) {
            let part = &mut buffer[..BUFFER.min((length - at) as usize)];
            random.fill(part);
            self.file.write_all_at(part, start + at).unwrap();
        }
    }

    /// Fills all of it with text, which compresses.
    pub fn fill_text(&self) {
        for at in (0..self.size).step_by(BUFFER) {
            let part: Vec<u8> = (at / 4096..(at + BUFFER as u64).min(self.size) / 4096)
                .flat_map(page_text)
                .collect();
            self.file.write_all_at(&part, at).unwrap();
        }
    }

    /// Frees a range.
    pub fn punch(&self, start: u64, length: u64) {
        fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            start,
            length,
        )
        .unwrap();
    }

    /// Frees all of it.
    pub fn clear(&self) {
        self.punch(0, self.size);
    }

    /// Bytes allocated.
    pub fn allocated(&self) -> u64 {
        self.file.metadata().unwrap().blocks() * 512
    }
}

/// A guest full of content, a destination for it, and warm memory for that destination.
pub fn full_guest(folder: &Path, size: u64) -> (Image, Image, WarmPool) {
    let (source, destination) =
        (Image::new(folder, "source", size), Image::new(folder, "destination", size));
    source.fill(0, size);
    (source, destination, WarmPool::new(folder, size * 2))
}

/// Free memory that stays warm.
///
/// If the bench runs in a virtual machine, the first touch of a page goes to the host and is slow,
/// and free page reporting gives large free blocks back to the host all the time. So the time of a
/// run that allocates 2 GiB varies by a factor of two. Therefore this holds one page in every few
/// as long as it lives. The free pages between them have been touched, are too small to be
/// reported, and are what the kernel allocates first.
#[derive(Debug)]
pub struct WarmPool {
    _held: Image,
}

impl WarmPool {
    /// Pages of a piece. Free page reporting begins at blocks of 512 pages.
    const PIECE: usize = 128;

    /// Makes a pool of `length` bytes.
    pub fn new(folder: &Path, length: u64) -> Self {
        let pieces = length / (Self::PIECE as u64 * 4096);
        let held = Image::new(folder, "held", pieces * 4096);
        let free = Image::new(folder, "free", length);
        let piece = vec![1u8; (Self::PIECE - 1) * 4096];
        for index in 0..pieces {
            held.file.write_all_at(&piece[..4096], index * 4096).unwrap();
            free.file.write_all_at(&piece, index * piece.len() as u64).unwrap();
        }
        Self { _held: held }
    }
}

/// Makes `length` bytes of large pages that are free and warm.
///
/// What is reported to the host cannot be held back for large pages, but it is reported after two
/// seconds only. So this is called right before each run.
pub fn warm_large_pages(folder: &Path, length: u64) {
    let image = Image::new(folder, "large", length);
    let backing = Backing::new(image.file.try_clone().unwrap().into(), 0, length).unwrap();
    let supply = HugePageSupply::new(&Arc::default(), SpareMemory::of_this_process());
    let Some(large) = LargePages::new(&backing, &Arc::new(supply), &Arc::default()).unwrap() else {
        return;
    };
    let content = vec![1; HUGE_PAGE as usize];
    for at in (0..length / HUGE_PAGE * HUGE_PAGE).step_by(HUGE_PAGE as usize) {
        backing.write(at, &content[..4096]).unwrap();
        if large.make(at) {
            large.copy(at, &content).unwrap();
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.owned {
            // The file may have been removed already.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
