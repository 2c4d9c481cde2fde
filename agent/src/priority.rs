//! What nobody waits for steps back behind what somebody does.
//!
//! While a guest runs before its memory is there, the threads that push and place the rest of it
//! are never idle, and run on the processors that the guest, and the threads that fetch what it
//! waits for, wake up on. At the same priority each of these would wait for a time slice of the
//! others.

/// Nice value of who steps back: it gets a tenth of a processor that others want all of, and all of
/// one that nobody wants.
const NICE: i32 = 10;

/// The calling thread, which somebody started for this, does what nobody waits for.
pub fn lower() {
    let thread = rustix::thread::gettid();
    // On Linux the process of this call is a thread.
    if let Err(errno) = rustix::process::setpriority_process(Some(thread), NICE) {
        log::debug!("nice {NICE}: {errno}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_steps_back_and_no_other() {
        let nice = || rustix::process::getpriority_process(Some(rustix::thread::gettid())).unwrap();
        let before = nice();
        let stepped_back = std::thread::spawn(move || {
            lower();
            nice()
        });
        assert_eq!(stepped_back.join().unwrap(), NICE.max(before));
        assert_eq!(nice(), before);
    }
}
