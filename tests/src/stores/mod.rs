// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Object stores on this machine: S3 and Azure's blob service, for tests of images in them.
//!
//! `tests/stores/install` gets the servers. A server keeps its objects in memory, listens on a free
//! port of the loopback interface, and ends with the test.
//!
//! - [`tools`]: where the servers are; [`server`]: a server that runs;
//! - [`faults`]: a proxy in front of a server, which delays, refuses, cuts and damages answers.
//!
//! ```no_run
//! # use pageferry_tests::stores::faults::{Fault, FaultProxy, Faults};
//! # use pageferry_tests::stores::{StoreKind, StoreServer};
//! # use pageferry_tests::require;
//! # use std::process::Command;
//! # fn example() -> Result<(), pageferry_tests::Error> {
//! let Some(tools) = require::stores() else { return Ok(()) };
//! let server = StoreServer::start(&tools, StoreKind::S3, &["images"])?;
//! let proxy = FaultProxy::to(server.address(), 7)?;
//! proxy.set(Faults::default().with(Fault::Busy, 50).with(Fault::CutBody, 20));
//! Command::new("pageferry")
//!     .args(["snapshot", "--to", &server.url("images", "guest")])
//!     .envs(server.environment_at(proxy.address()));
//! assert!(proxy.counts().requests("PUT") > 0);
//! # Ok(())
//! # }
//! ```

pub mod faults;
pub mod server;
pub mod tools;

pub use server::{StoreKind, StoreServer};
pub use tools::StoreTools;
