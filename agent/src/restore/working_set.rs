// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The working set: the pages that a guest touched first, recorded for its next restore.
//!
//! If a lazy restore has no working set yet, it writes one: the host pages for which the guest
//! waited, in that order. The next restore of the same image prefetches them.
//!
//! What the restore finds at the path decides what it does:
//!
//! - No file: it records, and writes the file when the job ends, if the guest ran. It does not
//!   replace a file that appeared at the path in the meantime.
//! - A working set of this image: it prefetches these pages, and never changes the file.
//! - A working set of another image, or a damaged one, or one that is not sealed with the key of a
//!   sealed image: the next restore could not use it either. So
//!   the restore logs a warning, records, and replaces the file when the job ends.
//! - Anything else, for example an empty file or one that cannot be read: it refuses before it
//!   changes memory. The file would have to be ignored for ever or be overwritten, and it may be
//!   important to somebody.
//!
//! It also refuses if a check in advance shows that the file cannot be written. If writing fails at
//! the end all the same, the job completes, and its status says why there is no working set.

use super::error::{RestoreError, WorkingSetFileError};
use super::source::Source;
use crate::image::bytes::write_at;
use crate::image::chain::in_extents;
use crate::image::new_file::{FileKind, NewFile};
use crate::image::seal::{Sealer, Unsealer};
use crate::image::{ImageFault, ImageKey};
use crate::memory::GuestMemory;
use crate::memory::runs::{NEAR, join_near_runs};
use crate::opener;
use crate::store::{self, StoreErrorKind};
use pageferry_protocol::image::working_set::SealedWorkingSet;
use pageferry_protocol::image::working_set::{MAGIC, MAX_RUNS, MAX_SIZE, WorkingSetError};
use pageferry_protocol::image::{ImageId, Place, WorkingSet, id_text};
use pageferry_protocol::memory::PageRange;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// What to do about the working set.
#[derive(Debug, PartialEq, Eq)]
pub enum WorkingSetPlan {
    /// Nothing: the request names no file.
    None,
    /// Prefetch these pieces, each of which lies in one extent: index of the block, and pages.
    Read(Vec<(usize, PageRange)>),
    /// Record what the guest touches, and write the file at the end.
    Write(WorkingSetRecorder),
}

impl WorkingSetPlan {
    /// Decides by what is at `path`. An empty path means that no working set is wanted. With a key,
    /// only a working set is used that is sealed with it: it says which memory the guest uses.
    ///
    /// # Errors
    /// If the file at the path must not be used or replaced, or if none can be written.
    pub fn of(
        path: &str, source: &Source, memory: &GuestMemory, key: Option<&ImageKey>,
    ) -> Result<Self, RestoreError> {
        if path.is_empty() {
            return Ok(Self::None);
        }
        let (path, image) = (PathBuf::from(path), source.newest().header().id);
        let refused = |source| RestoreError::WorkingSet { path: path.clone(), source };
        let Some(bytes) = read(&path).map_err(refused)? else {
            return Ok(Self::Write(
                WorkingSetRecorder::new(path.clone(), image, false).checked().map_err(refused)?,
            ));
        };
        if bytes.is_empty() {
            return Err(refused(WorkingSetFileError::Empty));
        }
        if !bytes.starts_with(&MAGIC) {
            return Err(refused(WorkingSetFileError::OtherKind(WorkingSetError::Magic)));
        }
        let useless = match decode(&bytes, key) {
            Err(useless) => useless,
            Ok(set) if set.image != image => format!("it is of image {}", id_text(&set.image)),
            Ok(set) => match pieces(&set, memory) {
                Ok(pieces) => return Ok(Self::Read(pieces)),
                Err(useless) => useless,
            },
        };
        log::warn!("working_set {} is ignored, and will be replaced: {useless}", path.display());
        // A symbolic link was followed for reading, so the file behind the link is replaced.
        let behind = path.canonicalize().unwrap_or_else(|_| path.clone());
        Ok(Self::Write(WorkingSetRecorder::new(behind, image, true).checked().map_err(refused)?))
    }

    /// The pieces to prefetch, and the recorder.
    pub fn parts(self) -> (Vec<(usize, PageRange)>, Option<WorkingSetRecorder>) {
        match self {
            Self::None => (Vec::new(), None),
            Self::Read(pieces) => (pieces, None),
            Self::Write(record) => (Vec::new(), Some(record)),
        }
    }
}

/// Reads the file. Returns `None` if there is no file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, WorkingSetFileError> {
    if store::is_stored(path) {
        return match store::client::read(path, MAX_SIZE) {
            Err(error) if error.kind == StoreErrorKind::Missing => Ok(None),
            found => Ok(Some(found.map_err(WorkingSetFileError::Store)?)),
        };
    }
    let file = match opener::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    ) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(WorkingSetFileError::Read(errno)),
    };
    let stat = rustix::fs::fstat(&file).map_err(WorkingSetFileError::Read)?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() || size > MAX_SIZE {
        return Err(WorkingSetFileError::NotAWorkingSet(size));
    }
    let mut bytes = vec![0; size as usize];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pread(&file, &mut bytes[done..], done as u64) {
            // The file was truncated while it was read. Its checksum will not be right.
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(WorkingSetFileError::Read(errno)),
        }
    }
    bytes.truncate(done);
    Ok(Some(bytes))
}

