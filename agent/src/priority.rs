// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A lower scheduling priority for threads whose work is not urgent.
//!
//! While a guest runs before all of its memory is there, some threads push, place or prefetch the
//! rest of the memory. They are never idle. The guest's vCPUs, and the threads that fetch the pages
//! for which the guest waits, must run on the same processors. With the same priority, each of
//! these would wait for a time slice of a busy thread when it wakes up. So the busy threads lower
//! their priority.

/// Nice value of a thread whose work is not urgent. It gets a tenth of a processor that another
/// thread fully uses, and all of an idle one.
const NICE: i32 = 10;

/// Lowers the priority of the calling thread, which must exist for this work alone: without
/// privileges it cannot raise its priority again. If the kernel refuses, the priority stays.
pub fn lower() {
    let thread = rustix::thread::gettid();
    // On Linux, `setpriority` with `PRIO_PROCESS` affects the thread with this id.
    if let Err(errno) = rustix::process::setpriority_process(Some(thread), NICE) {
        log::debug!("nice {NICE}: {errno}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_calling_thread_gets_a_lower_priority() {
        let nice = || rustix::process::getpriority_process(Some(rustix::thread::gettid())).unwrap();
        let before = nice();
        let lowered = std::thread::spawn(move || {
            lower();
            nice()
        });
        assert_eq!(lowered.join().unwrap(), NICE.max(before));
        assert_eq!(nice(), before);
    }
}
