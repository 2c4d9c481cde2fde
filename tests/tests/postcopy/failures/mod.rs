// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Failures at every moment of a postcopy, with real processes killed and real sockets cut: before
//! the commit the guest runs on at the source; after it both sides pause, say why, and go on when
//! they are recovered, and what was missing comes.
//!
//! - [`scene`]: a postcopy through a relay, and a guest that waits for a page;
//! - [`links`]: a connection is lost; [`recovery`]: and again while it is recovered;
//!   [`handshake`]: in the handshake of a recovery;
//! - [`lies`]: a peer that says what is not so;
//! - [`source_gone`], [`destination_gone`]: agents and VMMs that are killed;
//! - [`hooks_wait`]: the VMM's own hooks wait for memory meanwhile;
//! - [`before`]: all that fails before the commit, or with it on its way;
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
