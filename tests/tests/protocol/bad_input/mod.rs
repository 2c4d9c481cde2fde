// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bad input on the control socket and on the page stream: the error names the field, and ends at
//! most one request, one connection or one job.
//!
//! - [`control`]: requests on the control socket;
//! - [`hello`]: the first record of a stream;
//! - [`records`]: the records that follow;
//! - [`scene`]: a source that sends arbitrary bytes.

mod control;
mod hello;
mod records;
mod scene;

use pageferry_protocol::memory::{BlockGeometry, PAGE_SIZE};

fn geometry(id: u32, gpa: u64, length: u64) -> BlockGeometry {
    BlockGeometry { id, name: format!("block{id}"), gpa, length, granularity: PAGE_SIZE }
}
