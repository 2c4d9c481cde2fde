// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writing a new image.
//!
//! Any number of threads put pages, in any order. Each page has its own offset in the file and is
//! put at most once. Zero pages are not written. After the last page, one thread finishes the
//! image: it writes everything else, syncs the file, and gives it its name.
//!
//! Large runs of pages are written with direct I/O, if the file system supports it. They reach the
//! disk at once, and do not push more useful data out of the page cache. Small runs are written
//! through the page cache, because a disk request for each would be slow.
//!
//! A write through the page cache locks the file, so it waits for the direct writes that are under
//! way. A thread with many small runs would wait for each of them. So it waits once, for a lock of
//! this program (`direct_writes`), and direct writes begin again when all its runs are written.
//!
//! If anything fails, nothing is left of the image, and a file that had its name is unchanged.

use super::bytes::{read_at, write_at};
use super::error::{ImageError, ImageFault, kernel};
use super::new_file::{FileKind, NewFile};
use super::sums::PageSums;
use crate::memory::zero::data_mask;
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::image::header::HEADER_SIZE;
use pageferry_protocol::image::{
    Contents, EXTENT_PAGES, Header, ImageId, Layout, Section, StateWord, checksum, encode_states,
    extent_checksum,
};
use pageferry_protocol::memory::{BlockTable, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};
use std::time::{SystemTime, UNIX_EPOCH};

/// Shortest run in bytes that is written with direct I/O.
const DIRECT: usize = 64 << 10;
/// Size of a hole in the parts that are not pages: pieces of this size that are zero are not
/// written.
const HOLE: usize = 4096;
/// Most bytes of one read or write, except of pages.
const PART: usize = 1 << 20;

/// The index of a block, pages of it, and their bytes.
type RunOfBytes<'a> = (usize, PageRange, &'a [u8]);

/// An image that is being written.
#[derive(Debug)]
pub struct ImageWriter {
    file: NewFile,
    /// The same file, opened for direct I/O; `None` if the file system does not support it, or the
    /// caller does not want it.
    direct: Option<OwnedFd>,
    /// Shared by threads that write with direct I/O. A thread that writes many small runs through
    /// the page cache has it alone.
    direct_writes: RwLock<()>,
    layout: Layout,
    table: BlockTable,
    /// The pages of each block that were put and are not zero.
    present: Vec<MappedBitmap>,
    sums: PageSums,
    id: ImageId,
    /// The instant of the image, in seconds since 1970.
    taken: AtomicU64,
}

/// What an image says about its guest, and about the pages that were not put. Each list is in the
/// order of the table.
#[derive(Debug, Clone, Copy)]
pub struct ImageMetadata<'a> {
    /// The run state of the guest. The pause of the snapshot does not count.
    pub guest: RunState,
    /// The pages that are discarded. A page that was put with content counts as present.
    pub discarded: &'a [MappedBitmap],
    /// For an increment: the pages that may have changed since the base. All others are as in the
    /// base, unless they are discarded.
    pub changed: Option<&'a [MappedBitmap]>,
}

/// The base of an increment. The default, an id of zeroes and no name, stands for a full image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Base {
    /// Its id.
    pub id: ImageId,
    /// Its path; relative if the base is in the folder of the increment or below.
    pub name: String,
}

/// Pages and bytes of a finished image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Pages with content.
    pub present: u64,
    /// Zero pages.
    pub zero: u64,
    /// Discarded pages.
    pub discarded: u64,
    /// Pages that are as in the base.
    pub unchanged: u64,
    /// Bytes of the file, without the holes that this program left.
    pub bytes: u64,
}

impl ImageWriter {
    /// An image of the blocks of `table` that will be at `path`. With `replace` it replaces an
    /// image that exists there. With `cached` everything is written through the page cache.
    ///
    /// # Errors
    /// If a file exists at `path` and may not be replaced, the folder cannot be written, or the
    /// blocks are too large.
    pub fn create(
        path: &Path, table: &BlockTable, replace: bool, cached: bool,
    ) -> Result<Self, ImageError> {
        Self::new(path, table, replace, cached).map_err(|fault| fault.of(path))
    }

    fn new(
        path: &Path, table: &BlockTable, replace: bool, cached: bool,
    ) -> Result<Self, ImageFault> {
        let layout = Layout::new(table)?;
        let file = NewFile::create(path, FileKind::IMAGE, replace)?;
        let direct = if cached { None } else { file.direct() };
        let present = table.blocks().iter().map(|block| MappedBitmap::private(block.pages()));
        let present = present.collect::<Result<_, _>>()?;
        // The file gets its length now, because writes that make a file longer exclude each other.
        rustix::fs::ftruncate(&file, layout.contents())
            .map_err(kernel("set the length of the file"))?;
        let (sums, id, taken) = (PageSums::default(), new_id()?, AtomicU64::new(now()));
        let (direct_writes, table) = (RwLock::default(), table.clone());
        Ok(Self { file, direct, direct_writes, layout, table, present, sums, id, taken })
    }

