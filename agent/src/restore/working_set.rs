//! What a guest touched first, for the next time that it is restored.
//!
//! A restore for which there is no working set writes one: the host pages that the guest waited
//! for, in that order. The next restore of the same image reads them ahead.
//!
//! What is at the path decides:
//! - nothing: it is written when the job ends, if the guest ran, unless something is there by then;
//! - the working set of this image: it is read ahead, and never changed;
//! - that of another image, or one that is damaged: of no use, and the next would be of none
//!   either. It is ignored with a warning, and replaced when the job ends;
//! - anything else, also an empty file, or what cannot be read: the restore is refused before
//!   anything is touched. It would have to be ignored for ever, or be overwritten.
//!
//! The restore is refused as well if the file could not be written, as far as that can be told
//! before. If it cannot be written at the end, the job completes, and its status says why.

use super::source::{RestoreError, Source};
use crate::image::Fault;
use crate::image::bytes::write_at;
use crate::image::chain::in_extents;
use crate::image::new_file::{FileKind, NewFile};
use crate::memory::GuestMemory;
use crate::memory::runs::{NEAR, join_near_runs};
use pageferry_protocol::image::working_set::{MAGIC, MAX_RUNS, MAX_SIZE, WorkingSetError};
use pageferry_protocol::image::{ImageId, WorkingSet, id_text};
use pageferry_protocol::memory::PageRange;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// Why what is at the path cannot be used, and must not be replaced.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetFault {
    /// It cannot be read.
    #[error("it cannot be read")]
    Read(#[source] Errno),
    /// It is no file, or too long.
    #[error(
        "it is no working set: it is no file, or has {0:#x} bytes, and one has at most {MAX_SIZE:#x}"
    )]
    Kind(u64),
    /// It is something else.
    #[error("it is not to be overwritten")]
    Other(#[source] WorkingSetError),
    /// It is empty.
    #[error("it is empty, which is no working set: remove it, or choose another name")]
    Empty,
    /// It is not there, and cannot be written.
    #[error("it could not be written")]
    Write(#[source] Box<Fault>),
}

/// What is to be done about the working set.
#[derive(Debug, PartialEq, Eq)]
pub enum WorkingSetPlan {
    /// Nothing.
    None,
    /// These pages are read ahead, each piece in one extent: index of the block, and pages.
    Read(Vec<(usize, PageRange)>),
    /// It is written.
    Write(WorkingSetRecorder),
}

impl WorkingSetPlan {
    /// Looks at what is at `path`; empty if none is wanted.
    ///
    /// # Errors
    /// If it is something else, or cannot be read.
    pub fn of(path: &str, source: &Source, memory: &GuestMemory) -> Result<Self, RestoreError> {
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
            return Err(refused(WorkingSetFault::Empty));
        }
        if !bytes.starts_with(&MAGIC) {
            return Err(refused(WorkingSetFault::Other(WorkingSetError::Magic)));
        }
        let useless = match WorkingSet::decode(&bytes) {
            Err(error) => crate::error::chain(&error),
            Ok(set) if set.image != image => format!("it is of image {}", id_text(&set.image)),
            Ok(set) => match pieces(&set, memory) {
                Ok(pieces) => return Ok(Self::Read(pieces)),
                Err(useless) => useless,
            },
        };
        log::warn!("working_set {} is ignored, and will be replaced: {useless}", path.display());
        // What was read is what is behind a link, and so is what is replaced.
        let behind = path.canonicalize().unwrap_or_else(|_| path.clone());
        Ok(Self::Write(WorkingSetRecorder::new(behind, image, true).checked().map_err(refused)?))
    }

    /// What is read ahead, and what is written.
    pub fn parts(self) -> (Vec<(usize, PageRange)>, Option<WorkingSetRecorder>) {
        match self {
            Self::None => (Vec::new(), None),
            Self::Read(pieces) => (pieces, None),
            Self::Write(record) => (Vec::new(), Some(record)),
        }
    }
}

/// The file's bytes; `None` if there is no file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, WorkingSetFault> {
    let file = match rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    ) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(WorkingSetFault::Read(errno)),
    };
    let stat = rustix::fs::fstat(&file).map_err(WorkingSetFault::Read)?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() || size > MAX_SIZE {
        return Err(WorkingSetFault::Kind(size));
    }
    let mut bytes = vec![0; size as usize];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pread(&file, &mut bytes[done..], done as u64) {
            // Cut off meanwhile, which its checksum tells.
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(WorkingSetFault::Read(errno)),
        }
    }
    bytes.truncate(done);
    Ok(Some(bytes))
}

/// A working set in the pieces that it is read in: in the order of the file, those made one that
/// lie near each other. Or why it is none of this memory.
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

/// What the guest touches, as it does.
#[derive(Debug, PartialEq, Eq)]
pub struct WorkingSetRecorder {
    path: PathBuf,
    image: ImageId,
    /// What was there is of no use. What comes to be there meanwhile is not looked at, and not
    /// replaced: another restore's, most likely.
    replace: bool,
    /// Index of the block, and pages.
    runs: Vec<(usize, PageRange)>,
}

impl WorkingSetRecorder {
    fn new(path: PathBuf, image: ImageId, replace: bool) -> Self {
        Self { path, image, replace, runs: Vec::new() }
    }

    /// The same, if the file can be written as far as that can be told now.
    fn checked(self) -> Result<Self, WorkingSetFault> {
        self.create().map(|_| self).map_err(|fault| WorkingSetFault::Write(fault.into()))
    }

    /// The file, which has its name when it is complete.
    fn create(&self) -> Result<NewFile, Fault> {
        NewFile::create(&self.path, FileKind::WORKING_SET, self.replace)
    }

    /// The guest waits for the pages `pages` of the block at index `at`.
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

    /// Writes it. That it cannot be written is no reason for a restore to fail: this returns why.
    pub fn write(self, memory: &GuestMemory) -> Option<String> {
        let why = if self.runs.is_empty() {
            // It says nothing of the next.
            "the guest waited for no page".to_owned()
        } else if let Err(replaced) = memory.current.check() {
            replaced.to_string()
        } else {
            crate::error::chain(&self.try_write(memory).err()?)
        };
        Some(format!("working_set {} is not written: {why}", self.path.display()))
    }

    fn try_write(&self, memory: &GuestMemory) -> Result<(), Fault> {
        let named = |(at, run): &(usize, PageRange)| (memory.blocks()[*at].geometry.id, *run);
        let set = WorkingSet { image: self.image, runs: self.runs.iter().map(named).collect() };
        let file = self.create()?;
        write_at(file.as_fd(), &set.encode(), 0)?;
        file.finish()
    }
}
