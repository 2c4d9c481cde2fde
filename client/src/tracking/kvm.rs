// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's dirty log as a [`Tracker`].
//!
//! The log is used with manual protection (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`), which splits the
//! plain log into two steps. [`KvmDirtyLog::sync`] only reads: a page stays dirty in KVM and is
//! reported again. [`KvmDirtyLog::clear`] clears its bit and protects it. The agent clears right
//! before it reads ([`clear-then-read`](crate::invariants#clear-then-read)), chunk by chunk, and
//! clears discarded ranges after the sync
//! ([`fix-up-after-sync`](crate::invariants#fix-up-after-sync)).
//!
//! `KVM_DIRTY_LOG_INITIALLY_SET` is not used. With it the log starts as all ones, and every page
//! that is not cleared is reported at every sync. That includes holes, which no pass touches, and
//! discarded pages, which could then not be told from stray writes. Without it, a bit means
//! "written since the start". The price is that [`KvmDirtyLog::start`] write-protects everything
//! that the guest has mapped at once, and not chunk by chunk.
//!
//! Numbers and layouts: `linux/kvm.h`; semantics: `Documentation/virt/kvm/api.rst` sections 4.8,
//! 4.117, 7.18.
#![allow(unsafe_code)]

use super::tracker::{ClearPages, Tracker};
use crate::hooks::HookError;
use crate::sync::lock;
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
use pageferry_protocol::memory::{PAGE_SIZE, pages_in};
use pageferry_protocol::shm::DirtyLog;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};
use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

/// Pages in one word of a KVM bitmap. KVM counts clear ranges in whole words.
const WORD_PAGES: u64 = 64;

/// Most pages of one memory slot: `KVM_MEM_MAX_NR_PAGES` of `linux/kvm_host.h`.
const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;

/// One memory slot of the VM, as the VMM gave it to `KVM_SET_USER_MEMORY_REGION`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmSlot {
    /// Number of the slot; the address space id is in the upper 16 bits.
    pub slot: u32,
    /// Guest physical address, a multiple of the page size.
    pub gpa: u64,
    /// Length in bytes, a multiple of the page size.
    pub length: u64,
    /// Address of the mapping in the VMM.
    pub userspace_addr: u64,
    /// The flags that the slot has when it is not tracked (`KVM_MEM_*`).
    pub flags: u32,
}

impl KvmSlot {
    fn pages(&self) -> u64 {
        pages_in(self.length)
    }

    fn first_page(&self) -> u64 {
        pages_in(self.gpa)
    }
}

