// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bases of clones in a lazy restore ([`crate::base`]).
//!
//! A page that the base has is not missing: the kernel maps it. A page that the image does not have
//! becomes an entry of zeroes before the restore ends.

use super::error::RestoreError;
use super::source::Source;
use crate::base::{BaseName, Layout, Place};
use crate::job::JobError;
use crate::memory::backing::BackingKind;
use crate::memory::base_placer::BasePlacer;
use crate::memory::host_page_set::HostPageSet;
use crate::memory::{GuestMemory, MemoryError};
use crate::opener;
use crate::piece_locks::PieceLocks;
use pageferry_protocol::control::job::RestoreOptions;
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// For each block of the memory its base. Empty if the guest is no clone.
#[derive(Debug, Default)]
pub struct Bases(Vec<Option<Arc<BasePlacer>>>);

impl Bases {
    /// Opens the base that the blocks are mappings of if the guest is to be a clone, and checks
    /// that it is that of the image. Otherwise checks that the guest can come into the memory.
    ///
    /// A restore that another agent began `continues`, also if the files of the image were touched
    /// or moved since.
    ///
    /// # Errors
    /// Which block is not as it must be, or why the base cannot be opened.
    pub fn of(
        options: &RestoreOptions, memory: &GuestMemory, source: &Source, continues: bool,
    ) -> Result<Self, JobError> {
        if !options.shared_base {
            memory.check_writable()?;
            return Ok(Self::default());
        }
        let Layout { places, length, .. } = Layout::of(source.chain());
        let Some(first) = memory.blocks().first() else { return Ok(Self::default()) };
        let no_clone = |id| JobError::from(RestoreError::NoClone { id });
        let first_id = first.geometry.id;
        if first.backing.kind() != BackingKind::Clone {
            return Err(no_clone(first_id));
        }
        // Whether it still has a name makes no difference to who has it mapped.
        let file = opener::base_again(first.backing.fd())
            .map_err(JobError::from_io("open the base of the VMM"))?;
        if !is_of(&file, source, length, continues)? {
            return Err(no_clone(first_id));
        }
        let duplicate = || file.try_clone().map_err(JobError::from_io("duplicate a descriptor"));
        let (areas, locks) = (Arc::default(), Arc::new(PieceLocks::new(duplicate()?)));
        let identity = |file: &dyn AsFd| {
            rustix::fs::fstat(file.as_fd()).map(|stat| (stat.st_dev, stat.st_ino))
        };
        let mut bases = Vec::new();
        for block in memory.blocks() {
            let id = block.geometry.id;
            let place = places.iter().find(|place| place.block.id == id);
            let place = place.filter(|place| {
                block.backing.kind() == BackingKind::Clone
                    && block.backing.file_offset(0) == place.block.offset
                    && identity(&block.backing.fd()) == identity(&file)
            });
            let Some(place) = place else { return Err(no_clone(id)) };
            let Place { block: place, filled } = *place;
            let base = BasePlacer::new(duplicate()?, (place, filled), &areas, &locks);
            let base = base.map_err(|source| MemoryError::Backing { id, source })?;
            bases.push(Some(Arc::new(base)));
        }
        Ok(Self(bases))
    }

    /// Takes the pages from `missing` that the bases have.
    pub fn take_present(&self, missing: &HostPageSet) {
        for (at, base) in self.0.iter().enumerate() {
            let Some(base) = base else { continue };
            for run in base.filled().runs(base.filled().all()) {
                missing.take_range(at, run, |_, _| ());
            }
        }
    }

    /// The base of each block.
    pub fn into_blocks(self) -> Vec<Option<Arc<BasePlacer>>> {
        self.0
    }
}

/// True if `file` is a base of the image, and as long as that is.
fn is_of(file: &OwnedFd, source: &Source, length: u64, continues: bool) -> Result<bool, JobError> {
    let failed = |errno: Errno| JobError::from_io("read the base of the VMM")(errno.into());
    let size = rustix::fs::fstat(file).map_err(failed)?.st_size;
    let (name, found) =
        (BaseName::of(source.chain()), BaseName::read_from(file.as_fd()).map_err(failed)?);
    Ok(found.is_some_and(|found| found == name || (continues && found.has_ids_of(&name)))
        && u64::try_from(size) == Ok(length))
}
