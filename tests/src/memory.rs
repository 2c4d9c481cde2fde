// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory of a mock VMM: several blocks on memfds, files or huge pages, at any file offset.
//!
//! The guest and the devices write through the mapping. Code that prepares or checks content uses
//! `pread` and `pwrite` on the file instead. A read through the mapping would allocate the holes
//! that it finds (`never-populate`), and so change what the test checks.

use crate::Error;
use crate::files;
use crate::random::page_content;
use pageferry_agent::pagemap::{Pagemap, Pages};
use pageferry_client::{AttachLog, BlockAdded, BlockSpec, Client, LogBitmap};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange, pages_in};
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, VolatileMemory,
};

/// Size in bytes of the buffer with which memory is read, written or compared.
const BUFFER: u64 = 1 << 20;

/// The backing of a block.
#[derive(Debug, Clone, Default)]
pub enum Backing {
    /// A memfd of `fd_offset + length` bytes for this block, sealed against shrinking.
    #[default]
    Memfd,
    /// A memfd on hugetlbfs for this block, with pages of
    /// [`HUGE_PAGE`](crate::huge_pages::HUGE_PAGE) bytes.
    HugePages,
    /// This file. It is not truncated, extended or sealed. Several blocks may share it.
    File(Arc<File>),
    /// A private mapping of this file, the base of an image.
    Clone(Arc<File>),
}

/// The layout of a block.
#[derive(Debug, Clone)]
pub struct BlockLayout {
    /// Its id, unique.
    pub id: u32,
    /// Its name, unique.
    pub name: String,
    /// Guest physical address in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// Offset in its file, in bytes.
    pub fd_offset: u64,
    /// Unit of discards in bytes.
    pub granularity: u64,
    /// Whether it starts as discarded.
    pub discarded: bool,
    /// Its backing.
    pub backing: Backing,
}

impl BlockLayout {
    /// A block "ram", id 0, of `length` bytes on a memfd, from guest address 0.
    pub fn ram(length: u64) -> Self {
        Self {
            id: 0,
            name: "ram".into(),
            gpa: 0,
            length,
            fd_offset: 0,
            granularity: PAGE_SIZE,
            discarded: false,
            backing: Backing::Memfd,
        }
    }
}

/// These layouts for a clone of `image`: private mappings of its base.
///
/// # Errors
/// If the agent cannot open the base, or a block is not in it.
pub fn of_clone(
    client: &Client, image: &Path, layouts: Vec<BlockLayout>,
) -> Result<Vec<BlockLayout>, Error> {
    let base = client.open_base(image)?;
    let file = base.file().try_clone_to_owned().map_err(Error::io("duplicate the base"))?;
    let file = Arc::new(File::from(file));
    let of_clone = |layout: BlockLayout| {
        let fd_offset = base.block(layout.id).ok_or(Error::NoBlock(layout.id))?.offset;
        Ok(BlockLayout { fd_offset, backing: Backing::Clone(Arc::clone(&file)), ..layout })
    };
    layouts.into_iter().map(of_clone).collect()
}

/// One block, with its file and its mapping in this process.
#[derive(Debug)]
pub struct TestBlock {
    layout: BlockLayout,
    file: Arc<File>,
    mapping: Arc<MmapRegion<LogBitmap>>,
    /// How a private mapping is looked at.
    private: Option<PrivateView>,
}

/// Reads private mappings of this process without making pages.
#[derive(Debug)]
struct PrivateView {
    memory: File,
    pagemap: Pagemap,
}

impl PrivateView {
    fn open() -> Result<Self, Error> {
        let open = |path| File::open(path).map_err(Error::io(format!("open {path}")));
        let pagemap = Pagemap::new(open("/proc/self/pagemap")?.into());
        let pagemap = pagemap.map_err(|error| Error::Memory(error.to_string()))?;
        Ok(Self { memory: open("/proc/self/mem")?, pagemap })
    }

    /// Ranges of addresses whose pages are no zero pages.
    fn extents(&self, address: u64, length: u64) -> Result<Vec<(u64, u64)>, Error> {
        let mut extents = Vec::new();
        let found = |start, end| extents.push((start, end));
        let walked = self.pagemap.runs(Pages::NotZero, address, length, found);
        walked.map(|()| extents).map_err(|error| Error::Memory(error.to_string()))
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let first = address / PAGE_SIZE * PAGE_SIZE;
        let last = (address + bytes.len() as u64).next_multiple_of(PAGE_SIZE);
        bytes.fill(0);
        for (start, end) in self.extents(first, last - first)? {
            let from = start.max(address);
            let to = end.min(address + bytes.len() as u64);
            let part = &mut bytes[(from - address) as usize..(to - address) as usize];
            let read = self.memory.read_exact_at(part, from);
            read.map_err(Error::io("read a private mapping"))?;
        }
        Ok(())
    }
}

