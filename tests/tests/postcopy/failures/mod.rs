// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Failures at every moment of a postcopy, with real processes and real sockets. Before the commit
//! the guest keeps running at the source. After it both sides pause with a reason, continue when
//! they are recovered, and the missing pages arrive.
//!
//! - [`scene`]: a postcopy through a relay, and a guest that waits for a page;
//! - [`links`]: a lost connection; [`recovery`]: a second loss during a recovery; [`handshake`]: a
//!   loss in the handshake of a recovery;
//! - [`lies`]: a peer that sends wrong records;
//! - [`source_gone`], [`destination_gone`]: agents and VMMs that are killed;
//! - [`hooks_wait`]: hooks of the VMM that wait for missing memory;
//! - [`before`]: failures before the commit, or while it is on its way;
//! - [`operators`]: cancel, resume, stop, and requests that are refused.

mod before;
mod destination_gone;
mod handshake;
mod hooks_wait;
mod lies;
mod links;
mod operators;
mod recovery;
mod scene;
mod source_gone;
