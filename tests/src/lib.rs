//! Mock VMM harness.
#![deny(unsafe_code)]

pub mod in_process;
