//! The client's own threads, and code of the VMM that runs on them: a panic never ends one
//! silently.
//!
//! A thread of the client that is gone may leave a guest paused, or somebody who waits for a page,
//! with nobody to look. So what runs on such a thread is *caught*, and whoever starts it says what
//! has to happen then. In a program that is built with `panic = "abort"` nothing can be caught: a
//! panic ends the whole VMM.

use crate::error::Error;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{Builder, JoinHandle};

/// Starts a thread with this name.
///
/// # Errors
/// If the kernel has none.
pub(crate) fn spawn_thread<T: Send + 'static>(
    name: &str, run: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, Error> {
    Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map_err(|source| Error::Thread { name: name.to_owned(), source })
}

/// Runs `run`; a panic becomes its message. The state that it worked on is as the panic left it:
/// whoever calls this must be able to go on with that, or to give it up.
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