/// The working set in these bytes. The error says why it cannot be used.
fn decode(bytes: &[u8], key: Option<&ImageKey>) -> Result<WorkingSet, String> {
    let decode = |bytes| WorkingSet::decode(bytes).map_err(|error| crate::error::chain(&error));
    match (SealedWorkingSet::decode(bytes), key) {
        (None, None) => decode(bytes),
        (Some(_), None) => Err("it is sealed, and this agent has no key".into()),
        (None, Some(_)) => Err("it is not sealed, and this agent has a key".into()),
        (Some(SealedWorkingSet { salt, seal, mut bytes }), Some(key)) => {
            let unsealer =
                Unsealer::new(key, &salt).map_err(|fault| crate::error::chain(&fault))?;
            let opened = unsealer.open(Place::WorkingSet, seal, &mut bytes);
            opened.map_err(|_| "the key does not fit it, or somebody has changed it".to_owned())?;
            decode(&bytes)
        }
    }
}

/// The bytes of a working set, sealed.
fn seal(mut bytes: Vec<u8>, key: &ImageKey) -> Result<Vec<u8>, ImageFault> {
    let sealer = Sealer::new(key)?;
    let seal = sealer.seal(Place::WorkingSet, &mut bytes)?;
    Ok(SealedWorkingSet { salt: sealer.salt(), seal, bytes }.encode())
}

/// The pieces in which the working set is read: sorted in the order of the image, with runs near
/// each other joined. The error says why the working set does not belong to this memory.
fn pieces(set: &WorkingSet, memory: &GuestMemory) -> Result<Vec<(usize, PageRange)>, String> {
    let mut runs = Vec::with_capacity(set.runs.len());
    for (id, run) in &set.runs {
        match memory.find(*id) {
            Some((at, block)) if run.fits(block.geometry.pages()) => runs.push((at, *run)),
            _ => {
                return Err(format!(
                    "it has pages {:#x} + {:#x} of block {id}, which do not exist",
                    run.first, run.count
                ));
            }
        }
    }
    runs.sort_unstable();
    let of_block = |runs: &[(usize, PageRange)]| {
        let at = runs[0].0;
        join_near_runs(runs.iter().map(|(_, run)| *run), NEAR)
            .flat_map(in_extents)
            .map(|piece| (at, piece))
            .collect::<Vec<_>>()
    };
    Ok(runs.chunk_by(|(one, _), (other, _)| one == other).flat_map(of_block).collect())
}

/// Records the pages that the guest touches.
#[derive(Debug, PartialEq, Eq)]
pub struct WorkingSetRecorder {
    path: PathBuf,
    image: ImageId,
    /// Replace the useless file at the path. If false, there was no file; one that is there at the
    /// end is kept, since it is most likely that of another restore.
    replace: bool,
    /// The touched pages, in the order of the touches: index of the block, and pages.
    runs: Vec<(usize, PageRange)>,
}

impl WorkingSetRecorder {
    fn new(path: PathBuf, image: ImageId, replace: bool) -> Self {
        Self { path, image, replace, runs: Vec::new() }
    }

    /// Checks whether the file can be written, as far as that can be known now.
    fn checked(self) -> Result<Self, WorkingSetFileError> {
        self.create().map(|_| self).map_err(|fault| WorkingSetFileError::Write(fault.into()))
    }

    /// Creates the file. It gets its name only when it is complete.
    fn create(&self) -> Result<NewFile, ImageFault> {
        NewFile::create(&self.path, FileKind::WORKING_SET, self.replace)
    }

    /// Notes that the guest waits for the pages `pages` of the block at index `at`. Drops them once
    /// the record is full ([`MAX_RUNS`]).
    pub fn touched(&mut self, at: usize, pages: PageRange) {
        let room = self.runs.len() < MAX_RUNS;
        match self.runs.last_mut() {
            Some((last_at, last)) if *last_at == at && last.end() == pages.first => {
                last.count += pages.count
            }
            _ if room => self.runs.push((at, pages)),
            _ => {}
        }
    }

    /// Writes the file. Returns the reason if it is not written: a restore does not fail for that.
    pub fn write(self, memory: &GuestMemory, key: Option<&ImageKey>) -> Option<String> {
        let why = if self.runs.is_empty() {
            // An empty working set would be of no use to the next restore.
            "the guest waited for no page".to_owned()
        } else if let Err(replaced) = memory.current.check() {
            replaced.to_string()
        } else {
            crate::error::chain(&self.try_write(memory, key).err()?)
        };
        Some(format!("working_set {} is not written: {why}", self.path.display()))
    }

    fn try_write(&self, memory: &GuestMemory, key: Option<&ImageKey>) -> Result<(), ImageFault> {
        let named = |(at, run): &(usize, PageRange)| (memory.blocks()[*at].geometry.id, *run);
        let set = WorkingSet { image: self.image, runs: self.runs.iter().map(named).collect() };
        let bytes = match key {
            Some(key) => seal(set.encode(), key)?,
            None => set.encode(),
        };
        let file = self.create()?;
        write_at(file.as_fd(), &bytes, 0)?;
        file.finish()
    }
}
