// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The limit of open files of this process (RLIMIT_NOFILE).
//!
//! With a low one, what fails is whatever comes next: a pipe, a socket, a program that is started.
//! So commands that stay check it first, and an error because of it says what to do.

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::error::Error;

/// The fewest open files with which the agent, and QEMU beside it, can work.
const FEWEST: u64 = 64;

/// Raises the limit of open files to the hard limit. Each block, stream and connection needs
/// descriptors, and 509 blocks alone come close to the usual soft limit of 1024.
pub(super) fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(errno) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        log::debug!("the limit of open files stays {:?}: {errno}", limit.current);
    }
}

/// Refuses a limit that is too low for any work.
///
/// # Errors
/// The sentence for the operator.
pub(super) fn check_limit() -> Result<(), String> {
    match getrlimit(Resource::Nofile).current {
        Some(limit) if limit < FEWEST => Err(format!(
            "this process may have at most {limit} open files (ulimit -n), and needs at least \
             {FEWEST}: raise the limit, to 1024 for example"
        )),
        _ => Ok(()),
    }
}

/// What to do about an error that has the limit of open files as its cause.
pub(super) fn advice(error: &(dyn Error + 'static)) -> Option<String> {
    let mut cause = Some(error);
    let mut is_of_limit = false;
    while let Some(error) = cause {
        let io = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        is_of_limit |= error.downcast_ref::<Errno>() == Some(&Errno::MFILE)
            || io == Some(Errno::MFILE.raw_os_error());
        cause = error.source();
    }
    let limit = getrlimit(Resource::Nofile).current.filter(|_| is_of_limit)?;
    Some(format!("; the limit (ulimit -n) is {limit}: raise it, to 1024 for example"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_because_of_the_limit_says_what_to_do() {
        let error = std::io::Error::from(Errno::MFILE);
        assert!(advice(&error).unwrap().contains("ulimit -n"));
        assert_eq!(advice(&std::io::Error::from(Errno::NOENT)), None);
    }
}
