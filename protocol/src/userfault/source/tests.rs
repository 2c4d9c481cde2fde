// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sources under a seccomp filter of the thread.
#![allow(unsafe_code)]

use super::*;
use crate::userfault::feature;

/// From now on, userfaultfd(2) fails with ENOSYS on this thread.
fn forbid_userfaultfd() {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut filter = [
        // The number of the system call is the first word of seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: libc::SYS_userfaultfd as u32,
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: takes numbers only.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: the kernel copies the filter, which lives through the call.
    let set =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    assert_eq!(set, 0);
}

/// A source that has no device, or `None` if the machine allows no userfaultfd.
fn without_device() -> Option<UserfaultSource> {
    let source = UserfaultSource::with(Err(Errno::NOENT));
    match source.check(feature::MISSING_SHMEM) {
        Ok(()) => Some(source),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Runs on a thread of its own, whose filter ends with it.
fn on_thread(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| scope.spawn(test).join().unwrap());
}

#[test]
fn a_filter_that_comes_later_leaves_what_was_opened_at_the_start() {
    on_thread(|| {
        let Some(source) = without_device() else { return };
        assert_eq!(source.pool().len(), POOL, "a check is made up for");
        forbid_userfaultfd();
        let opened: Vec<_> = (0..POOL).map(|_| source.open(feature::MISSING_SHMEM)).collect();
        assert!(opened.iter().all(Result::is_ok), "{opened:?}");
        let error = source.open(feature::MISSING_SHMEM).unwrap_err();
        assert!(matches!(error, UserfaultError::UsedUp { count: POOL, .. }), "{error}");
    });
}

#[test]
fn the_device_needs_no_system_call() {
    on_thread(|| {
        let source = UserfaultSource::new();
        if !source.is_device() {
            eprintln!("skipped: /dev/userfaultfd cannot be opened");
            return;
        }
        forbid_userfaultfd();
        for _ in 0..2 * POOL {
            source.open(feature::MISSING_SHMEM).unwrap();
        }
    });
}

#[test]
fn under_a_filter_nothing_is_tried_before_it_is_needed() {
    on_thread(|| {
        forbid_userfaultfd();
        let source = UserfaultSource::with(Err(Errno::ACCESS));
        assert!(source.pool().is_empty() && source.refused.is_none());
        let error = source.check(feature::MISSING_SHMEM).unwrap_err();
        assert!(matches!(error, UserfaultError::Open { source: Errno::NOSYS }), "{error}");
    });
}

#[test]
fn a_feature_that_the_kernel_lacks_is_named() {
    let Some(source) = without_device() else { return };
    // Bit 63 is no feature.
    let error = source.check(1 << 63).unwrap_err();
    assert!(matches!(error, UserfaultError::Handshake { .. }), "{error}");
    assert_eq!(source.pool().len(), POOL);
}
