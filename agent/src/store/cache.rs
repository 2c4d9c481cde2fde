// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The cache of this machine: the images that its agents have read from stores, as far as they have
//! read them.
//!
//! Each image has a folder, named by the hash of its index:
//!
//! - `data`: the image file, with holes where nothing was read yet;
//! - `present`: which pieces `data` has;
//! - `locks`: who fetches which piece ([`PieceLocks`]), so that each is fetched once.
//!
//! All processes of a user share the folder. A piece is written before its byte in `present` says
//! that it is there. So whatever process is killed, `present` says no more than what is there.
//! After a crash of the machine that is not sure: the bytes of an earlier boot count as *doubtful*,
//! and such a piece is compared with its hash before it is used.
//!
//! Whoever has an image open has a shared lock on `data`, also an agent that got the descriptor
//! from another process. An image without such a lock is removed when the cache is too large, the
//! one that was opened longest ago first.

use super::error::StoreError;
use crate::piece_locks::PieceLocks;
use crate::sizes::parse_size;
use pageferry_protocol::image::stored::Index;
use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// How much the cache keeps if `PAGEFERRY_CACHE_SIZE` does not say it, in bytes.
const DEFAULT_SIZE: u64 = 20 << 30;
/// Bytes of `present` before those of the pieces: the boot in which they were written.
pub(super) const PRESENT_HEAD: u64 = 64;
/// How often a folder is opened again that another process removes just now.
const ATTEMPTS: u32 = 100;
/// What the name of a private folder begins with, before the number of its process.
const PRIVATE: &str = "private-";
/// Mode of files that only their user may use.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// What `present` says of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// `data` does not have it.
    Absent = 0,
    /// `data` has it.
    Present = 1,
    /// `data` had it before this machine was started.
    Doubtful = 2,
}

impl State {
    fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::Present,
            2 => Self::Doubtful,
            _ => Self::Absent,
        }
    }
}

/// The folder of the cache.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
    size: u64,
}

impl Cache {
    /// The cache that the environment names: `PAGEFERRY_CACHE`, or `pageferry` in the user's folder
    /// for caches; and `PAGEFERRY_CACHE_SIZE`.
    ///
    /// # Errors
    /// If there is no such folder and it cannot be made, or the size is no size.
    pub(super) fn of_environment() -> Result<Self, StoreError> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let user = || {
            let of_user = variable("XDG_CACHE_HOME").map(PathBuf::from);
            let home = || variable("HOME").map(|home| PathBuf::from(home).join(".cache"));
            of_user.or_else(home).unwrap_or_else(|| "/var/cache".into()).join("pageferry")
        };
        let folder = variable("PAGEFERRY_CACHE").map_or_else(user, PathBuf::from);
        let size = match variable("PAGEFERRY_CACHE_SIZE") {
            None => DEFAULT_SIZE,
            Some(text) => {
                let size = text.to_str().and_then(|text| parse_size(text).ok());
                size.ok_or_else(|| {
                    let allowed = "PAGEFERRY_CACHE_SIZE is not a size such as 500M or 20G";
                    StoreError::cache("use the cache", allowed)
                })?
            }
        };
        Self::new(folder, size)
    }

    /// A cache in `folder` that keeps about `size` bytes.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub(super) fn new(folder: PathBuf, size: u64) -> Result<Self, StoreError> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.map_err(|error| {
            StoreError::cache(&format!("make the folder {} of the cache", folder.display()), error)
        })?;
        Ok(Self { folder, size })
    }

    /// A new folder in the cache, for a process that wants to read nothing that others have read.
    ///
    /// # Errors
    /// If it cannot be made.
    pub(super) fn private_folder(&self) -> Result<PathBuf, StoreError> {
        self.remove_left_private_folders();
        let folder = self.folder.join(format!("{PRIVATE}{}", std::process::id()));
        let made = std::fs::DirBuilder::new().mode(0o700).create(&folder);
        made.map_err(|error| self.failed("make a folder", error))?;
        Ok(folder)
    }

    /// Removes the folders of processes that were killed.
    fn remove_left_private_folders(&self) {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        for folder in entries {
            let owner = folder.file_name();
            let Some(owner) = owner.to_str().and_then(|name| name.strip_prefix(PRIVATE)) else {
                continue;
            };
            // This process has had none so far.
            let is_left =
                owner == std::process::id().to_string() || !Path::new("/proc").join(owner).exists();
            if is_left && let Err(error) = std::fs::remove_dir_all(folder.path()) {
                log::warn!("{} stays: {error}", folder.path().display());
            }
        }
    }

    /// A file without a name in the cache, for an image that is being made.
    ///
    /// # Errors
    /// If the file system refuses.
    pub(super) fn spool(&self) -> Result<OwnedFd, StoreError> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let made = rustix::fs::open(&self.folder, flags, MODE);
        made.map_err(|error| self.failed("make a file", error))
    }

    fn failed(&self, what: &str, error: impl std::fmt::Display) -> StoreError {
        StoreError::cache(&format!("{what} in the cache {}", self.folder.display()), error)
    }

    /// The cached image with this index, whose hash is `hash`. It is made if it is not there.
    ///
    /// # Errors
    /// If the file system refuses.
    pub(super) fn open(&self, index: &Index, hash: &[u8; 16]) -> Result<CachedImage, StoreError> {
        let folder = self.folder.join(pageferry_protocol::image::id_text(hash));
        for _ in 0..ATTEMPTS {
            let opened = CachedImage::open(&folder, index);
            if let Some(image) = opened.map_err(|error| self.failed("open an image", error))? {
                return Ok(image);
            }
        }
        Err(self.failed("open an image", "other processes remove it again and again"))
    }

    /// Removes images that nobody has open until there is room for `bytes` more.
    pub(super) fn make_room(&self, bytes: u64) {
        let mut images = self.images();
        // The one that was opened longest ago comes last.
        images.sort_unstable_by_key(|image| std::cmp::Reverse(image.opened));
        let mut used: u64 = images.iter().map(|image| image.bytes).sum();
        while used.saturating_add(bytes) > self.size
            && let Some(image) = images.pop()
        {
            match remove(&image.folder) {
                Ok(true) => {
                    log::info!("{} is removed from the cache", image.folder.display());
                    used -= image.bytes;
                }
                Ok(false) => {}
                Err(error) => log::warn!("{} stays: {error}", image.folder.display()),
            }
        }
    }

    fn images(&self) -> Vec<ImageInCache> {
        let folders = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        folders.filter_map(|entry| ImageInCache::at(entry.path())).collect()
    }
}

