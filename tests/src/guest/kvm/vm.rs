// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The virtual machine: memory slots, one vCPU, and the thread that runs it.
#![allow(unsafe_code)]

use super::error::{GuestError, kvm_error};
use super::sweep::Sweep;
use super::vcpu::Vcpu;
use super::{firmware, state};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use pageferry_client::tracking::kvm::{KvmDirtyLog, KvmLogError, KvmSlot};
use pageferry_protocol::memory::PAGE_SIZE;
use std::any::Any;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// A virtual machine with one vCPU. It is created paused, and paused again when it is dropped.
pub struct KvmGuest {
    thread: Option<JoinHandle<Result<(), GuestError>>>,
    vcpu: Arc<Vcpu>,
    vm: Arc<VmFd>,
    slots: Vec<KvmSlot>,
    sweep: Sweep,
    memory: Box<dyn Mapped>,
}

/// Guest memory with any bitmap.
trait Mapped: Any + Send + Sync {
    fn write(&self, bytes: &[u8], gpa: u64) -> Result<(), GuestError>;
    fn counter(&self, gpa: u64) -> Result<u32, GuestError>;
}

impl<B: Bitmap + Send + Sync + 'static> Mapped for GuestMemoryMmap<B> {
    fn write(&self, bytes: &[u8], gpa: u64) -> Result<(), GuestError> {
        self.write_slice(bytes, GuestAddress(gpa))
            .map_err(|error| GuestError::Memory(error.to_string()))
    }

    fn counter(&self, gpa: u64) -> Result<u32, GuestError> {
        self.load(GuestAddress(gpa), Ordering::Acquire)
            .map_err(|error| GuestError::Memory(error.to_string()))
    }
}

impl KvmGuest {
    /// Creates a VM over the mappings of `memory`, with one slot for each region, numbered from
    /// zero. Call [`Self::boot`] or [`Self::load`] next. Writes nothing to the memory.
    ///
    /// # Errors
    /// If KVM refuses, or `sweep` is not within the memory.
    pub fn new<B: Bitmap + Send + Sync + 'static>(
        memory: GuestMemoryMmap<B>, sweep: Sweep,
    ) -> Result<Self, GuestError> {
        sweep.check(&memory)?;
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
            // SAFETY: the mapping is that of `memory`, which the guest keeps. No other code makes
            // slots of this VM.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(kvm_error("give the VM its memory"))?;
        }
        let fd = vm.create_vcpu(0).map_err(kvm_error("make a vCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm_error("list CPU features"))?;
        fd.set_cpuid2(&cpuid).map_err(kvm_error("set CPU features"))?;
        let vcpu = Arc::new(Vcpu::new(fd)?);
        Ok(Self { thread: None, vcpu, vm: Arc::new(vm), slots, sweep, memory: Box::new(memory) })
    }

    /// Writes the firmware to the guest's memory and sets the vCPU to its start.
    ///
    /// # Errors
    /// If it runs, KVM refuses, or the page tables need more room than the firmware has.
    pub fn boot(&mut self) -> Result<(), GuestError> {
        let base = self.slots.first().map_or(0, |slot| slot.gpa);
        let pieces = firmware::pieces(
            base,
            &self.sweep,
            self.slots.iter().map(|slot| (slot.gpa, slot.length)),
        )?;
        let fd = self.standing()?;
        let mut sregs = fd.get_sregs().map_err(kvm_error("read registers"))?;
        let regs = firmware::enter(base, &self.sweep, &mut sregs);
        fd.set_sregs(&sregs).map_err(kvm_error("set control registers"))?;
        fd.set_regs(&regs).map_err(kvm_error("set registers"))?;
        drop(fd);
        pieces.iter().try_for_each(|(gpa, bytes)| self.memory.write(bytes, *gpa))
    }

    /// The vCPU's state. It has only registers, because the guest uses no FPU, no MSR and no
    /// interrupt.
    ///
    /// # Errors
    /// If it runs.
    pub fn save(&self) -> Result<Vec<u8>, GuestError> {
        state::save(&*self.standing()?)
    }

    /// Sets the vCPU to the saved state of another one. The memory must be that of the other one,
    /// too.
    ///
    /// # Errors
    /// If it runs, `saved` is not what [`Self::save`] gives, or KVM refuses it.
    pub fn load(&mut self, saved: &[u8]) -> Result<(), GuestError> {
        state::load(&*self.standing()?, saved)
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

    /// Starts or resumes the vCPU. It runs on its own thread until it is paused.
    ///
    /// # Errors
    /// If it ended unexpectedly before, or no thread can be started.
    pub fn resume(&mut self) -> Result<(), GuestError> {
        if self.is_running() {
            return Ok(());
        }
        self.pause()?;
        self.thread = Some(Vcpu::start(&self.vcpu)?);
        Ok(())
    }

    /// Pauses the vCPU. When this returns it writes nothing any more.
    ///
    /// # Errors
    /// If the vCPU ended unexpectedly before. It is paused in this case, too.
    pub fn pause(&mut self) -> Result<(), GuestError> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.vcpu.stop(thread)
    }

    /// True while the vCPU runs. False when it is paused, or when it ended unexpectedly, which
    /// [`Self::pause`] reports.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Number of sweeps that have reached the last page. It wraps around.
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

    /// Resumes the guest for this many sweeps, and pauses it.
    ///
    /// # Errors
    /// As [`Self::resume`], [`Self::wait_for_sweeps`] and [`Self::pause`].
    pub fn run_for_sweeps(&mut self, count: u32, within: Duration) -> Result<(), GuestError> {
        self.resume()?;
        self.wait_for_sweeps(count, within)?;
        self.pause()
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
        // SAFETY: these are the slots that `new` made, and no code changes them. The log holds the
        // VM but not the memory: with the guest gone no vCPU is left to write to it.
        unsafe { KvmDirtyLog::new(&*self.vm, self.slots.clone()) }
    }

    fn standing(&self) -> Result<MutexGuard<'_, VcpuFd>, GuestError> {
        if self.is_running() {
            return Err(GuestError::Running);
        }
        Ok(self.vcpu.registers())
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
        formatter
            .debug_struct("KvmGuest")
            .field("running", &self.is_running())
            .field("slots", &self.slots)
            .finish()
    }
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
