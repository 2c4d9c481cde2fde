//! Postcopy between two VMMs whose guests touch memory by their mappings: threads, devices, and a real one under KVM, on small and huge pages.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod arrivals;
mod attempts;
mod discards;
mod faults;
mod kvm;
mod onwards;
mod release;
mod scene;
mod shortage;
mod sparse;
mod threads;
mod watch;