/// All blocks of a mock VMM.
#[derive(Debug)]
pub struct TestMemory {
    blocks: Vec<TestBlock>,
    guest: GuestMemoryMmap<LogBitmap>,
}

impl TestMemory {
    /// Makes and maps the blocks.
    ///
    /// # Errors
    /// If a file is too short or the kernel refuses, or the blocks overlap in the guest.
    pub fn new(layouts: Vec<BlockLayout>) -> Result<Self, Error> {
        let blocks = layouts.into_iter().map(TestBlock::new).collect::<Result<Vec<_>, _>>()?;
        let mut regions = blocks.iter().map(TestBlock::region).collect::<Result<Vec<_>, _>>()?;
        regions.sort_by_key(|(gpa, _)| *gpa);
        let guest = GuestMemoryMmap::from_arc_regions(
            regions.into_iter().map(|(_, region)| region).collect(),
        )
        .map_err(|error| Error::Memory(error.to_string()))?;
        Ok(Self { blocks, guest })
    }

    /// One block of `length` bytes on a memfd.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn ram(length: u64) -> Result<Self, Error> {
        Self::new(vec![BlockLayout::ram(length)])
    }

    /// The blocks, in the order of the layouts.
    pub fn blocks(&self) -> &[TestBlock] {
        &self.blocks
    }

    /// The block with this id.
    ///
    /// # Errors
    /// If there is none.
    pub fn block(&self, id: u32) -> Result<&TestBlock, Error> {
        self.blocks.iter().find(|block| block.layout.id == id).ok_or(Error::NoBlock(id))
    }

    /// The guest's address space, for emulated devices.
    pub fn guest(&self) -> &GuestMemoryMmap<LogBitmap> {
        &self.guest
    }

    /// Adds all blocks to an agent and attaches their bitmaps to the dirty log.
    ///
    /// # Errors
    /// If the agent refuses a block, or the memory belongs to another client already.
    pub fn add_to(&self, client: &Client) -> Result<Vec<BlockAdded>, Error> {
        self.blocks.iter().map(|block| block.add_to(client)).collect()
    }

    /// Bytes allocated in all files under the blocks, each file counted once.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn allocated(&self) -> Result<u64, Error> {
        let (mut files, mut private) = (BTreeMap::new(), 0);
        for block in &self.blocks {
            if block.private.is_some() {
                private += block.allocated()?;
                continue;
            }
            let stat = rustix::fs::fstat(&block.file)
                .map_err(Error::kernel("look at the memory's file"))?;
            files.insert((stat.st_dev, stat.st_ino), stat.st_blocks as u64 * 512);
        }
        Ok(files.values().sum::<u64>() + private)
    }
}

