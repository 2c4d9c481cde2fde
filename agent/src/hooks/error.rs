// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a hook failed.

use pageferry_protocol::control::SocketError;
use pageferry_protocol::control::codec::DecodeError;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use pageferry_protocol::error::rounded;
use std::time::Duration;

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The VMM did not read the hook in time, or is gone.
    #[error("hook \"{hook}\"")]
    Socket {
        /// Name of the hook.
        hook: &'static str,
        /// The error of the socket.
        #[source]
        source: SocketError,
    },
    /// The VMM did not answer in time.
    #[error("hook \"{hook}\": the VMM has not answered within {}", rounded(*waited))]
    Late {
        /// Name of the hook.
        hook: &'static str,
        /// How long the VMM had.
        waited: Duration,
    },
    /// The VMM refused the hook.
    #[error("hook \"{hook}\" failed in the VMM: {error}")]
    Refused {
        /// Name of the hook.
        hook: &'static str,
        /// The error that the VMM returned.
        error: RemoteError,
    },
    /// The VMM's code panicked, and its client caught the panic.
    #[error("hook \"{hook}\" panicked in the VMM: {message}")]
    Panicked {
        /// Name of the hook.
        hook: &'static str,
        /// The message of the panic.
        message: String,
    },
    /// The answer is malformed.
    #[error("the answer to hook \"{hook}\" is malformed")]
    Malformed {
        /// Name of the hook.
        hook: &'static str,
        /// What is wrong with the answer.
        #[source]
        source: DecodeError,
    },
    /// The answer has the wrong number of descriptors.
    #[error("the answer to hook \"{hook}\" has {count} file descriptors, expected {expected}")]
    WrongFdCount {
        /// Name of the hook.
        hook: &'static str,
        /// Number of descriptors that were received.
        count: usize,
        /// Number of descriptors that the hook requires.
        expected: usize,
    },
    /// The file with the VMM's state is shorter than the pieces.
    #[error(
        "the answer to hook \"{hook}\" has pieces of {expected} bytes in total, \
         but a file of {length}"
    )]
    StateFileTooShort {
        /// Name of the hook.
        hook: &'static str,
        /// Length of the file in bytes; 0 if the descriptor has no length, such as a pipe.
        length: u64,
        /// Bytes of all pieces.
        expected: u64,
    },
    /// The file with the VMM's state is not open for reading.
    #[error("the answer to hook \"{hook}\" has a file that is not open for reading")]
    StateFileNotReadable {
        /// Name of the hook.
        hook: &'static str,
    },
    /// The channel broke in an earlier hook.
    #[error("hook \"{hook}\": an earlier hook broke the socket for hooks: {reason}")]
    ChannelBroken {
        /// Name of the hook, which was not sent.
        hook: &'static str,
        /// The error that broke the channel.
        reason: String,
    },
    /// The VMM has set no socket for hooks.
    #[error("hook \"{hook}\": the VMM has set no socket for hooks (SET_BACKEND_REQ_FD)")]
    NoSocket {
        /// Name of the hook, which was not sent.
        hook: &'static str,
    },
}

impl HookError {
    /// True if the VMM has the hook, or finds it when it reads on.
    pub fn reached_vmm(&self) -> bool {
        match self {
            Self::Late { .. }
            | Self::Refused { .. }
            | Self::Panicked { .. }
            | Self::Malformed { .. }
            | Self::WrongFdCount { .. }
            | Self::StateFileTooShort { .. }
            | Self::StateFileNotReadable { .. } => true,
            Self::Socket { .. } | Self::ChannelBroken { .. } | Self::NoSocket { .. } => false,
        }
    }
}

/// The error for a hook that the VMM refused or that panicked there.
pub(super) fn refused(hook: &'static str, error: RemoteError) -> HookError {
    match error.code {
        ErrorCode::Panicked => HookError::Panicked { hook, message: error.sentence },
        _ => HookError::Refused { hook, error },
    }
}