    /// Gives the image the id and the time of the image with this header. Both show the same guest
    /// at the same instant, so this one can replace the other.
    #[must_use]
    pub fn with_identity_of(self, header: &Header) -> Self {
        Self { id: header.id, taken: header.taken.into(), ..self }
    }

    /// Sets the instant of the image to now.
    pub fn set_instant_to_now(&self) {
        self.taken.store(now(), Ordering::Relaxed);
    }

    /// The id of the image.
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// True if large runs are written with direct I/O.
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// The path that the image will have.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Puts the pages `range` of the block at index `at` of the table. None of them was put before.
    /// Returns how many of them are not zero.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn put(&self, at: usize, range: PageRange, bytes: &[u8]) -> Result<u64, ImageError> {
        self.put_runs([(at, range, bytes)])
    }

    /// As [`ImageWriter::put`], for several runs: the index of the block, the pages and the bytes
    /// of each.
    ///
    /// # Errors
    /// As [`ImageWriter::put`].
    pub fn put_runs<'a>(
        &self, runs: impl IntoIterator<Item = (usize, PageRange, &'a [u8])>,
    ) -> Result<u64, ImageError> {
        let mut put = 0;
        let mut small = Vec::new();
        for (at, range, bytes) in runs {
            let with_content = |run: PageRange| {
                let start = (run.first - range.first) as usize * PAGE_SIZE as usize;
                (at, run, &bytes[start..start + run.bytes() as usize])
            };
            let mut data = PageRange::new(range.first, 0);
            let parts = (range.first..).step_by(64).zip(bytes.chunks(64 * PAGE_SIZE as usize));
            for run in parts.flat_map(|(first, pages)| runs_of_word(first, data_mask(pages))) {
                put += run.count;
                if run.first == data.end() {
                    data.count += run.count;
                } else {
                    small.extend(self.put_large(with_content(data))?);
                    data = run;
                }
            }
            small.extend(self.put_large(with_content(data))?);
        }
        self.put_small(&small)?;
        Ok(put)
    }

    /// Writes a run of pages that are not zero with direct I/O. Returns it if that is not possible,
    /// or if it is too small for that.
    fn put_large<'a>(&self, run: RunOfBytes<'a>) -> Result<Option<RunOfBytes<'a>>, ImageError> {
        let (at, pages, bytes) = run;
        if pages.is_empty() {
            return Ok(None);
        }
        self.add_sums(run)?;
        let Some(direct) = self.direct.as_ref().filter(|_| bytes.len() >= DIRECT) else {
            return Ok(Some(run));
        };
        let among_others = self.direct_writes.read().unwrap_or_else(PoisonError::into_inner);
        let written = write_at(direct.as_fd(), bytes, self.layout.page(at, pages.first));
        drop(among_others);
        match written {
            // EINVAL: the buffer does not have the alignment that the device requires. A write
            // through the page cache accepts any alignment.
            Err(ImageFault::KernelAt { source: Errno::INVAL, .. }) => return Ok(Some(run)),
            written => written.map_err(|fault| fault.of(self.path()))?,
        }
        self.set_present(at, pages);
        Ok(None)
    }

    /// Writes runs through the page cache. Their checksums are collected already.
    fn put_small(&self, runs: &[RunOfBytes<'_>]) -> Result<(), ImageError> {
        if runs.is_empty() {
            return Ok(());
        }
        let _alone = self.without_direct_writes();
        for &(at, pages, bytes) in runs {
            write_at(self.file.as_fd(), bytes, self.layout.page(at, pages.first))
                .map_err(|fault| fault.of(self.path()))?;
            self.set_present(at, pages);
        }
        Ok(())
    }

    /// While the guard is held, no direct write is under way. `None` if there are none at all.
    fn without_direct_writes(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        let lock = || self.direct_writes.write().unwrap_or_else(PoisonError::into_inner);
        self.direct.is_some().then(lock)
    }

    fn set_present(&self, at: usize, pages: PageRange) {
        let fresh = self.present[at].set(pages);
        debug_assert_eq!(fresh, pages.count, "a page is put once");
    }

    /// Computes the checksums of pages, and writes those that were collected if they are many.
    fn add_sums(&self, (at, run, bytes): RunOfBytes<'_>) -> Result<(), ImageError> {
        let mut sums = [0u32; EXTENT_PAGES as usize];
        let parts = (run.first..run.end())
            .step_by(sums.len())
            .zip(bytes.chunks(sums.len() * PAGE_SIZE as usize));
        for (first, pages) in parts {
            let each = pages.chunks(PAGE_SIZE as usize).map(checksum);
            let count = sums.iter_mut().zip(each).map(|(sum, value)| *sum = value).count();
            let sums = zerocopy::IntoBytes::as_bytes(&sums[..count]);
            if let Some(full) = self.sums.add(self.layout.page_sum(at, first), sums) {
                let _alone = self.without_direct_writes();
                full.write(self.file.as_fd()).map_err(|fault| fault.of(self.path()))?;
            }
        }
        Ok(())
    }

    /// Writes everything else, syncs the file, and gives it its name. All pages must have been put.
    /// `state` holds the pieces of the VMM's state, one after another; `None` if there are none.
    ///
    /// # Errors
    /// If the file cannot be written, or the state cannot be read. Then nothing is left of the
    /// image, and a file that had its name is unchanged.
    pub fn finish(
        &self, metadata: ImageMetadata<'_>, base: &Base, pieces: Vec<PieceSize>,
        state: Option<BorrowedFd<'_>>,
    ) -> Result<Totals, ImageError> {
        let totals = self.complete(metadata, base, pieces, state)?;
        self.persist()?;
        Ok(totals)
    }

    /// As [`ImageWriter::finish`], but does not give the file its name; see
    /// [`ImageWriter::persist`].
    ///
    /// # Errors
    /// As [`ImageWriter::finish`].
    pub fn complete(
        &self, metadata: ImageMetadata<'_>, base: &Base, pieces: Vec<PieceSize>,
        state: Option<BorrowedFd<'_>>,
    ) -> Result<Totals, ImageError> {
        self.write_rest(metadata, base, pieces, state).map_err(|fault| fault.of(self.path()))
    }

    /// Gives a complete image its name.
    ///
    /// # Errors
    /// If the file system refuses. Then a file that had the name is unchanged.
    pub fn persist(&self) -> Result<(), ImageError> {
        self.file.persist().map_err(|fault| fault.of(self.path()))
    }

    fn write_rest(
        &self, metadata: ImageMetadata<'_>, base: &Base, pieces: Vec<PieceSize>,
        state: Option<BorrowedFd<'_>>,
    ) -> Result<Totals, ImageFault> {
        self.sums.flush(self.file.as_fd())?;
        let (states, mut totals) = self.write_states(metadata)?;
        let (extent_sums, written) = self.write_extent_sums()?;
        totals.bytes += written;
        let contents = Contents { table: self.table.clone(), base_name: base.name.clone(), pieces };
        let (offset, bytes) = (self.layout.contents(), contents.encode());
        write_at(self.file.as_fd(), &bytes, offset)?;
        let length = bytes.len() as u64;
        let contents_section = Section { offset, length, checksum: checksum(&bytes) };
        let vmm_state = self.write_state(
            (offset + length).next_multiple_of(PAGE_SIZE),
            contents.state_size(),
            state,
        )?;
        let page_sums = Section {
            offset: self.layout.page_sums(),
            length: self.layout.page_sums_size(),
            checksum: 0,
        };
        let file_length = vmm_state.offset + vmm_state.length;
        let taken = self.taken.load(Ordering::Relaxed);
        let sections = [contents_section, states, extent_sums, page_sums, vmm_state];
        let (id, base, guest) = (self.id, base.id, metadata.guest);
        let header = Header { id, base, taken, guest, file_length, sections };
        write_at(self.file.as_fd(), &header.to_bytes(), 0)?;
        rustix::fs::ftruncate(&self.file, file_length)
            .map_err(kernel("set the length of the file"))?;
        totals.bytes +=
            totals.present * (PAGE_SIZE + 4) + length + vmm_state.length + HEADER_SIZE as u64;
        self.file.sync()?;
        Ok(totals)
    }

    fn write_states(&self, metadata: ImageMetadata<'_>) -> Result<(Section, Totals), ImageFault> {
        let mut out = Sequence::new(self.file.as_fd(), self.layout.states());
        let mut totals = Totals::default();
        for (at, block) in self.table.blocks().iter().enumerate() {
            let (present, discarded) = (&self.present[at], &metadata.discarded[at]);
            let words = block.pages().div_ceil(WORD_BITS);
            for part in (0..words).step_by(PART / 16) {
                let part = part..words.min(part + PART as u64 / 16);
                let word = |word: u64| {
                    let present = present.word(word);
                    let discarded = discarded.word(word) & !present;
                    let valid = present_mask(block.pages(), word);
                    let changed =
                        metadata.changed.map_or(u64::MAX, |changed| changed[at].word(word));
                    let unchanged = valid & !(present | discarded | changed);
                    StateWord { present, discarded, unchanged }
                };
                encode_states(
                    part.clone().map(word).inspect(|state| totals.add(state)),
                    &mut out.bytes,
                );
                out.flush()?;
            }
            totals.zero += block.pages();
        }
        totals.zero -= totals.present + totals.discarded + totals.unchanged;
        totals.bytes = out.written;
        Ok((out.section(), totals))
    }

    /// Writes the checksums of the extents. They are computed from the checksums of the pages,
    /// which are read back from the file: to keep those in memory would take a thousandth of the
    /// guest's memory.
    fn write_extent_sums(&self) -> Result<(Section, u64), ImageFault> {
        let mut out = Sequence::new(self.file.as_fd(), self.layout.extent_sums());
        let mut sums = [0u32; EXTENT_PAGES as usize];
        let without_content = extent_checksum(&sums);
        for (at, present) in self.present.iter().enumerate() {
            for extent in 0..self.layout.extents(at) {
                let first = extent * EXTENT_PAGES;
                let mut sum = without_content;
                if present.next_set(PageRange::new(first, EXTENT_PAGES)).is_some() {
                    read_at(
                        self.file.as_fd(),
                        zerocopy::IntoBytes::as_mut_bytes(&mut sums),
                        self.layout.page_sum(at, first),
                    )?;
                    sum = extent_checksum(&sums);
                }
                out.bytes.extend_from_slice(&sum.to_le_bytes());
                if out.bytes.len() >= PART {
                    out.flush()?;
                }
            }
        }
        out.flush()?;
        let written = out.written;
        Ok((out.section(), written))
    }

    fn write_state(
        &self, offset: u64, length: u64, state: Option<BorrowedFd<'_>>,
    ) -> Result<Section, ImageFault> {
        let mut out = Sequence::new(self.file.as_fd(), offset);
        let mut done = 0;
        while let Some(state) = state.filter(|_| done < length) {
            out.bytes.resize(PART.min((length - done) as usize), 0);
            read_at(state, &mut out.bytes, done)?;
            done += out.bytes.len() as u64;
            out.flush()?;
        }
        Ok(out.section())
    }
}

