// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A restartable sequence (rseq(2)), with the registration that the C library has made.

use std::arch::asm;

/// Runs a sequence of some microseconds. Its last instruction checks that the kernel still knows
/// of it: a thread that was stopped in it must have begun again.
pub(super) fn run_sequence() {
    // SAFETY: dlsym returns null or the address of this variable, which never changes.
    let offset = unsafe {
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr());
        assert!(!offset.is_null(), "the C library has no rseq");
        offset.cast::<isize>().read()
    };
    let known: u64;
    // SAFETY: changes nothing but its registers and the pointer of the C library's area, which is
    // for that. The area is at this offset from the thread pointer.
    unsafe {
        asm!(
            ".pushsection .data.rseq_test, \"aw\"",
            ".balign 32",
            "22: .long 0, 0",
            ".quad 33f, 44f - 33f, 55f",
            ".popsection",
            "88: lea {scratch}, [rip + 22b]",
            "mov qword ptr fs:[{offset} + 8], {scratch}",
            "33: mov {scratch}, 20000",
            "66: dec {scratch}",
            "jnz 66b",
            "mov {known}, qword ptr fs:[{offset} + 8]",
            "44: jmp 77f",
            // RSEQ_SIG, which must be in front of the code that the kernel jumps to.
            ".byte 0x0f, 0xb9, 0x3d",
            ".long 0x53053053",
            "55: jmp 88b",
            "77: mov qword ptr fs:[{offset} + 8], 0",
            offset = in(reg) offset,
            scratch = out(reg) _,
            known = out(reg) known,
        );
    }
    assert_ne!(known, 0, "the sequence went on after a stop");
    // Time outside of the sequence, so that an injection finds some.
    for step in 0..20_000_u32 {
        std::hint::black_box(step);
    }
}