/// An image in the cache.
struct ImageInCache {
    folder: PathBuf,
    bytes: u64,
    opened: SystemTime,
}

impl ImageInCache {
    fn at(folder: PathBuf) -> Option<Self> {
        let (data, present) = (folder.join("data"), folder.join("present"));
        let (data, present) = (data.metadata().ok()?, present.metadata().ok()?);
        let bytes = (data.blocks() + present.blocks()) * 512;
        Some(Self { folder, bytes, opened: present.modified().ok()? })
    }
}

/// Removes an image, unless somebody has it open.
fn remove(folder: &Path) -> io::Result<bool> {
    let data = File::open(folder.join("data"))?;
    match flock(&data, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    }
    // Whoever opens it now looks again, since `data` has no name any more.
    for name in ["data", "present", "locks"] {
        match std::fs::remove_file(folder.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    match std::fs::remove_dir(folder) {
        // Another process makes it anew.
        Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => Err(error),
        _ => Ok(true),
    }
}

/// A cached image that is open.
#[derive(Debug)]
pub(super) struct CachedImage {
    data: File,
    present: File,
    pub(super) locks: PieceLocks,
}

impl CachedImage {
    /// Opens the image in `folder`. `None` if another process has removed it meanwhile.
    fn open(folder: &Path, index: &Index) -> io::Result<Option<Self>> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        let open = |name: &str| -> io::Result<Option<File>> {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            match rustix::fs::open(folder.join(name), flags, MODE) {
                Ok(file) => Ok(Some(file.into())),
                Err(Errno::NOENT) => Ok(None),
                Err(errno) => Err(errno.into()),
            }
        };
        made?;
        let Some(data) = open("data")? else { return Ok(None) };
        flock(&data, FlockOperation::LockShared)?;
        let (Some(present), Some(locks)) = (open("present")?, open("locks")?) else {
            return Ok(None);
        };
        // The one that has this name must be the one that is locked.
        let named = folder.join("data").metadata();
        let locked = data.metadata()?.ino();
        if !named.is_ok_and(|named| named.ino() == locked) {
            return Ok(None);
        }
        let image = Self { data, present, locks: PieceLocks::new(locks.into()) };
        image.prepare(index)?;
        Ok(Some(image))
    }

    /// Gives the files their lengths, and doubts what an earlier boot has written. Pieces without
    /// content are there from the start, so nobody asks for them: they are holes of `data`.
    fn prepare(&self, index: &Index) -> io::Result<()> {
        if self.data.metadata()?.len() != index.length {
            self.data.set_len(index.length)?;
        }
        // One process at a time.
        let lock = self.locks.try_lock(u64::MAX >> 1);
        let head = boot()?;
        let mut found = [0; PRESENT_HEAD as usize];
        let length = PRESENT_HEAD + index.count();
        if self.present.metadata()?.len() == length {
            self.present.read_exact_at(&mut found, 0)?;
        }
        if found != head {
            // Another process may do the same just now: both write the same.
            let mut states = vec![0; index.count() as usize];
            if self.present.metadata()?.len() == length {
                self.present.read_exact_at(&mut states, PRESENT_HEAD)?;
            }
            let mut pieces = index.pieces.iter().map(|piece| piece.number).peekable();
            for (number, state) in (0..).zip(&mut states) {
                let known = match (pieces.next_if_eq(&number), *state) {
                    (None, _) => State::Present,
                    (Some(_), 0) => State::Absent,
                    (Some(_), _) => State::Doubtful,
                };
                *state = known as u8;
            }
            self.present.set_len(length)?;
            self.present.write_all_at(&states, PRESENT_HEAD)?;
            self.present.write_all_at(&head, 0)?;
        } else {
            // Now it was opened last.
            self.present.set_modified(SystemTime::now())?;
        }
        if matches!(lock, Ok(true)) {
            self.locks.unlock(u64::MAX >> 1);
        }
        Ok(())
    }

    /// What the cache says of a piece.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(super) fn state(&self, piece: u64) -> io::Result<State> {
        let mut byte = [0];
        self.present.read_exact_at(&mut byte, PRESENT_HEAD + piece)?;
        Ok(State::from_byte(byte[0]))
    }

    /// Writes the content of a piece, which begins at `offset` of the file, and then that it is
    /// there. Zeroes stay holes.
    ///
    /// # Errors
    /// If the file system refuses.
    pub(super) fn put(&self, piece: u64, offset: u64, content: &[u8]) -> io::Result<()> {
        const BLOCK: usize = 4096;
        let is_zero = |block: &[u8]| block.iter().fold(0, |sum, byte| sum | byte) == 0;
        let mut at = 0;
        while at < content.len() {
            let blocks = content[at..].chunks(BLOCK);
            let zero = is_zero(&content[at..content.len().min(at + BLOCK)]);
            let run = blocks.take_while(|block| is_zero(block) == zero).map(<[u8]>::len).sum();
            let run: usize = run;
            if !zero {
                self.data.write_all_at(&content[at..at + run], offset + at as u64)?;
            }
            at += run;
        }
        self.confirm(piece)
    }

    /// Makes a part of `data` a hole.
    ///
    /// # Errors
    /// If the file system refuses.
    pub(super) fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.data, flags, offset, length)?)
    }

    /// Notes that a piece is there.
    ///
    /// # Errors
    /// If the file system refuses.
    pub(super) fn confirm(&self, piece: u64) -> io::Result<()> {
        self.present.write_all_at(&[State::Present as u8], PRESENT_HEAD + piece)
    }

    /// Reads a piece that is there, or is doubtful.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(super) fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut content = vec![0; length];
        self.data.read_exact_at(&mut content, offset)?;
        Ok(content)
    }

    /// Descriptors of `data` and `present` that only read. The first one is locked for its owner,
    /// too.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn to_read(&self) -> io::Result<[OwnedFd; 2]> {
        let again = |file: &File| -> io::Result<OwnedFd> {
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
            Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
        };
        let (data, present) = (again(&self.data)?, again(&self.present)?);
        flock(data.as_fd(), FlockOperation::NonBlockingLockShared)?;
        Ok([data, present])
    }
}