/// Why KVM's dirty log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmLogError {
    /// The descriptor is closed, or not of a VM.
    #[error("fd {fd} is not a KVM VM")]
    NotAVm {
        /// The number of the fd.
        fd: i32,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The kernel is older than 5.1, or was built without it.
    #[error(
        "KVM has no manual dirty log protection (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is {supported:#x}, bit 0 is needed)"
    )]
    Unsupported {
        /// What KVM_CHECK_EXTENSION answered.
        supported: u32,
    },
    /// KVM supports the capability but refused to enable it.
    #[error("KVM refused manual dirty log protection")]
    Enable {
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// KVM allows no such slot.
    #[error("slot {slot}: {field} {value:#x} is not a multiple of the page size, or out of bounds")]
    Slot {
        /// Number of the slot.
        slot: u32,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// KVM refused to change the slot's flags.
    #[error("slot {slot}: cannot set flags {flags:#x} ({gpa:#x} + {length:#x})")]
    Flags {
        /// Number of the slot.
        slot: u32,
        /// The flags that were asked for.
        flags: u32,
        /// Guest physical address of the slot.
        gpa: u64,
        /// Length of the slot in bytes.
        length: u64,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The log of a slot could not be read; most likely it was not started.
    #[error("slot {slot}: cannot fetch the dirty log")]
    Fetch {
        /// Number of the slot.
        slot: u32,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// Bits of a slot could not be cleared; most likely its log was not started.
    #[error("slot {slot}: cannot clear the dirty log of {pages:#x} pages from {first:#x}")]
    Clear {
        /// Number of the slot.
        slot: u32,
        /// First page, relative to the slot.
        first: u64,
        /// Number of pages.
        pages: u64,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
}

/// The dirty log of a VM's memory slots. Any thread may call any method; calls take turns.
#[derive(Debug)]
pub struct KvmDirtyLog {
    vm: OwnedFd,
    slots: Vec<KvmSlot>,
    /// One slot's bitmap: as large as the largest slot needs, so that no call allocates.
    scratch: Mutex<Vec<u64>>,
}

impl KvmDirtyLog {
    /// Makes the dirty log of `vm` a manual one; call it before anything else turns on dirty
    /// logging. `slots` are those to track: the VM keeps all its slots as they are until
    /// [`Self::start`].
    ///
    /// `vm` is the VM's fd: a `kvm_ioctls::VmFd`, or whatever else holds one. It is duplicated, so
    /// the VM lives on until this is dropped.
    ///
    /// # Safety
    /// `slots` are slots that the VM has, with the memory and the flags that it has them with, and
    /// they stay so until this is dropped: drop it before a slot is deleted or changed. A slot that
    /// the VM does not have would be made, and give the guest whatever is at its `userspace_addr`;
    /// one that was made anew and larger would have KVM write more log than there is room for.
    ///
    /// # Errors
    /// If `vm` is no VM, its KVM has no manual protection, or a slot is not one that KVM can have.
    pub unsafe fn new(vm: &impl AsRawFd, slots: Vec<KvmSlot>) -> Result<Self, KvmLogError> {
        let fd = vm.as_raw_fd();
        if fd < 0 {
            return Err(KvmLogError::NotAVm { fd, source: Errno::BADF });
        }
        // SAFETY: `vm` holds the fd open and is borrowed until after the call; a type that lies
        // gets EBADF.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let not_a_vm = |source| KvmLogError::NotAVm { fd, source };
        let vm = rustix::io::fcntl_dupfd_cloexec(borrowed, 3).map_err(not_a_vm)?;
        slots.iter().try_for_each(check_slot)?;

        // SAFETY: KVM_CHECK_EXTENSION takes the capability by value and touches no memory.
        let supported = unsafe {
            call(&vm, CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 as usize as *mut c_void)
        }
        .map_err(not_a_vm)? as u32;
        if supported & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
            return Err(KvmLogError::Unsupported { supported });
        }
        let mut capability = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into(), 0, 0, 0],
            ..Default::default()
        };
        // SAFETY: the kernel reads the struct, which lives through the call.
        unsafe { call(&vm, ENABLE_CAP, (&raw mut capability).cast()) }
            .map_err(|source| KvmLogError::Enable { source })?;

        let words = slots.iter().map(|slot| slot.pages().div_ceil(WORD_PAGES)).max().unwrap_or(0);
        Ok(Self { vm, slots, scratch: Mutex::new(vec![0; words as usize]) })
    }

    /// The slots that are tracked.
    pub fn slots(&self) -> &[KvmSlot] {
        &self.slots
    }

    /// Starts logging on all slots, with nothing dirty. Returns with every page protected, so that
    /// each write after it is logged.
    ///
    /// # Errors
    /// If KVM refuses a slot; then no slot is left logging.
    pub fn start(&self) -> Result<(), KvmLogError> {
        for (started, slot) in self.slots.iter().enumerate() {
            if let Err(error) = self.set_flags(slot, slot.flags | KVM_MEM_LOG_DIRTY_PAGES) {
                for earlier in &self.slots[..started] {
                    // The error worth reporting is the first one.
                    let _ = self.set_flags(earlier, earlier.flags);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Stops logging: all slots get the flags back that they were given with.
    ///
    /// # Errors
    /// The first refusal. The other slots are stopped nevertheless.
    pub fn stop(&self) -> Result<(), KvmLogError> {
        let mut result = Ok(());
        for slot in &self.slots {
            result = result.and(self.set_flags(slot, slot.flags));
        }
        result
    }

    /// Marks in `log` every page that KVM holds as dirty. Clears nothing in KVM.
    ///
    /// # Errors
    /// If a slot does not log. The pages of the slots before it are marked in `log`, which does no
    /// harm.
    pub fn sync(&self, log: &DirtyLog) -> Result<(), KvmLogError> {
        let mut scratch = lock(&self.scratch);
        for slot in &self.slots {
            let words = &mut scratch[..slot.pages().div_ceil(WORD_PAGES) as usize];
            self.fetch(slot, words)?;
            for (index, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
                log.bits().or_at(slot.first_page() + index as u64 * WORD_PAGES, *word);
            }
        }
        Ok(())
    }

    /// Clears in KVM the pages whose bit is set in `bitmap`, bit 0 of which is guest page `first`
    /// (`gpa / 4096`), and protects them: their next write is logged. Other pages keep their bit,
    /// also those that share a word of KVM's bitmap with one that is cleared. Pages that are in no
    /// slot are ignored.
    ///
    /// # Errors
    /// If a slot does not log. The pages of the slots before it are then cleared.
    pub fn clear(&self, first: u64, bitmap: &[u64]) -> Result<(), KvmLogError> {
        let mut scratch = lock(&self.scratch);
        let end = first.saturating_add(bitmap.len() as u64 * WORD_PAGES);
        for slot in &self.slots {
            let slot_first = slot.first_page();
            let from = first.max(slot_first);
            let to = end.min(slot_first + slot.pages());
            if from >= to {
                continue;
            }
            // In the slot's own words: KVM wants a first page that is a multiple of 64 within the
            // slot.
            let words = (from - slot_first) / WORD_PAGES..(to - slot_first).div_ceil(WORD_PAGES);
            let bits = &mut scratch[..(words.end - words.start) as usize];
            for (bits, index) in bits.iter_mut().zip(words.clone()) {
                *bits = bits_at(
                    bitmap,
                    i128::from(slot_first + index * WORD_PAGES) - i128::from(first),
                );
            }
            let Some(skip) = bits.iter().position(|word| *word != 0) else { continue };
            let used = bits.len() - bits.iter().rev().take_while(|word| **word == 0).count();
            self.clear_words(slot, words.start + skip as u64, &mut bits[skip..used])?;
        }
        Ok(())
    }

    fn set_flags(&self, slot: &KvmSlot, flags: u32) -> Result<(), KvmLogError> {
        let mut region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags,
            guest_phys_addr: slot.gpa,
            memory_size: slot.length,
            userspace_addr: slot.userspace_addr,
        };
        // SAFETY: the kernel reads the struct, which lives through the call. The slot is there
        // already, with this memory (`new`).
        unsafe { call(&self.vm, SET_USER_MEMORY_REGION, (&raw mut region).cast()) }
            .map(drop)
            .map_err(|source| KvmLogError::Flags {
                slot: slot.slot,
                flags,
                gpa: slot.gpa,
                length: slot.length,
                source,
            })
    }

    /// `words` has one bit for each page of the slot, rounded up to whole words: that is how much
    /// KVM writes.
    fn fetch(&self, slot: &KvmSlot, words: &mut [u64]) -> Result<(), KvmLogError> {
        debug_assert_eq!(words.len() as u64, slot.pages().div_ceil(WORD_PAGES));
        let mut request = kvm_dirty_log {
            slot: slot.slot,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_mut_ptr().cast(),
            },
        };
        // SAFETY: KVM writes one bit for each page of the slot, rounded up to whole words, and its
        // slot has our length (`new`).
        unsafe { call(&self.vm, GET_DIRTY_LOG, (&raw mut request).cast()) }
            .map(drop)
            .map_err(|source| KvmLogError::Fetch { slot: slot.slot, source })
    }

    /// Clears the pages of `bits`, which are the slot's words from `word`.
    fn clear_words(&self, slot: &KvmSlot, word: u64, bits: &mut [u64]) -> Result<(), KvmLogError> {
        let first = word * WORD_PAGES;
        // A multiple of 64, or up to the end of the slot.
        let pages = (bits.len() as u64 * WORD_PAGES).min(slot.pages() - first);
        let mut request = kvm_clear_dirty_log {
            slot: slot.slot,
            num_pages: pages as u32, // at most MAX_SLOT_PAGES
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bits.as_mut_ptr().cast(),
            },
        };
        // SAFETY: KVM reads `num_pages` bits, rounded up to whole words: no more than `bits` has.
        unsafe { call(&self.vm, CLEAR_DIRTY_LOG, (&raw mut request).cast()) }
            .map(drop)
            .map_err(|source| KvmLogError::Clear { slot: slot.slot, first, pages, source })
    }
}

/// The agent uses the log by [`Hooks::tracker`](crate::Hooks::tracker).
impl Tracker for KvmDirtyLog {
    fn start(&mut self) -> Result<(), HookError> {
        Ok(Self::start(self)?)
    }

    fn stop(&mut self) -> Result<(), HookError> {
        Ok(Self::stop(self)?)
    }

    fn sync(&mut self, log: &DirtyLog) -> Result<(), HookError> {
        Ok(Self::sync(self, log)?)
    }

    fn clear(&mut self, pages: ClearPages<'_>) -> Result<(), HookError> {
        Ok(Self::clear(self, pages.log_first_page, pages.bitmap)?)
    }
}

fn check_slot(slot: &KvmSlot) -> Result<(), KvmLogError> {
    let bad = |field, value| Err(KvmLogError::Slot { slot: slot.slot, field, value });
    match slot {
        _ if !slot.gpa.is_multiple_of(PAGE_SIZE) || slot.gpa.checked_add(slot.length).is_none() => {
            bad("gpa", slot.gpa)
        }
        _ if !slot.length.is_multiple_of(PAGE_SIZE) || slot.length == 0 => {
            bad("length", slot.length)
        }
        _ if slot.pages() > MAX_SLOT_PAGES => bad("length", slot.length),
        _ if !slot.userspace_addr.is_multiple_of(PAGE_SIZE) => {
            bad("userspace_addr", slot.userspace_addr)
        }
        _ => Ok(()),
    }
}

/// The 64 bits of `bitmap` from bit `at`, which may lie before its start or after its end: what is
/// outside is zero.
fn bits_at(bitmap: &[u64], at: i128) -> u64 {
    let word = |index: i128| {
        usize::try_from(index).ok().and_then(|index| bitmap.get(index)).copied().unwrap_or(0)
    };
    let (index, shift) = (at.div_euclid(64), at.rem_euclid(64) as u32);
    if shift == 0 { word(index) } else { word(index) >> shift | word(index + 1) << (64 - shift) }
}

const KVM: u8 = KVMIO as u8;
const CHECK_EXTENSION: Opcode = opcode::none(KVM, 0x03);
const GET_DIRTY_LOG: Opcode = opcode::write::<kvm_dirty_log>(KVM, 0x42);
const SET_USER_MEMORY_REGION: Opcode = opcode::write::<kvm_userspace_memory_region>(KVM, 0x46);
const ENABLE_CAP: Opcode = opcode::write::<kvm_enable_cap>(KVM, 0xa3);
const CLEAR_DIRTY_LOG: Opcode = opcode::read_write::<kvm_clear_dirty_log>(KVM, 0xc0);

/// One ioctl whose answer is its return value.
struct Call {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: number and argument are passed on unchanged; the code that makes a `Call` is responsible
// for the pair.
unsafe impl Ioctl for Call {
    type Output = IoctlOutput;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput, _: *mut c_void,
    ) -> rustix::io::Result<IoctlOutput> {
        Ok(output)
    }
}

/// # Safety
/// `argument` is what `opcode` takes, and the memory that it leads to is valid through the call.
unsafe fn call(
    vm: &OwnedFd, opcode: Opcode, argument: *mut c_void,
) -> rustix::io::Result<IoctlOutput> {
    // SAFETY: as the caller says.
    unsafe { rustix::ioctl::ioctl(vm, Call { opcode, argument }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_are_those_of_the_kernel_header() {
        assert_eq!(CHECK_EXTENSION, 0xae03);
        assert_eq!(GET_DIRTY_LOG, 0x4010_ae42);
        assert_eq!(SET_USER_MEMORY_REGION, 0x4020_ae46);
        assert_eq!(ENABLE_CAP, 0x4068_aea3);
        assert_eq!(CLEAR_DIRTY_LOG, 0xc018_aec0);
    }

    #[test]
    fn an_fd_that_is_no_vm_is_refused_by_its_number() {
        let file = rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        // SAFETY: there are no slots.
        let error = unsafe { KvmDirtyLog::new(&file, Vec::new()) }.unwrap_err();
        assert!(
            matches!(error, KvmLogError::NotAVm { fd, .. } if fd == file.as_raw_fd()),
            "{error}"
        );
        // SAFETY: there are no slots.
        let error = unsafe { KvmDirtyLog::new(&-1, Vec::new()) }.unwrap_err();
        assert!(matches!(error, KvmLogError::NotAVm { fd: -1, .. }), "{error}");
    }

    #[test]
    fn slots_that_kvm_cannot_have_are_refused_by_field() {
        let good =
            KvmSlot { slot: 3, gpa: 0x1000, length: 0x2000, userspace_addr: 0x7000, flags: 0 };
        assert!(check_slot(&good).is_ok());
        for (field, bad) in [
            ("gpa", KvmSlot { gpa: 0x10, ..good }),
            ("gpa", KvmSlot { gpa: !0xfff, ..good }),
            ("length", KvmSlot { length: 0, ..good }),
            ("length", KvmSlot { length: 0x2001, ..good }),
            ("length", KvmSlot { length: 1 << 43, ..good }),
            ("userspace_addr", KvmSlot { userspace_addr: 1, ..good }),
        ] {
            let error = check_slot(&bad).unwrap_err();
            assert!(
                matches!(error, KvmLogError::Slot { slot: 3, field: named, .. } if named == field),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn bits_at_agrees_with_a_bit_by_bit_model(bitmap in prop::collection::vec(any::<u64>(), 0..4), at in -130i128..400) {
            let bit = |index: i128| {
                (0..bitmap.len() as i128 * 64).contains(&index) && bitmap[index as usize / 64] >> (index % 64) & 1 == 1
            };
            let expected = (0..64).fold(0, |word, offset| word | u64::from(bit(at + offset)) << offset);
            prop_assert_eq!(bits_at(&bitmap, at), expected);
        }
    }
}
