// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM for trying the parts of a migration by hand, each in its own terminal:
//!
//! ```text
//! truncate -s 2G /dev/shm/here /dev/shm/there
//! pageferry agent --socket /tmp/here.sock
//! pageferry agent --socket /tmp/there.sock
//! mock_vmm destination --socket /tmp/there.sock --memory /dev/shm/there --size 2G \
//!     --listen tcp:127.0.0.1:7000
//! mock_vmm source      --socket /tmp/here.sock  --memory /dev/shm/here  --size 2G \
//!     --to tcp:127.0.0.1:7000
//! ```
//!
//! With `--mode postcopy` at the source the guest moves before its memory, with
//! `--mode hybrid --switch-after 2` after two passes. `mock_vmm source --help` has the rest. With
//! `--snapshot-to` and `--restore-from` it saves and restores instead. `mock_vmm clone IMAGE` runs
//! many guests of one image, which share memory. The exit status is 0 only after a migration that
//! was verified and committed, a snapshot whose image is complete, or restores that were verified.

fn main() -> std::process::ExitCode {
    pageferry_tests::mock_vmm::main(std::env::args_os().skip(1).collect())
}
