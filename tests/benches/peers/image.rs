//! Guest memory as a file on tmpfs, prepared once and shared by all who move it.

use pageferry_tests::random::Random;
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A file that is removed on drop.
#[derive(Debug)]
pub struct Image {
    /// Where it lies.
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
    /// A file of `size` bytes, all holes.
    pub fn new(folder: &Path, name: &str, size: u64) -> Self {
        let path = folder.join(format!("pageferry-bench-{}-{name}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(size).unwrap();
        Self { path, file, size, owned: true }
    }

    /// The same file once more, for someone else to look at.
    pub fn again(other: &Self) -> Self {
        Self { path: other.path.clone(), file: other.file.try_clone().unwrap(), size: other.size, owned: false }
    }

    /// Zeroes the first bytes of all pages, where a guest counts.
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

    /// Frees a range.
    pub fn punch(&self, start: u64, length: u64) {
        fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, length).unwrap();
    }

    /// Frees all of it.
    pub fn clear(&self) {
        self.punch(0, self.size);
    }

    /// Touches so many bytes and frees them again: the first touch comes from the host underneath, and is dear.
    pub fn warm_up(&self, length: u64) {
        let buffer = vec![1u8; BUFFER];
        for at in (0..length.min(self.size)).step_by(BUFFER) {
            self.file.write_all_at(&buffer[..BUFFER.min((self.size - at) as usize)], at).unwrap();
        }
        self.clear();
    }

    /// Bytes allocated.
    pub fn allocated(&self) -> u64 {
        self.file.metadata().unwrap().blocks() * 512
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.owned {
            // Someone may have removed it; there is nothing to do about it then.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
