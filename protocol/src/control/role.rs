// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two kinds of connection that an agent serves.

/// What a connection is to the agent.
///
/// A greater role may send whatever a lesser one may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A connection that does not own the guest's memory. It may watch, start and cancel jobs.
    Operator,
    /// The connection that owns the guest's memory.
    Vmm,
}
