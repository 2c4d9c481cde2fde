//! A real guest: one vCPU under KVM that increments a 32-bit counter at the start of every page of its memory, in ascending
//! order, sweep after sweep. So at any moment the counters read `c, c, ..., c, c-1, ..., c-1`: a page that migrated in an old
//! version, or not at all, is a second step, and [`check_consistent`] finds it.
//!
//! The guest is 64-bit code at privilege level 3, in flat segments over an identity map of 2 MiB pages. It needs no operating
//! system, since nothing ever leaves the loop. Level 3 is what makes it fast everywhere: it runs natively also on a KVM that
//! emulates everything else, real mode above all.
//!
//! Memory: the first [`FIRMWARE_PAGES`] pages of the first region hold the code, the table of the ranges to sweep, and the page
//! tables; the guest reads them and never writes there, so they migrate like any other page.
#![allow(unsafe_code)]

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use pageferry_client::tracking::kvm::{KvmDirtyLog, KvmLogError, KvmSlot};
use pageferry_protocol::memory::{PAGE_SIZE, pages_in};
use std::any::Any;
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// Pages at the start of the first region that the guest runs from and does not sweep.
pub const FIRMWARE_PAGES: u64 = 16;

/// Where the table of ranges is within the firmware: half a page, 16 bytes a range, the last of them empty.
const TABLE_OFFSET: u64 = 0x800;

/// Most ranges that a [`Sweep`] can have.
pub const MAX_RANGES: usize = ((PAGE_SIZE - TABLE_OFFSET) / 16 - 1) as usize;

/// `r8` = spins for each page, `r9` = address of the table.
#[rustfmt::skip]
const CODE: [u8; 45] = [
    // start:
    0x4c, 0x89, 0xce,                         //  0: mov rsi, r9
    // next:
    0x48, 0x8b, 0x3e,                         //  3: mov rdi, [rsi]        first page of the range
    0x48, 0x8b, 0x4e, 0x08,                   //  6: mov rcx, [rsi + 8]    number of pages
    0xe3, 0xf4,                               // 10: jrcxz start
    // page:
    0xff, 0x07,                               // 12: inc dword [rdi]
    0x4c, 0x89, 0xc0,                         // 14: mov rax, r8
    0x48, 0x85, 0xc0,                         // 17: test rax, rax
    0x74, 0x05,                               // 20: jz done
    // spin:
    0x48, 0xff, 0xc8,                         // 22: dec rax
    0x75, 0xfb,                               // 25: jnz spin
    // done:
    0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // 27: add rdi, 4096
    0x48, 0xff, 0xc9,                         // 34: dec rcx
    0x75, 0xe5,                               // 37: jnz page
    0x48, 0x83, 0xc6, 0x10,                   // 39: add rsi, 16
    0xeb, 0xd6,                               // 43: jmp next
];

/// Why the guest cannot be made, or does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// KVM refused.
    #[error("KVM: cannot {what}")]
    Kvm {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The memory does not hold what the guest needs.
    #[error("guest memory: {0}")]
    Memory(String),
    /// A range to sweep is not within the memory, or touches the firmware.
    #[error("cannot sweep {pages:#x} pages from {gpa:#x}: {why}")]
    Range {
        /// First guest physical address.
        gpa: u64,
        /// Number of pages.
        pages: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The saved state is not one of this guest.
    #[error("saved vCPU state has {length} bytes, {} are needed", SAVED_LENGTH)]
    State {
        /// Its length in bytes.
        length: usize,
    },
    /// The vCPU runs, and what was asked for needs it to stand.
    #[error("the vCPU is running")]
    Running,
    /// The vCPU left the loop that it never leaves.
    #[error("unexpected vCPU exit: {0}")]
    Exit(String),
    /// The thread or its signal could not be set up.
    #[error("vCPU thread: {0}")]
    Thread(String),
    /// The guest did not get as far as it should in time.
    #[error("the guest made {made} sweeps in {within:?}, {wanted} were expected")]
    Slow {
        /// Sweeps that were made.
        made: u32,
        /// Sweeps that were waited for.
        wanted: u32,
        /// How long.
        within: Duration,
    },
    /// The counters are not those of one sweep.
    #[error(
        "page {page} of the sweep has counter {counter}, after {before}: only {before} or, once in a sweep, one less can follow"
    )]
    Torn {
        /// Position in the order of the sweep.
        page: usize,
        /// Its counter.
        counter: u32,
        /// The counter of the page before.
        before: u32,
    },
}