/// The head of `present` in this boot.
fn boot() -> io::Result<[u8; PRESENT_HEAD as usize]> {
    let id = std::fs::read("/proc/sys/kernel/random/boot_id")?;
    let mut head = [0; PRESENT_HEAD as usize];
    let length = id.len().min(head.len());
    head[..length].copy_from_slice(&id[..length]);
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::image::stored::{Form, Piece};

    #[test]
    fn a_piece_without_content_is_present_from_the_start_and_in_every_boot() {
        let piece = |number| Piece {
            number,
            pack: 0,
            form: Form::Plain,
            offset: 0,
            length: 1 << 16,
            hash: [0; 16],
        };
        let index = Index {
            image: [1; 16],
            upload: [2; 16],
            length: 5 << 16,
            piece_size: 1 << 16,
            packs: vec!["0".into()],
            pieces: vec![piece(1), piece(3)],
        };
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().to_owned(), u64::MAX).unwrap();
        let open = || cache.open(&index, &[3; 16]).unwrap();
        let states = || [0, 1, 2, 3, 4].map(|piece| open().state(piece).unwrap());
        use State::{Absent, Doubtful, Present};
        assert_eq!(states(), [Present, Absent, Present, Absent, Present]);
        open().put(3, 3 << 16, &[7; 1 << 16]).unwrap();
        assert_eq!(states(), [Present, Absent, Present, Present, Present]);
        // The machine is started again.
        open().present.write_all_at(&[0; PRESENT_HEAD as usize], 0).unwrap();
        assert_eq!(states(), [Present, Absent, Present, Doubtful, Present]);
        assert_eq!(open().read(2 << 16, 1 << 16).unwrap(), [0; 1 << 16]);
    }
}
