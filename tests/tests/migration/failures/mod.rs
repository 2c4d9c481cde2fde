//! Failures at every moment of a migration: the other side hears of it in bounded time, the
//! source's guest runs on and migrates at the next try; and once ownership was given up, it stands
//! still.
//!
//! - [`scene`]: a migration through a relay, and the moments at which it is interrupted;
//! - [`links`]: the other side dies, or the connection to it does; [`silence`]: it is there and
//!   says nothing;
//! - [`hooks`]: a VMM whose hook hangs or fails;
//! - [`agents`], [`vmms`], [`killed_vmms`]: agents and VMMs that go, on either side;
//! - [`cancel`]: the user's own doing; [`truncation`]: a file that shrinks under the agent;
//! - [`line`]: all of this after the commit.

mod agents;
mod cancel;
mod hooks;
mod killed_vmms;
mod line;
mod links;
mod scene;
mod silence;
mod truncation;
mod vmms;
