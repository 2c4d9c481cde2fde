// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's firmware: the first [`FIRMWARE_PAGES`] pages of its first region hold the code, the
//! table of the ranges to sweep, and the page tables. The guest only reads them, and they migrate
//! like any other page.

use super::error::GuestError;
use super::sweep::{FIRMWARE_PAGES, Sweep};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use pageferry_protocol::memory::PAGE_SIZE;
use std::collections::BTreeMap;

/// Offset of the table of ranges in the firmware. The table has half a page, with 16 bytes for each
/// range. The last range is empty.
pub(super) const TABLE_OFFSET: u64 = 0x800;

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

/// The parts of the firmware at `base`, each with its guest physical address, for a guest with
/// memory at `ranges` (GPA, length in bytes).
pub(super) fn pieces(
    base: u64, sweep: &Sweep, ranges: impl Iterator<Item = (u64, u64)>,
) -> Result<Vec<(u64, Vec<u8>)>, GuestError> {
    let mut page = vec![0; PAGE_SIZE as usize];
    page[..CODE.len()].copy_from_slice(&CODE);
    for (entry, (gpa, pages)) in
        page[TABLE_OFFSET as usize..].chunks_exact_mut(16).zip(&sweep.ranges)
    {
        entry[..8].copy_from_slice(&gpa.to_le_bytes());
        entry[8..].copy_from_slice(&pages.to_le_bytes());
    }
    let tables = identity_map(base + PAGE_SIZE, ranges)?;
    let bytes = |table: [u64; 512]| table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let tables = tables.into_iter().map(|(gpa, table)| (gpa, bytes(table)));
    Ok(std::iter::once((base, page)).chain(tables).collect())
}

/// Registers at the start of the firmware at `base`, in user mode.
pub(super) fn enter(base: u64, sweep: &Sweep, sregs: &mut kvm_sregs) -> kvm_regs {
    enter_user_mode(sregs, base + PAGE_SIZE);
    kvm_regs {
        rip: base,
        rflags: 2, // bit 1 is always set (Intel SDM volume 1, 3.4.3)
        r8: sweep.spins.into(),
        r9: base + TABLE_OFFSET,
        ..Default::default()
    }
}

// Bits of a page table entry (Intel SDM volume 3, 4.5): present, writable, user, accessed; and for
// a large page also dirty and large. Accessed and dirty are set from the start, so that walking the
// tables writes no memory.
const TABLE: u64 = 0x27;
const LARGE_PAGE: u64 = 0xe7;

/// Page tables from `root` with an identity map of every 2 MiB that `ranges` touch. Returns each
/// table's guest physical address and entries.
fn identity_map(
    root: u64, ranges: impl Iterator<Item = (u64, u64)>,
) -> Result<BTreeMap<u64, [u64; 512]>, GuestError> {
    let limit = root + (FIRMWARE_PAGES - 1) * PAGE_SIZE;
    let mut tables = BTreeMap::from([(root, [0; 512])]);
    for (gpa, length) in ranges {
        for large in gpa >> 21..(gpa + length).div_ceil(1 << 21) {
            let mut table = root;
            for level in [18, 9] {
                let next = root + tables.len() as u64 * PAGE_SIZE;
                let entry = tables
                    .get_mut(&table)
                    .map(|entries| &mut entries[(large >> level & 511) as usize]);
                let Some(entry) = entry else {
                    return Err(GuestError::Memory("page tables are broken".into()));
                };
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

/// 64-bit mode at privilege level 3 with the page tables at `root`. The CPU never reads a
/// descriptor table, because no segment is ever loaded: there are no interrupts or faults. (Intel
/// SDM volume 3, 3.4.5 and 2.5.)
fn enter_user_mode(sregs: &mut kvm_sregs, root: u64) {
    let flat =
        kvm_segment { limit: u32::MAX, present: 1, dpl: 3, s: 1, g: 1, ..Default::default() };
    let code = kvm_segment { selector: 0x33, type_: 11, l: 1, ..flat };
    let stack = kvm_segment { selector: 0x2b, type_: 3, db: 1, ..flat };
    (sregs.cs, sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) =
        (code, stack, stack, stack, stack, stack);
    sregs.tr.type_ = 11; // a busy 64-bit TSS, which entering 64-bit mode asks for
    sregs.cr0 = 0x8001_0033; // paging, write protect, numeric error, extension type, monitor coprocessor, protected mode
    sregs.cr3 = root;
    sregs.cr4 |= 1 << 5; // physical address extension
    sregs.efer = 1 << 11 | 1 << 10 | 1 << 8; // no-execute, long mode active, long mode enabled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_map_covers_what_it_is_given_and_fits_the_firmware() {
        let tables =
            identity_map(0x1000, [(0, 4 << 20), ((4 << 30) + 4096, 4096)].into_iter()).unwrap();
        assert_eq!(tables.len(), 4, "the root, one for 512 GiB, two for 1 GiB each");
        assert_eq!(tables[&0x1000][0], 0x2000 | TABLE);
        assert_eq!(tables[&0x2000][0], 0x3000 | TABLE);
        assert_eq!(tables[&0x3000][..3], [LARGE_PAGE, 2 << 20 | LARGE_PAGE, 0]);
        assert_eq!(tables[&0x2000][4], 0x4000 | TABLE);
        assert_eq!(tables[&0x4000][0], 4 << 30 | LARGE_PAGE);
        assert!(identity_map(0x1000, std::iter::once((0, 64 << 30))).is_err());
    }
}