fn kvm_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> GuestError {
    move |source| GuestError::Kvm { what, source }
}

/// What the guest sweeps, and how fast.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sweep {
    /// Guest physical address and number of pages of each range, in the order in which they are swept.
    pub ranges: Vec<(u64, u64)>,
    /// How often the guest turns in a loop after each page: zero is as fast as it goes.
    pub spins: u32,
}

impl Sweep {
    /// All of `memory` beyond the firmware, as fast as it goes.
    pub fn all<B: Bitmap>(memory: &GuestMemoryMmap<B>) -> Self {
        let mut skip = FIRMWARE_PAGES;
        let range = |region: &vm_memory::GuestRegionMmap<B>| {
            let skip = std::mem::take(&mut skip);
            (region.start_addr().0 + skip * PAGE_SIZE, pages_in(region.len()).saturating_sub(skip))
        };
        Self { ranges: memory.iter().map(range).filter(|(_, pages)| *pages > 0).collect(), spins: 0 }
    }

    /// The same with this many spins after each page.
    #[must_use]
    pub fn spins(mut self, spins: u32) -> Self {
        self.spins = spins;
        self
    }

    /// Number of pages in one sweep.
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|(_, pages)| pages).sum()
    }

    /// Guest physical addresses of the pages, in the order of the sweep.
    pub fn addresses(&self) -> impl Iterator<Item = u64> + '_ {
        self.ranges.iter().flat_map(|(gpa, pages)| (0..*pages).map(move |page| gpa + page * PAGE_SIZE))
    }

    fn check<B: Bitmap>(&self, memory: &GuestMemoryMmap<B>) -> Result<(), GuestError> {
        let Some(base) = memory.iter().next().map(|region| region.start_addr().0) else {
            return Err(GuestError::Memory("there is none".into()));
        };
        if self.ranges.is_empty() || self.ranges.len() > MAX_RANGES {
            return Err(GuestError::Memory(format!("{} ranges to sweep, 1 to {MAX_RANGES} can be", self.ranges.len())));
        }
        for &(gpa, pages) in &self.ranges {
            let bad = |why| Err(GuestError::Range { gpa, pages, why });
            let length = pages.saturating_mul(PAGE_SIZE);
            let Some(region) = memory.find_region(GuestAddress(gpa)) else { return bad("no memory there") };
            if !gpa.is_multiple_of(PAGE_SIZE) || pages == 0 {
                return bad("not whole pages");
            }
            if length > region.len() - (gpa - region.start_addr().0) {
                return bad("ends outside of its region");
            }
            if gpa < base + FIRMWARE_PAGES * PAGE_SIZE && base < gpa + length {
                return bad("that is where the guest's code is");
            }
        }
        Ok(())
    }
}

/// The vCPU and the byte by which KVM is told to leave it. They are mapped together, and go together.
struct Vcpu {
    fd: Mutex<VcpuFd>,
    immediate_exit: *mut u8,
}

// SAFETY: the pointer leads into the mapping of `fd`, which lives as long, and is only used for atomic accesses.
unsafe impl Send for Vcpu {}
// SAFETY: as above.
unsafe impl Sync for Vcpu {}

