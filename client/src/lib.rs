// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The thin library in the VMM.
//!
//! A VMM connects to its agent, or spawns one, and hands over its guest memory once, as file
//! descriptors. From then on it reports [what the guest gives
//! back](#memory-that-the-guest-gives-back), answers hooks ([`Hooks`]), and starts and watches
//! migrations.
//!
//! ```no_run
//! use pageferry_client::{Client, Config, HookError, Hooks, OutgoingOptions};
//! use pageferry_client::{RunState, StatePiece, Target, Trackers};
//! # use pageferry_client::LogBitmap;
//! # use pageferry_client::vm_memory;
//! # fn guest_memory() -> vm_memory::GuestMemoryMmap<LogBitmap> { unimplemented!() }
//!
//! struct Vmm;
//!
//! impl Hooks for Vmm {
//!     fn run_state(&mut self) -> Result<RunState, HookError> {
//!         Ok(RunState::Running) // or Paused, if its operator has paused it
//!     }
//!     fn pause(&mut self) -> Result<(), HookError> {
//!         Ok(()) // stop the vCPUs and the devices
//!     }
//!     fn resume(&mut self) -> Result<(), HookError> {
//!         Ok(())
//!     }
//!     fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
//!         Ok(vec![StatePiece { name: "vcpu0".into(), bytes: vec![] }])
//!     }
//!     fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
//!         Ok(())
//!     }
//! }
//!
//! # fn main() -> Result<(), pageferry_client::Error> {
//! let (client, channel) = Client::connect("/run/vm1/pageferry.sock".as_ref(), Config::default())?;
//! let hooks = channel.spawn(Vmm)?;
//! client.add_guest_memory(&guest_memory())?;
//! client.set_trackers(Trackers::WRITE_PROTECT)?; // see "Declare the trackers"
//! let to = Target::Address("tls:host-b:4444".into());
//! let job = client.start_outgoing(to, &OutgoingOptions::default())?.job;
//! let status = client.wait(job, std::time::Duration::from_secs(600))?;
//! # Ok(()) }
//! ```
//!
//! # Declare the trackers
//!
//! The devices of a VMM on [`GuestMemoryMmap<LogBitmap>`](LogBitmap) mark the shared dirty log by
//! themselves. But only a tracker knows what vCPUs write, and no default can guess which tracker
//! there is. So a VMM declares it once, with [`Client::set_trackers`]. Until then no migration with
//! passes, no increment and no snapshot with `track` starts.
//!
//! | declared | what the VMM does for it |
//! | --- | --- |
//! | [`Trackers::HOOKS`] | returns its own [`Tracker`] from [`Hooks::tracker`]; [`tracking::kvm`] (feature `kvm`) is one, over KVM's dirty log |
//! | [`Trackers::WRITE_PROTECT`] | sets [`BlockSpec::vmm_address`]; needs Linux 6.7, and the right to use userfaultfd (CAP_SYS_PTRACE, `vm.unprivileged_userfaultfd`, or `/dev/userfaultfd`), as background snapshots, postcopy and lazy restore do; [`Client::check_userfaultfd`] tells |
//! | [`Trackers::LOG_IS_COMPLETE`] | has every writer mark the log, also the vCPUs |
//!
//! # Memory that the guest gives back
//!
//! | call | for |
//! | --- | --- |
//! | [`Client::free`] | memory that the guest uses again without notice: a balloon, free page reporting |
//! | [`Client::discard`], [`Client::populate`] | memory that the VMM unplugs and plugs again: virtio-mem |
//! | [`Client::free_later`], [`Client::discard_later`], [`Client::flush`] | the same for many small ranges, which are sent together |
//!
//! [`Client::guest_ranges`] and [`Client::host_ranges`] find the ranges of blocks at addresses. The
//! guest is told only when a free or [`Client::flush`] has returned success:
//!
//! ```no_run
//! # use pageferry_client::{Client, Error};
//! # struct Request { pages: Vec<u64> }
//! # impl Request { fn complete(self) {} }
//! /// Pages of 4 KiB, as a virtio-balloon gets them.
//! fn inflate(client: &Client, request: Request) -> Result<(), Error> {
//!     for gpa in &request.pages {
//!         client.free_later(&client.guest_ranges(*gpa, 4096)?)?;
//!     }
//!     client.flush()?;
//!     request.complete();
//!     Ok(())
//! }
//! ```
//!
//! # Snapshots and restore
//!
//! [`Client::start_snapshot`] saves the guest into an image, by the same hooks as a migration:
//! pause, save state, resume. The default is a background snapshot: the guest is paused only for a
//! moment and then runs while its memory is saved. A write to a page that is not saved yet waits
//! until it is. If the agent is lost meanwhile, the snapshot is lost, and no write waits any more.
//!
//! [`Client::start_restore`] fills the memory of a VMM that has no guest, or that gives its guest
//! up. Otherwise it is like an incoming migration: load state, resume. A restore that an operator
//! asks for comes by [`Hooks::accept_guest`], and is refused unless the VMM allows it. A VMM
//! whose guest has moved away needs a new agent ([`Client::reattach`]) before it takes another
//! guest.
//!
//! ```no_run
//! use pageferry_client::{Client, RestoreMode, RestoreOptions, SnapshotOptions};
//! # fn main() -> Result<(), pageferry_client::Error> {
//! # let (client, _) = Client::connect("/run/vm1/pageferry.sock".as_ref(), Default::default())?;
//! # let (other, _) = Client::connect("/run/vm2/pageferry.sock".as_ref(), Default::default())?;
//! let job = client.start_snapshot("/images/vm1".as_ref(), &SnapshotOptions::default())?.job;
//! let status = client.wait(job, std::time::Duration::from_secs(600))?;
//!
//! // Elsewhere, with a guest that runs before its memory is there.
//! let lazy = RestoreOptions { mode: RestoreMode::Lazy, ..RestoreOptions::default() };
//! other.start_restore("/images/vm1".as_ref(), &lazy)?;
//! # Ok(()) }
//! ```
//!
//! # A lost agent
//!
//! A guest does not need its agent, and continues without it. A [`Supervisor`] starts the agent,
//! runs its hooks, and starts the next one when it is lost, in the states in which that loses
//! nothing. A VMM that has its own means to start agents attaches the next one with
//! [`Client::reattach`].
//!
//! # Errors
//!
//! An [`Error`] prints only what failed, and keeps why as its [source](std::error::Error::source).
//! [`error::chain`] prints it with all its causes in one line.
//!
//! # Features
//!
//! | feature | default | what it adds |
//! | --- | --- | --- |
//! | `vm-memory` | yes | [`Client::add_guest_memory`], and [`LogBitmap`] with [`AttachLog`]: guest memory of the `vm-memory` crate, whose devices mark the dirty log. Its version is re-exported as [`vm_memory`] |
//! | `kvm` | no | [`tracking::kvm`]: KVM's dirty log as a tracker |
//!
//! Without `vm-memory`, a VMM adds its memory with [`Client::add_blocks`], from a list such as the
//! memory table of vhost-user, or with [`Client::add_block`].
//!
//! # Rules
//!
//! Names such as [`one-owner`](invariants#one-owner) in this documentation are rules, which
//! [`invariants`] explains.

