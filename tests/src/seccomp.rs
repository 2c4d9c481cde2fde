// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Threads that may not use userfaultfd, as in a container with a strict seccomp filter.
#![allow(unsafe_code)]

use rustix::io::Errno;

/// Runs `run` on a thread for which userfaultfd(2) fails with EPERM, as it does for the threads
/// that this one starts.
///
/// # Panics
/// If the kernel refuses the filter, or `run` panics.
#[allow(clippy::panic)] // a test that fails here fails
pub fn without_userfaultfd<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if let Err(errno) = forbid_userfaultfd() {
                panic!("cannot set a seccomp filter: {errno}");
            }
            run()
        });
        thread.join().unwrap_or_else(|panicked| std::panic::resume_unwind(panicked))
    })
}

/// From now on, userfaultfd(2) fails on this thread.
fn forbid_userfaultfd() -> Result<(), Errno> {
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
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: takes numbers only.
    let mut set = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if set == 0 {
        // SAFETY: the kernel copies the filter, which lives through the call.
        set = unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
    }
    if set == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::PERM))
}
