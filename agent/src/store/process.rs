// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the service of stores runs.
//!
//! - For an agent in a sandbox: in a process that its opener starts when it is first needed, and
//!   again if it died. It has the agent's environment, and serves only the stores that the agent's
//!   options name (`--store`).
//! - For any other process, such as an operator's command: on threads of its own.

use super::cache::Cache;
use super::error::StoreError;
use super::service::Service;
use crate::inherited::close_inherited;
use crate::opener;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};

/// The hidden argument of an agent that is to be a service of stores.
const ARGUMENT: &str = "--store-service";

/// The cache of this process alone.
static PRIVATE: OnceLock<PathBuf> = OnceLock::new();

/// From now on this process reads all from the stores, and nothing from the cache of this machine.
/// Its own cache is in a new folder, which is removed with what this returns.
///
/// # Errors
/// If the folder cannot be made.
pub fn read_past_cache() -> Result<PrivateCache, StoreError> {
    let folder = Cache::of_environment()?.private_folder()?;
    Ok(PrivateCache(PRIVATE.get_or_init(|| folder).clone()))
}

/// A folder that is removed with this.
#[derive(Debug)]
pub struct PrivateCache(PathBuf);

impl Drop for PrivateCache {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            log::warn!("{} stays: {error}", self.0.display());
        }
    }
}

/// A socket to a service.
///
/// # Errors
/// If there can be none.
pub(super) fn connect() -> Result<OwnedFd, StoreError> {
    if opener::is_asked() {
        return opener::store_service()
            .map_err(|errno| StoreError::cache("start the service of stores", errno));
    }
    let failed = |error| StoreError::cache("start the service of stores", error);
    let cache = match PRIVATE.get() {
        Some(folder) => Cache::new(folder.clone(), u64::MAX)?,
        None => Cache::of_environment()?,
    };
    let service = Service::new(None, cache)?;
    let (ours, services) = pair().map_err(failed)?;
    let serve = move || {
        if let Err(error) = service.serve(services) {
            log::warn!("the service of stores has ended: {error}");
        }
    };
    std::thread::Builder::new().name("pageferry-store".into()).spawn(serve).map_err(failed)?;
    Ok(ours)
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// Starts a process with a service for names that begin with one of `stores`. Returns it, and a
/// socket to it. To be called by an opener.
///
/// # Errors
/// If the program cannot be executed.
pub(crate) fn start(stores: &[String]) -> io::Result<(Child, OwnedFd)> {
    let (ours, services) = pair()?;
    let mut command = Command::new("/proc/self/exe");
    let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.iter().position(|argument| argument == "agent") {
        Some(at) => arguments.truncate(at + 1),
        None => arguments = vec!["agent".into()],
    }
    command.arg0("pageferry").args(arguments).arg(ARGUMENT);
    stores.iter().for_each(|store| {
        command.args(["--store", store]);
    });
    let child = command.stdin(Stdio::from(services)).stdout(Stdio::null()).spawn()?;
    Ok((child, ours))
}

/// Serves the agent that has the other end of standard input.
///
/// # Errors
/// If there can be no cache, or standard input is no socket of an agent.
pub fn run(stores: Vec<String>) -> io::Result<()> {
    close_inherited()?;
    // These are sent to all processes of a terminal or of a service. The agent may still need its
    // store while it ends.
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::default())?;
    }
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let cache = Cache::of_environment().map_err(io::Error::other)?;
    Service::new(Some(stores), cache).map_err(io::Error::other)?.serve(socket)
}
