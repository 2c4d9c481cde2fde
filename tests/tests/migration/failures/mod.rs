// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Failures at every moment of a migration. The other side learns of a failure in bounded time.
//! Before the commit the source's guest keeps running, and the next attempt succeeds. After the
//! commit it stays paused.
//!
//! - [`scene`]: a migration through a relay, and the moments at which it is interrupted;
//! - [`links`]: a peer dies, or the connection breaks; [`silence`]: a peer that is connected and
//!   silent;
//! - [`hooks`]: VMMs with a hook that hangs or fails;
//! - [`agents`], [`vmms`], [`killed_vmms`]: agents and VMMs that end or are killed, on either side;
//! - [`cancel`]: a cancel by the user; [`truncation`]: a file that shrinks under the agent;
//! - [`after_commit`]: all of these failures after the commit.

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
