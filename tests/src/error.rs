// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong in the harness itself.

use pageferry_protocol::error::chain;
use std::time::Duration;

/// An error of the harness, or a finding of one of its checks.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused.
    #[error("cannot {what}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: rustix::io::Errno,
    },
    /// A file, a process or a thread could not be used.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Options that do not go together.
    #[error(transparent)]
    Usage(#[from] pageferry_agent::cli::migration::UsageError),
    /// An error of the client library, or of the agent through it.
    #[error(transparent)]
    Client(#[from] pageferry_client::Error),
    /// The kernel does not offer write protection.
    #[error(transparent)]
    WriteProtect(#[from] pageferry_client::tracking::uffd::UffdError),
    /// An error of the guest under KVM.
    #[error(transparent)]
    Kvm(Box<crate::guest::kvm::GuestError>),
    /// An error of KVM's dirty log.
    #[error(transparent)]
    KvmLog(#[from] pageferry_client::tracking::kvm::KvmLogError),
    /// Guest memory could not be mapped or reached.
    #[error("guest memory: {0}")]
    Memory(String),
    /// There is no such block.
    #[error("block {0} does not exist")]
    NoBlock(u32),
    /// The harness waited for something that did not happen in time.
    #[error("{what} did not happen within {timeout:?}")]
    Deadline {
        /// What it waited for.
        what: String,
        /// The timeout.
        timeout: Duration,
    },
    /// A piece of VMM state is not what was expected.
    #[error("state piece \"{name}\": {reason}")]
    State {
        /// Name of the piece.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// What was asked for cannot be done with these arguments.
    #[error("{0}")]
    Argument(String),
    /// A check failed: memory is not as it should be.
    #[error("{0}")]
    Mismatch(String),
}

impl Error {
    /// For `map_err`: the kernel refused `what`.
    pub fn kernel(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |source| Self::Kernel { what, source }
    }

    /// For `map_err`: the system refused `what`.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { what: what.into(), source }
    }

    /// The error and its causes in one line.
    pub fn sentence(&self) -> String {
        chain(self)
    }
}
