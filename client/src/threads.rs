// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Threads of the client, and code of the VMM that runs on them. A panic never ends such a thread
//! silently.
//!
//! A thread that is gone may leave a guest paused, or an access waiting for a page, and nothing
//! would notice. So all code on such a thread runs under [`catch_panic`], and the code that starts
//! the thread says what happens after a panic. In a program that is built with `panic = "abort"`
//! nothing can be caught: a panic ends the VMM.

use crate::error::Error;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread::{Builder, JoinHandle};

/// Starts a thread with this name.
///
/// # Errors
/// If the kernel refuses.
pub(crate) fn spawn_thread<T: Send + 'static>(
    name: &str, run: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, Error> {
    Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map_err(|source| Error::Thread { name: name.to_owned(), source })
}

/// Waits for the end of a thread. Its panic, if it had one, continues here.
pub(crate) fn join<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// Runs `run` and turns a panic into its message. The panic leaves the state of `run` as it was at
/// that moment. The caller must be able to continue with that state, or must give it up.
pub(crate) fn catch_panic<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| message(&*panic))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "the panic has no message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(catch_panic(|| 7), Ok(7));
        assert_eq!(catch_panic(|| panic!("plain")), Err::<(), _>("plain".to_owned()));
        let number = 3;
        assert_eq!(catch_panic(|| panic!("vCPU {number}")), Err::<(), _>("vCPU 3".to_owned()));
        let other = catch_panic(|| std::panic::panic_any(7u64));
        assert_eq!(other, Err::<(), _>("the panic has no message".to_owned()));
    }
}