impl TestBlock {
    fn new(layout: BlockLayout) -> Result<Self, Error> {
        let needed = layout.fd_offset.checked_add(layout.length).ok_or_else(|| {
            Error::Argument(format!("fd offset {:#x} overflows", layout.fd_offset))
        })?;
        let file = match &layout.backing {
            Backing::Memfd => sealed(&layout.name, needed, MemfdFlags::empty())?,
            Backing::HugePages => {
                sealed(&layout.name, needed, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?
            }
            Backing::File(file) | Backing::Clone(file) => file.clone(),
        };
        // vm-memory does not check this, and an access past the end of the file is SIGBUS.
        let size = rustix::fs::fstat(&file)
            .map_err(Error::kernel("look at the memory's file"))?
            .st_size as u64;
        if size < needed {
            return Err(Error::Argument(format!(
                "the memory's file has {size:#x} bytes, the block needs {needed:#x}"
            )));
        }
        let length =
            usize::try_from(layout.length).map_err(|error| Error::Memory(error.to_string()))?;
        let duplicate = file.try_clone().map_err(Error::io("duplicate the memory's file"))?;
        let sharing = match &layout.backing {
            Backing::Clone(_) => libc::MAP_PRIVATE,
            _ => libc::MAP_SHARED,
        };
        let mapping = MmapRegion::build(
            Some(FileOffset::new(duplicate, layout.fd_offset)),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_NORESERVE | sharing,
        )
        .map_err(|error| Error::Memory(error.to_string()))?;
        let mapping = Arc::new(mapping);
        let private = match &layout.backing {
            Backing::Clone(_) => Some(PrivateView::open()?),
            _ => None,
        };
        Ok(Self { layout, file, mapping, private })
    }

    fn region(&self) -> Result<(u64, Arc<GuestRegionMmap<LogBitmap>>), Error> {
        let gpa = self.layout.gpa;
        let region = GuestRegionMmap::with_arc(self.mapping.clone(), GuestAddress(gpa))
            .ok_or_else(|| Error::Memory(format!("block at {gpa:#x} overflows")))?;
        Ok((gpa, Arc::new(region)))
    }

    /// Adds the block to an agent and attaches its bitmap to the dirty log.
    ///
    /// # Errors
    /// If the agent refuses, or the memory belongs to another client already.
    pub fn add_to(&self, client: &Client) -> Result<BlockAdded, Error> {
        let layout = &self.layout;
        if !self.mapping.bitmap().attach_log(client.log(), pages_in(layout.gpa)) {
            return Err(Error::Memory(format!("block {} belongs to another client", layout.id)));
        }
        let spec = BlockSpec {
            id: layout.id,
            name: &layout.name,
            gpa: layout.gpa,
            length: layout.length,
            memory: self.file.as_fd(),
            fd_offset: layout.fd_offset,
            vmm_address: self.address(),
            granularity: layout.granularity,
            discarded: layout.discarded,
        };
        Ok(match &layout.backing {
            Backing::Clone(_) => client.add_clone_block(spec)?,
            _ => client.add_block(spec)?,
        })
    }

    /// Its layout.
    pub fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.layout.id
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        pages_in(self.layout.length)
    }

    /// All of it.
    pub fn all(&self) -> PageRange {
        PageRange::new(0, self.pages())
    }

    /// The file under it.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Where it is mapped in this process.
    pub fn address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// Its mapping in this process.
    pub fn mapping(&self) -> &Arc<MmapRegion<LogBitmap>> {
        &self.mapping
    }