impl Totals {
    fn add(&mut self, state: &StateWord) {
        self.present += u64::from(state.present.count_ones());
        self.discarded += u64::from(state.discarded.count_ones());
        self.unchanged += u64::from(state.unchanged.count_ones());
    }
}

/// The bits of word `word` that belong to a page of a block of `pages` pages.
fn present_mask(pages: u64, word: u64) -> u64 {
    pageferry_protocol::shm::bitmap::word_mask(
        0,
        pages.saturating_sub(word * WORD_BITS).min(WORD_BITS),
    )
}

/// A section that is written from its start to its end, with its checksum.
struct Sequence<'a> {
    file: BorrowedFd<'a>,
    /// The section as far as it is written.
    section: Section,
    digest: crc_fast::Digest,
    /// The bytes that are written next.
    bytes: Vec<u8>,
    /// Bytes that were written, without holes.
    written: u64,
}

impl<'a> Sequence<'a> {
    fn new(file: BorrowedFd<'a>, offset: u64) -> Self {
        let digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
        Self {
            file,
            section: Section { offset, ..Section::default() },
            digest,
            bytes: Vec::new(),
            written: 0,
        }
    }

    /// Writes the bytes and clears them. Zeroes become holes: the section of a guest that is mostly
    /// empty is mostly zero.
    fn flush(&mut self) -> Result<(), ImageFault> {
        let start = self.section.offset + self.section.length;
        for (at, piece) in (start..).step_by(HOLE).zip(self.bytes.chunks(HOLE)) {
            if piece.iter().fold(0, |sum, byte| sum | byte) != 0 {
                write_at(self.file, piece, at)?;
                self.written += piece.len() as u64;
            }
        }
        self.digest.update(&self.bytes);
        self.section.length += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }

    fn section(self) -> Section {
        Section { checksum: self.digest.finalize() as u32, ..self.section }
    }
}

/// The current time in seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A new random id.
fn new_id() -> Result<ImageId, ImageFault> {
    let mut id = ImageId::default();
    let flags = rustix::fs::OFlags::CLOEXEC;
    let random = rustix::fs::open("/dev/urandom", flags, rustix::fs::Mode::empty());
    random
        .and_then(|random| rustix::io::read(random, &mut id))
        .map_err(kernel("get random bytes"))?;
    // An id of zeroes means that there is no base.
    id[0] |= 1;
    Ok(id)
}