// Where things are.
//
// Talking to an agent:
//
// - `client`, `config`, `spawn`: connecting, and a new agent after a lost one;
// - `supervisor`, `after_loss`, `backoff`, `child`, `wakeup`: new agents after lost ones, without
//   the VMM;
// - `session`, `control`, `link`: requests and answers; giving an agent up;
// - `agent_process`: the process of an agent, and making sure that it has exited;
// - `heartbeat`, `timeouts`, `deadline`: finding an agent that hangs; `retry`: waiting for a job
//   that is in the way.
//
// What a VMM does with it:
//
// - `blocks`, `guest_memory` (feature `vm-memory`): adding and removing memory; `addresses`: from
//   addresses to ranges of blocks;
// - `discards`: discard, free and populate, with an agent and without; `discard_queue`: many small
//   ones in one request;
// - `trackers`, `tracking`, `vm_memory_bitmap` (feature `vm-memory`): what reports the writes of
//   the guest;
// - `clones`: guests that share the pages of one image;
// - `jobs`: migrations, snapshots, restores; `page_stream`: migrations over the VMM's own
//   transport;
// - `hooks`: requests of the agent to the VMM; `ownership`: who may run the guest.
//
// Memory:
//
// - `memory`, `block`, `memfd`: what survives the agent;
// - `private_memory`: the memory of clones, and giving it back;
// - `missing_pages`, `poison`: pages that are still missing while the guest runs;
// - `watched_writes`: pages that a background snapshot has not saved yet;
// - `registration`: the userfaultfd registration that both need; `mapping_process`: where
//   userfaultfds come from; `userfaultfd`: whether there is one.
//
// `threads`, `stop`, `sync`: threads that never end silently, ending them, and locks. `error`:
// errors.
#![deny(unsafe_code)]
// Some links lead to items of a feature: CI checks all links, with all features.
#![cfg_attr(
    not(all(feature = "kvm", feature = "vm-memory")),
    allow(rustdoc::broken_intra_doc_links)
)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod addresses;
mod after_loss;
mod agent_process;
mod backoff;
mod block;
mod blocks;
mod child;
mod client;
mod clones;
mod config;
mod continuation;
mod control;
mod deadline;
mod devices;
mod discard_queue;
mod discards;
pub mod error;
#[cfg(feature = "vm-memory")]
mod guest_memory;
mod heartbeat;
mod hooks;
mod jobs;
mod link;
mod mapped_file;
mod mapping_process;
mod memfd;
mod memory;
mod missing_pages;
mod ownership;
mod page_stream;
mod poison;
mod private_memory;
mod registration;
mod retry;
mod session;
mod spawn;
mod stop;
mod supervisor;
mod sync;
mod threads;
mod timeouts;
mod trackers;
pub mod tracking;
mod userfaultfd;
#[cfg(feature = "vm-memory")]
mod vm_memory_bitmap;
mod wakeup;
mod watched_writes;