impl Vcpu {
    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: valid as long as `self`, aligned as any byte is, and meant to be written while the kernel reads it.
        unsafe { AtomicU8::from_ptr(self.immediate_exit) }
    }

    /// Runs until it is asked to leave.
    fn run(&self) -> Result<(), GuestError> {
        let mut fd = self.fd.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match fd.run() {
                Ok(exit) => return Err(GuestError::Exit(format!("{exit:?}"))),
                Err(error) => match std::io::Error::from(error).kind() {
                    std::io::ErrorKind::Interrupted if self.immediate_exit().load(Ordering::SeqCst) != 0 => {
                        return Ok(());
                    }
                    // A signal of somebody else's.
                    std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock => {}
                    _ => return Err(kvm_error("run the vCPU")(error)),
                },
            }
        }
    }
}

/// A virtual machine of one vCPU. It stands when it is made, and is paused when it is dropped.
pub struct KvmGuest {
    thread: Option<JoinHandle<Result<(), GuestError>>>,
    vcpu: Arc<Vcpu>,
    vm: Arc<VmFd>,
    slots: Vec<KvmSlot>,
    sweep: Sweep,
    memory: Box<dyn Mapped>,
}

/// Guest memory of any bitmap.
trait Mapped: Any + Send + Sync {
    fn write(&self, bytes: &[u8], gpa: u64) -> Result<(), GuestError>;
    fn counter(&self, gpa: u64) -> Result<u32, GuestError>;
}

impl<B: Bitmap + Send + Sync + 'static> Mapped for GuestMemoryMmap<B> {
    fn write(&self, bytes: &[u8], gpa: u64) -> Result<(), GuestError> {
        self.write_slice(bytes, GuestAddress(gpa)).map_err(|error| GuestError::Memory(error.to_string()))
    }

    fn counter(&self, gpa: u64) -> Result<u32, GuestError> {
        self.load(GuestAddress(gpa), Ordering::Acquire).map_err(|error| GuestError::Memory(error.to_string()))
    }
}