    /// Bytes allocated in its file. In a private mapping, bytes of pages that are no zero pages.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn allocated(&self) -> Result<u64, Error> {
        if self.private.is_some() {
            return Ok(self.extents()?.iter().map(PageRange::bytes).sum());
        }
        let stat =
            rustix::fs::fstat(&self.file).map_err(Error::kernel("look at the memory's file"))?;
        Ok(stat.st_blocks as u64 * 512)
    }

    /// The allocated pages as runs in order, as the file system reports them. On huge pages
    /// everything counts as allocated.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn extents(&self) -> Result<Vec<PageRange>, Error> {
        if matches!(self.layout.backing, Backing::HugePages) {
            return Ok(vec![self.all()]);
        }
        if let Some(private) = &self.private {
            let page = |address| pages_in(address - self.address());
            let extents = private.extents(self.address(), self.layout.length)?;
            let extents = extents.into_iter();
            return Ok(extents
                .map(|(start, end)| PageRange::new(page(start), page(end) - page(start)))
                .collect());
        }
        let (start, end) = (self.layout.fd_offset, self.layout.fd_offset + self.layout.length);
        let mut extents = Vec::new();
        let mut at = start;
        while at < end {
            let data = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data.min(end),
                Err(Errno::NXIO) => break,
                Err(source) => {
                    return Err(Error::Kernel { what: "look for allocated pages", source });
                }
            };
            let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(data))
                .map_err(Error::kernel("look for holes"))?;
            let hole = hole.min(end).max(data);
            if hole > data {
                let first = pages_in(data - start);
                extents.push(PageRange::new(first, (hole - start).div_ceil(PAGE_SIZE) - first));
            }
            at = hole.max(at + 1);
        }
        Ok(extents)
    }

    /// True if none of `pages` is allocated.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn is_hole(&self, pages: PageRange) -> Result<bool, Error> {
        Ok(!self.extents()?.iter().any(|extent| extent.overlaps(&pages)))
    }

    /// Reads `bytes` from `offset` of the block, without allocating holes.
    ///
    /// # Errors
    /// If the file ends before, or the kernel refuses.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        if let Some(private) = &self.private {
            return private.read(self.address() + offset, bytes);
        }
        let mut done = 0;
        while done < bytes.len() {
            let at = self.layout.fd_offset + offset + done as u64;
            match rustix::io::pread(&self.file, &mut bytes[done..], at) {
                Ok(0) => return Err(Error::Memory(format!("the memory's file ends at {at:#x}"))),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(source) => return Err(Error::Kernel { what: "read guest memory", source }),
            }
        }
        Ok(())
    }

    /// The content of a page.
    ///
    /// # Errors
    /// As [`TestBlock::read`].
    pub fn read_page(&self, page: u64) -> Result<[u8; PAGE_SIZE as usize], Error> {
        let mut content = [0; PAGE_SIZE as usize];
        self.read(page * PAGE_SIZE, &mut content)?;
        Ok(content)
    }

    /// The 64-bit word at `offset` of the block.
    ///
    /// # Errors
    /// As [`TestBlock::read`].
    pub fn read_word(&self, offset: u64) -> Result<u64, Error> {
        let mut word = [0; 8];
        self.read(offset, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// Writes `bytes` at `offset` of the block. No tracker sees this: it is for content that exists
    /// before the test starts.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        if matches!(self.layout.backing, Backing::HugePages | Backing::Clone(_)) {
            // Files on hugetlbfs cannot be written with `pwrite`, and a base is not a clone's own.
            let at = usize::try_from(offset).map_err(|error| Error::Memory(error.to_string()))?;
            let slice = self
                .mapping
                .get_slice(at, bytes.len())
                .map_err(|error| Error::Memory(error.to_string()))?;
            slice.copy_from(bytes);
            return Ok(());
        }
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pwrite(
                &self.file,
                &bytes[done..],
                self.layout.fd_offset + offset + done as u64,
            ) {
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(source) => return Err(Error::Kernel { what: "write guest memory", source }),
            }
        }
        Ok(())
    }

    /// Fills `pages` with [`page_content`] of `seed`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn fill(&self, pages: PageRange, seed: u64) -> Result<(), Error> {
        let mut buffer = Vec::new();
        for page in pages.first..pages.end() {
            buffer.extend_from_slice(&page_content(seed, page));
            if buffer.len() as u64 == BUFFER || page + 1 == pages.end() {
                self.write((page + 1) * PAGE_SIZE - buffer.len() as u64, &buffer)?;
                buffer.clear();
            }
        }
        Ok(())
    }

    /// Punches a hole over `pages`, as the owner of the file may do.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn punch(&self, pages: PageRange) -> Result<(), Error> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(
            &self.file,
            flags,
            self.layout.fd_offset + pages.offset(),
            pages.bytes(),
        )
        .map_err(Error::kernel("punch a hole into guest memory"))
    }

    /// Stores a word like a vCPU: through the mapping, without a mark in the dirty log.
    ///
    /// # Errors
    /// If `offset` is outside the block, or not a multiple of 8.
    pub fn store(&self, offset: u64, value: u64) -> Result<(), Error> {
        let at = usize::try_from(offset).map_err(|error| Error::Memory(error.to_string()))?;
        let word = self
            .mapping
            .get_atomic_ref::<AtomicU64>(at)
            .map_err(|error| Error::Memory(error.to_string()))?;
        word.store(value, Ordering::Relaxed);
        Ok(())
    }

    /// Loads a word like a vCPU: through the mapping. This allocates a hole, and waits for a
    /// missing page.
    ///
    /// # Errors
    /// If `offset` is outside the block, or not a multiple of 8.
    pub fn load(&self, offset: u64) -> Result<u64, Error> {
        let at = usize::try_from(offset).map_err(|error| Error::Memory(error.to_string()))?;
        let word = self
            .mapping
            .get_atomic_ref::<AtomicU64>(at)
            .map_err(|error| Error::Memory(error.to_string()))?;
        Ok(word.load(Ordering::Relaxed))
    }

    /// Marks `pages` in the dirty log. A writer without another tracker must do that after the
    /// write.
    pub fn mark(&self, pages: PageRange) {
        self.mapping.bitmap().mark_dirty(pages.offset() as usize, pages.bytes() as usize);
    }
}

fn sealed(name: &str, size: u64, kind: MemfdFlags) -> Result<Arc<File>, Error> {
    let fd = files::unsealed_memfd(name, size, kind)?;
    files::seal(&fd)?;
    Ok(Arc::new(fd.into()))
}
