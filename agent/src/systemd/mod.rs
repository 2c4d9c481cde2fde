// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent as a service of systemd. `docs/systemd` has the units.
//!
//! - [`activation`]: the listening socket that systemd hands over;
//! - [`notifier`]: tells systemd when the agent is ready, what it does, and that it works.
//!
//! Both follow the environment of the process, as `sd_listen_fds(3)` and `sd_notify(3)` describe
//! it. Without the variables nothing happens, so any other service manager works, too.

pub mod activation;
pub mod notifier;

pub use activation::inherited_listener;
pub use notifier::Notifier;