pub use block::{BlockAdded, BlockSpec};
pub use blocks::MemoryRegion;
pub use client::{Client, WeakClient};
pub use clones::Base;
pub use config::Config;
pub use devices::Device;
pub use discards::Punch;
pub use error::{Error, PathError};
#[cfg(feature = "vm-memory")]
pub use guest_memory::GuestRegions;
pub use hooks::{Dispatch, HookChannel, HookError, HookThread, Hooks, StatePiece};
pub use jobs::Target;
pub use mapping_process::{MappingProcess, MappingProcessError, UserfaultPurpose};
pub use ownership::Ownership;
pub use page_stream::{PageStream, PageStreamReader, PageStreamWriter, Record};
pub use pageferry_protocol::control::clones::BaseBlock;
pub use pageferry_protocol::control::hook::GuestOrigin;
pub use pageferry_protocol::control::job::{
    Compression, Counters, HugePages, IncomingOptions, JobKind, JobStatus, MIN_BANDWIDTH, Mode,
    NonConvergence, NotUtf8, OutgoingOptions, Parameters, Phase, Placing, RestoreMode,
    RestoreOptions, ResumePolicy, RunState, SnapshotMode, SnapshotOptions,
};
pub use pageferry_protocol::control::reply::{ErrorCode, JobStarted};
pub use pageferry_protocol::control::request::BlockRange;
pub use pageferry_protocol::control::{AgentInfo, BlockInfo, Trackers};
pub use pageferry_protocol::invariants;
pub use pageferry_protocol::memory::PageRange;
pub use pageferry_protocol::shm::{DirtyLog, MappedBitmap};
pub use pageferry_protocol::stream::Kind;
pub use pageferry_protocol::userfault::{AddressRange, Userfaultfd};
pub use supervisor::Supervisor;
pub use tracking::{ClearPages, Tracker};
/// The version of `vm-memory` whose guest memory [`Client::add_guest_memory`] takes.
#[cfg(feature = "vm-memory")]
pub use vm_memory;
#[cfg(feature = "vm-memory")]
pub use vm_memory_bitmap::{AttachLog, LogBitmap, LogSlice};

/// Compiles the example of the crate's README.
#[cfg(all(doctest, feature = "vm-memory"))]
#[doc = include_str!("../README.md")]
struct Readme;
