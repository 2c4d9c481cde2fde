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
//! An image with a key is sealed ([`super::seal`]). The thread that puts pages seals them in its
//! own buffer, where it would compute their checksums otherwise.
//!
//! If anything fails, nothing is left of the image, and a file that had its name is unchanged.

mod pages;

pub use pages::RunOfPages;

use super::bytes::{random, read_at, write_at};
use super::error::{ImageError, ImageFault, kernel};
use super::new_file::{FileKind, NewFile};
use super::seal::{ImageKey, Sealer};
use super::sections::{PART, SectionWriter};
use super::sums::PageSums;
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::image::header::{HEADER_SIZE, MAC_COVERS};
use pageferry_protocol::image::sealing::MAC_SIZE;
use pageferry_protocol::image::{
    Contents, EXTENT_PAGES, Header, ImageId, Layout, Sealing, Section, SectionKind, StateWord,
    encode_states, extent_checksum,
};
use pageferry_protocol::memory::{BlockTable, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::WORD_BITS;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};
use std::time::{SystemTime, UNIX_EPOCH};
use zerocopy::IntoBytes;

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
    /// Seals pages and sections; `None` for an image in plain text.
    sealer: Option<Sealer>,
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
        Self::create_with(path, table, replace, cached, None)
    }

    /// The same. With a key the image is sealed.
    ///
    /// # Errors
    /// As [`ImageWriter::create`], or if the kernel gives no random bytes.
    pub fn create_with(
        path: &Path, table: &BlockTable, replace: bool, cached: bool, key: Option<&ImageKey>,
    ) -> Result<Self, ImageError> {
        Self::new(path, table, replace, cached, key).map_err(|fault| fault.of(path))
    }

    fn new(
        path: &Path, table: &BlockTable, replace: bool, cached: bool, key: Option<&ImageKey>,
    ) -> Result<Self, ImageFault> {
        let layout = Layout::new(table, key.is_some())?;
        let sealer = key.map(Sealer::new).transpose()?;
        let file = NewFile::create(path, FileKind::IMAGE, replace)?;
        let direct = if cached { None } else { file.direct() };
        let present = table.blocks().iter().map(|block| MappedBitmap::private(block.pages()));
        let present = present.collect::<Result<_, _>>()?;
        // The file gets its length now, because writes that make a file longer exclude each other.
        rustix::fs::ftruncate(&file, layout.contents())
            .map_err(kernel("set the length of the file"))?;
        let sums = PageSums::new(layout.page_sum_size());
        let (id, taken) = (new_id()?, AtomicU64::new(now()));
        let (direct_writes, table) = (RwLock::default(), table.clone());
        Ok(Self { file, direct, direct_writes, layout, table, present, sums, sealer, id, taken })
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

    /// While the guard is held, no direct write is under way. `None` if there are none at all.
    fn without_direct_writes(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        let lock = || self.direct_writes.write().unwrap_or_else(PoisonError::into_inner);
        self.direct.is_some().then(lock)
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

    /// Puts a complete image into its store, but for its name; see [`NewFile::upload`].
    ///
    /// # Errors
    /// If it is cancelled, or the store refuses.
    pub fn upload(&self, progress: &dyn Fn(u64, u64)) -> Result<(), ImageError> {
        self.file.upload(progress).map_err(|fault| fault.of(self.path()))
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
        let mut out = self.section(SectionKind::Contents, self.layout.contents());
        out.bytes = contents.encode();
        let (contents_section, written) = out.finish()?;
        totals.bytes += written;
        let (vmm_state, written) = self.write_state(
            (contents_section.offset + contents_section.length).next_multiple_of(PAGE_SIZE),
            contents.state_size(),
            state,
        )?;
        totals.bytes += written;
        let page_sums = Section {
            offset: self.layout.page_sums(),
            length: self.layout.page_sums_size(),
            checksum: 0,
        };
        let file_length = vmm_state.offset + vmm_state.length;
        let taken = self.taken.load(Ordering::Relaxed);
        let sections = [contents_section, states, extent_sums, page_sums, vmm_state];
        let (id, base, guest) = (self.id, base.id, metadata.guest);
        let header = Header { id, base, taken, guest, file_length, sections, sealing: None };
        write_at(self.file.as_fd(), &self.sign(header), 0)?;
        rustix::fs::ftruncate(&self.file, file_length)
            .map_err(kernel("set the length of the file"))?;
        totals.bytes +=
            totals.present * (PAGE_SIZE + self.layout.page_sum_size()) + HEADER_SIZE as u64;
        self.file.sync()?;
        Ok(totals)
    }

    /// A section of this image.
    fn section(&self, kind: SectionKind, offset: u64) -> SectionWriter<'_> {
        SectionWriter::new(self.file.as_fd(), self.sealer.as_ref(), kind, offset)
    }

    /// The bytes of the header, with the salt and the MAC of a sealed image.
    fn sign(&self, header: Header) -> Vec<u8> {
        let Some(sealer) = &self.sealer else { return header.to_bytes() };
        let sealed = |mac| {
            let sealing = Some(Sealing { salt: sealer.salt(), mac });
            Header { sealing, ..header.clone() }.to_bytes()
        };
        let mac = sealer.sign(&sealed([0; MAC_SIZE])[..MAC_COVERS]);
        sealed(mac)
    }

    fn write_states(&self, metadata: ImageMetadata<'_>) -> Result<(Section, Totals), ImageFault> {
        let mut out = self.section(SectionKind::States, self.layout.states());
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
                out.write_pieces()?;
            }
            totals.zero += block.pages();
        }
        totals.zero -= totals.present + totals.discarded + totals.unchanged;
        let (section, written) = out.finish()?;
        totals.bytes = written;
        Ok((section, totals))
    }

    /// Writes the checksums of the extents. They are computed from the checksums of the pages,
    /// which are read back from the file: to keep those in memory would take a thousandth of the
    /// guest's memory. A sealed image has none.
    fn write_extent_sums(&self) -> Result<(Section, u64), ImageFault> {
        let offset = self.layout.extent_sums();
        if self.sealer.is_some() {
            return Ok((Section { offset, ..Section::default() }, 0));
        }
        let mut out = self.section(SectionKind::ExtentSums, offset);
        let mut sums = [0u32; EXTENT_PAGES as usize];
        let without_content = extent_checksum(&sums);
        for (at, present) in self.present.iter().enumerate() {
            for extent in 0..self.layout.extents(at) {
                let first = extent * EXTENT_PAGES;
                let mut sum = without_content;
                if present.next_set(PageRange::new(first, EXTENT_PAGES)).is_some() {
                    let place = self.layout.page_sum(at, first);
                    read_at(self.file.as_fd(), sums.as_mut_bytes(), place)?;
                    sum = extent_checksum(&sums);
                }
                out.bytes.extend_from_slice(&sum.to_le_bytes());
                out.write_pieces()?;
            }
        }
        out.finish()
    }

    fn write_state(
        &self, offset: u64, length: u64, state: Option<BorrowedFd<'_>>,
    ) -> Result<(Section, u64), ImageFault> {
        let mut out = self.section(SectionKind::VmmState, offset);
        let mut done = 0;
        while let Some(state) = state.filter(|_| done < length) {
            out.bytes.resize(PART.min((length - done) as usize), 0);
            read_at(state, &mut out.bytes, done)?;
            done += out.bytes.len() as u64;
            out.write_pieces()?;
        }
        out.finish()
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

/// The current time in seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A new random id.
fn new_id() -> Result<ImageId, ImageFault> {
    let mut id: ImageId = random()?;
    // An id of zeroes means that there is no base.
    id[0] |= 1;
    Ok(id)
}