impl KvmGuest {
    /// Makes a VM whose memory is `memory`, by the mappings that it has: one slot for each region, numbered from zero. Call
    /// [`Self::boot`] or [`Self::load`] next. Writes nothing to the memory.
    ///
    /// # Errors
    /// If KVM refuses, or `sweep` is not within the memory.
    pub fn new<B: Bitmap + Send + Sync + 'static>(
        memory: GuestMemoryMmap<B>, sweep: Sweep,
    ) -> Result<Self, GuestError> {
        sweep.check(&memory)?;
        register_kick()?;
        let kvm = Kvm::new().map_err(kvm_error("open /dev/kvm"))?;
        let vm = kvm.create_vm().map_err(kvm_error("make a VM"))?;
        let slots = slots_of(&memory)?;
        for slot in &slots {
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: slot.flags,
                guest_phys_addr: slot.gpa,
                memory_size: slot.length,
                userspace_addr: slot.userspace_addr,
            };
            // SAFETY: the mapping is that of `memory`, which the guest keeps; nobody else makes slots of this VM.
            unsafe { vm.set_user_memory_region(region) }.map_err(kvm_error("give the VM its memory"))?;
        }
        let mut fd = vm.create_vcpu(0).map_err(kvm_error("make a vCPU"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm_error("list CPU features"))?;
        fd.set_cpuid2(&cpuid).map_err(kvm_error("set CPU features"))?;
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
        let vcpu = Arc::new(Vcpu { fd: Mutex::new(fd), immediate_exit });
        Ok(Self { thread: None, vcpu, vm: Arc::new(vm), slots, sweep, memory: Box::new(memory) })
    }

    /// Writes the firmware into the guest's memory and puts the vCPU at its start.
    ///
    /// # Errors
    /// If it runs, KVM refuses, or the page tables need more room than the firmware has.
    pub fn boot(&mut self) -> Result<(), GuestError> {
        let base = self.slots.first().map_or(0, |slot| slot.gpa);
        let mut page = vec![0; PAGE_SIZE as usize];
        page[..CODE.len()].copy_from_slice(&CODE);
        for (entry, (gpa, pages)) in page[TABLE_OFFSET as usize..].chunks_exact_mut(16).zip(&self.sweep.ranges) {
            entry[..8].copy_from_slice(&gpa.to_le_bytes());
            entry[8..].copy_from_slice(&pages.to_le_bytes());
        }
        let tables = identity_map(base + PAGE_SIZE, self.slots.iter().map(|slot| (slot.gpa, slot.length)))?;
        let fd = self.standing()?;
        let mut sregs = fd.get_sregs().map_err(kvm_error("read registers"))?;
        enter_user_mode(&mut sregs, base + PAGE_SIZE);
        let regs = kvm_regs {
            rip: base,
            rflags: 2, // bit 1 is always set (Intel SDM volume 1, 3.4.3)
            r8: self.sweep.spins.into(),
            r9: base + TABLE_OFFSET,
            ..Default::default()
        };
        fd.set_sregs(&sregs).map_err(kvm_error("set control registers"))?;
        fd.set_regs(&regs).map_err(kvm_error("set registers"))?;
        drop(fd);
        self.memory.write(&page, base)?;
        for (gpa, table) in tables {
            let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            self.memory.write(&bytes, gpa)?;
        }
        Ok(())
    }

    /// The vCPU's state. There is nothing but its registers: the guest uses no FPU, no MSR, no interrupt.
    ///
    /// # Errors
    /// If it runs.
    pub fn save(&self) -> Result<Vec<u8>, GuestError> {
        let fd = self.standing()?;
        let regs = fd.get_regs().map_err(kvm_error("read registers"))?;
        let sregs = fd.get_sregs().map_err(kvm_error("read control registers"))?;
        Ok([bytes_of(&regs), bytes_of(&sregs)].concat())
    }

    /// Puts the vCPU where another one was saved; the memory is to be the other one's, too.
    ///
    /// # Errors
    /// If it runs, `saved` is not what [`Self::save`] gives, or KVM refuses it.
    pub fn load(&mut self, saved: &[u8]) -> Result<(), GuestError> {
        if saved.len() != SAVED_LENGTH {
            return Err(GuestError::State { length: saved.len() });
        }
        let (regs, sregs) = saved.split_at(size_of::<kvm_regs>());
        let fd = self.standing()?;
        fd.set_sregs(&from_bytes(sregs)).map_err(kvm_error("set control registers"))?;
        fd.set_regs(&from_bytes(regs)).map_err(kvm_error("set registers"))
    }

    /// Changes how long the guest spins after each page, from the next page on.
    ///
    /// # Errors
    /// If it runs, or KVM refuses.
    pub fn set_spins(&mut self, spins: u32) -> Result<(), GuestError> {
        let fd = self.standing()?;
        let regs = fd.get_regs().map_err(kvm_error("read registers"))?;
        fd.set_regs(&kvm_regs { r8: spins.into(), ..regs }).map_err(kvm_error("set registers"))
    }

    /// Starts the vCPU, or lets it go on. It runs on a thread of its own until it is paused.
    ///
    /// # Errors
    /// If it has come to an unexpected end before, or there can be no thread.
    pub fn resume(&mut self) -> Result<(), GuestError> {
        if self.is_running() {
            return Ok(());
        }
        self.pause()?;
        let vcpu = Arc::clone(&self.vcpu);
        let thread = std::thread::Builder::new().name("vcpu0".into()).spawn(move || vcpu.run());
        self.thread = Some(thread.map_err(|error| GuestError::Thread(error.to_string()))?);
        Ok(())
    }

    /// Stops the vCPU: when this returns it stands, and has written for the last time.
    ///
    /// # Errors
    /// If the vCPU has come to an unexpected end before. It stands then as well.
    pub fn pause(&mut self) -> Result<(), GuestError> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        // The byte catches a vCPU that is not in the kernel yet, the signal one that is: with both no moment is left over.
        self.vcpu.immediate_exit().store(1, Ordering::SeqCst);
        if let Err(error) = thread.kill(SIGRTMIN()) {
            log::debug!("the vCPU thread has ended already ({error})");
        }
        let ended = thread.join();
        self.vcpu.immediate_exit().store(0, Ordering::SeqCst);
        ended.unwrap_or_else(|_| Err(GuestError::Thread("panicked".into())))
    }

    /// True while the vCPU runs; false when it is paused or has come to an unexpected end, which [`Self::pause`] tells.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Number of sweeps that have reached the last page; wraps around.
    ///
    /// # Errors
    /// If the memory cannot be read.
    pub fn sweeps(&self) -> Result<u32, GuestError> {
        let last = self.sweep.ranges.last().map_or(0, |(gpa, pages)| gpa + (pages - 1) * PAGE_SIZE);
        self.memory.counter(last)
    }

    /// Waits until the guest has made `count` more sweeps.
    ///
    /// # Errors
    /// If it does not within `within`, or does not run.
    pub fn wait_for_sweeps(&mut self, count: u32, within: Duration) -> Result<(), GuestError> {
        let (before, started) = (self.sweeps()?, Instant::now());
        loop {
            let made = self.sweeps()?.wrapping_sub(before);
            if made >= count {
                return Ok(());
            }
            if !self.is_running() {
                self.pause()?;
            }
            if started.elapsed() >= within || self.thread.is_none() {
                return Err(GuestError::Slow { made, wanted: count, within });
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// The VM.
    pub fn vm(&self) -> Arc<VmFd> {
        Arc::clone(&self.vm)
    }

    /// The memory slots of the VM.
    pub fn slots(&self) -> &[KvmSlot] {
        &self.slots
    }

    /// What the guest sweeps.
    pub fn sweep(&self) -> &Sweep {
        &self.sweep
    }

    /// KVM's dirty log over all slots, not started.
    ///
    /// # Errors
    /// If KVM lacks manual protection.
    pub fn dirty_log(&self) -> Result<KvmDirtyLog, KvmLogError> {
        // SAFETY: these are the slots that `new` made, and nobody changes them. The log holds the VM but not the memory: with the
        // guest gone no vCPU is left to write to it.
        unsafe { KvmDirtyLog::new(&*self.vm, self.slots.clone()) }
    }

    fn standing(&self) -> Result<std::sync::MutexGuard<'_, VcpuFd>, GuestError> {
        if self.is_running() {
            return Err(GuestError::Running);
        }
        Ok(self.vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for KvmGuest {
    fn drop(&mut self) {
        if let Err(error) = self.pause() {
            log::warn!("guest dropped: {error}");
        }
    }
}

impl std::fmt::Debug for KvmGuest {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("KvmGuest").field("running", &self.is_running()).field("slots", &self.slots).finish()
    }
}

/// The counters of the pages of `sweep`, in its order, read from the files under `memory`: so that looking at memory that was
/// never written does not make it exist.
///
/// # Errors
/// If a page is not in `memory`, or a region has no file.
pub fn counters<B: Bitmap>(memory: &GuestMemoryMmap<B>, sweep: &Sweep) -> Result<Vec<u32>, GuestError> {
    let read = |gpa: u64| {
        let error = |why: &str| GuestError::Memory(format!("{gpa:#x}: {why}"));
        let region = memory.find_region(GuestAddress(gpa)).ok_or_else(|| error("no memory there"))?;
        let file = region.file_offset().ok_or_else(|| error("no file under the memory"))?;
        let mut bytes = [0; 4];
        file.file()
            .read_exact_at(&mut bytes, file.start() + (gpa - region.start_addr().0))
            .map_err(|source| error(&source.to_string()))?;
        Ok(u32::from_le_bytes(bytes))
    };
    sweep.addresses().map(read).collect()
}

/// How far a guest has come, by its counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Counter of the first page: sweeps begun; wraps around.
    pub sweeps: u32,
    /// Pages that have been written in the last of them.
    pub pages: usize,
}

/// Checks that counters, in the order of the sweep, are those of one moment: all equal, but for at most one step down by one.
///
/// # Errors
/// The first page that does not fit.
pub fn check_consistent(counters: impl IntoIterator<Item = u32>) -> Result<Progress, GuestError> {
    let mut counters = counters.into_iter().enumerate();
    let Some((_, sweeps)) = counters.next() else { return Ok(Progress { sweeps: 0, pages: 0 }) };
    let (mut before, mut pages) = (sweeps, 1);
    for (page, counter) in counters {
        let may_step = before == sweeps;
        match before.wrapping_sub(counter) {
            0 if may_step => pages = page + 1,
            0 => {}
            1 if may_step => before = counter,
            _ => return Err(GuestError::Torn { page, counter, before }),
        }
    }
    Ok(Progress { sweeps, pages })
}

fn slots_of<B: Bitmap>(memory: &GuestMemoryMmap<B>) -> Result<Vec<KvmSlot>, GuestError> {
    let slot = |(index, region): (usize, &vm_memory::GuestRegionMmap<B>)| {
        let address = region.get_host_address(vm_memory::MemoryRegionAddress(0));
        let address = address.map_err(|error| GuestError::Memory(error.to_string()))?;
        Ok(KvmSlot {
            slot: index as u32,
            gpa: region.start_addr().0,
            length: region.len(),
            userspace_addr: address.expose_provenance() as u64,
            flags: 0,
        })
    };
    memory.iter().enumerate().map(slot).collect()
}

// Bits of a page table entry (Intel SDM volume 3, 4.5): present, writable, user, accessed; and for a large page also dirty
// and large. Accessed and dirty are set from the start, so that walking the tables writes no memory.
const TABLE: u64 = 0x27;
const LARGE_PAGE: u64 = 0xe7;

/// Page tables from `root` that map every 2 MiB that `ranges` touch to themselves: the guest physical address of each table with
/// its entries.
fn identity_map(root: u64, ranges: impl Iterator<Item = (u64, u64)>) -> Result<BTreeMap<u64, [u64; 512]>, GuestError> {
    let limit = root + (FIRMWARE_PAGES - 1) * PAGE_SIZE;
    let mut tables = BTreeMap::from([(root, [0; 512])]);
    for (gpa, length) in ranges {
        for large in gpa >> 21..(gpa + length).div_ceil(1 << 21) {
            let mut table = root;
            for level in [18, 9] {
                let next = root + tables.len() as u64 * PAGE_SIZE;
                let entry = tables.get_mut(&table).map(|entries| &mut entries[(large >> level & 511) as usize]);
                let Some(entry) = entry else { return Err(GuestError::Memory("page tables are broken".into())) };
                if *entry == 0 {
                    if next >= limit {
                        return Err(GuestError::Memory(format!(
                            "it takes more than {FIRMWARE_PAGES} pages of page tables"
                        )));
                    }
                    *entry = next | TABLE;
                    table = next;
                    tables.insert(next, [0; 512]);
                } else {
                    table = *entry & !(PAGE_SIZE - 1);
                }
            }
            if let Some(entries) = tables.get_mut(&table) {
                entries[(large & 511) as usize] = large << 21 | LARGE_PAGE;
            }
        }
    }
    Ok(tables)
}

/// 64-bit mode at privilege level 3 with the page tables at `root`. No descriptor table is ever read, since no segment is
/// ever loaded: there are no interrupts, and nothing faults. (Intel SDM volume 3, 3.4.5 and 2.5.)
fn enter_user_mode(sregs: &mut kvm_sregs, root: u64) {
    let flat = kvm_segment { limit: u32::MAX, present: 1, dpl: 3, s: 1, g: 1, ..Default::default() };
    let code = kvm_segment { selector: 0x33, type_: 11, l: 1, ..flat };
    let stack = kvm_segment { selector: 0x2b, type_: 3, db: 1, ..flat };
    (sregs.cs, sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (code, stack, stack, stack, stack, stack);
    sregs.tr.type_ = 11; // a busy 64-bit TSS, which entering 64-bit mode asks for
    sregs.cr0 = 0x8001_0033; // paging, write protect, numeric error, extension type, monitor coprocessor, protected mode
    sregs.cr3 = root;
    sregs.cr4 |= 1 << 5; // physical address extension
    sregs.efer = 1 << 11 | 1 << 10 | 1 << 8; // no-execute, long mode active, long mode enabled
}

const SAVED_LENGTH: usize = size_of::<kvm_regs>() + size_of::<kvm_sregs>();

/// The structs of `linux/kvm.h` that are bytes through and through: any content is valid, and no byte is padding.
///
/// # Safety
/// The type is such a struct.
unsafe trait Plain: Default {}
// SAFETY: 18 registers of 8 bytes.
unsafe impl Plain for kvm_regs {}
const _: () = assert!(size_of::<kvm_regs>() == 18 * 8);
// SAFETY: 8 segments of 24 bytes and 2 tables of 16 with their padding named, 7 registers and 4 words of interrupts of 8.
unsafe impl Plain for kvm_sregs {}
const _: () = assert!(size_of::<kvm_sregs>() == 8 * 24 + 2 * 16 + 7 * 8 + 4 * 8);

fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: every byte of a plain struct is initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// A value of the bytes that [`bytes_of`] gave; missing ones are zero.
fn from_bytes<T: Plain>(bytes: &[u8]) -> T {
    let mut value = T::default();
    // SAFETY: any bytes are a valid plain struct, and no more are copied than either side has.
    unsafe {
        let count = bytes.len().min(size_of::<T>());
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), std::ptr::from_mut(&mut value).cast::<u8>(), count);
    }
    value
}

/// Has the kick arrive as an interrupted system call instead of ending the process. Once for the process.
fn register_kick() -> Result<(), GuestError> {
    extern "C" fn nothing<T, U>(_: i32, _: *mut T, _: *mut U) {}
    static REGISTERED: OnceLock<Result<(), i32>> = OnceLock::new();
    let registered = REGISTERED.get_or_init(|| register_signal_handler(SIGRTMIN(), nothing).map_err(|e| e.errno()));
    registered.map_err(|errno| GuestError::Thread(format!("cannot handle SIGRTMIN: errno {errno}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_one_moment_are_consistent() {
        for (counters, sweeps, pages) in [
            (&[7, 7, 7][..], 7, 3),
            (&[7, 6, 6], 7, 1),
            (&[7, 7, 6], 7, 2),
            (&[0, u32::MAX], 0, 1),
            (&[1, 0, 0], 1, 1),
            (&[5], 5, 1),
        ] {
            assert_eq!(check_consistent(counters.iter().copied()).unwrap(), Progress { sweeps, pages }, "{counters:?}");
        }
    }

    #[test]
    fn a_page_of_another_moment_is_found() {
        for (counters, at) in
            [(&[7, 7, 5][..], 2), (&[7, 8], 1), (&[7, 6, 7], 2), (&[7, 6, 6, 5], 3), (&[7, 0, 7], 1), (&[0, 1], 1)]
        {
            let error = check_consistent(counters.iter().copied()).unwrap_err();
            assert!(matches!(error, GuestError::Torn { page, .. } if page == at), "{counters:?}: {error}");
        }
    }

    #[test]
    fn identity_map_covers_what_it_is_given_and_fits_the_firmware() {
        let tables = identity_map(0x1000, [(0, 4 << 20), ((4 << 30) + 4096, 4096)].into_iter()).unwrap();
        assert_eq!(tables.len(), 4, "the root, one for 512 GiB, two for 1 GiB each");
        assert_eq!(tables[&0x1000][0], 0x2000 | TABLE);
        assert_eq!(tables[&0x2000][0], 0x3000 | TABLE);
        assert_eq!(tables[&0x3000][..3], [LARGE_PAGE, 2 << 20 | LARGE_PAGE, 0]);
        assert_eq!(tables[&0x2000][4], 0x4000 | TABLE);
        assert_eq!(tables[&0x4000][0], 4 << 30 | LARGE_PAGE);
        assert!(identity_map(0x1000, std::iter::once((0, 64 << 30))).is_err());
    }
}
