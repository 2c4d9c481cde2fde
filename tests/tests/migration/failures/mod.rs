// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Failures at every moment of a migration. The other side learns of it in bounded time. Before the
//! commit the source's guest runs on, and migrates at the next try; after it the guest stays
//! paused.
//!
//! - [`scene`]: a migration through a relay, and the moments at which it is interrupted;
//! - [`links`]: the other side dies, or the connection to it does; [`silence`]: it is there and
//!   says nothing;
//! - [`hooks`]: a VMM whose hook hangs or fails;
//! - [`agents`], [`vmms`], [`killed_vmms`]: agents and VMMs that go, on either side;
//! - [`cancel`]: the user's own doing; [`truncation`]: a file that shrinks under the agent;
//! - [`after_commit`]: all of this after the commit.

mod after_commit;
mod agents;
mod cancel;
mod hooks;
mod killed_vmms;
mod links;
mod scene;
mod silence;
mod truncation;
mod vmms;
