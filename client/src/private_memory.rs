// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory of a clone: a private mapping of the base of an image.
//!
//! What the guest writes is anonymous memory of this process, which no descriptor leads to. So only
//! this process can give it back, whoever discards or frees it: the client when there is no agent,
//! and a thread of the client for the agent ([`Service`]).
//!
//! A page that was given back must not show what the base has there, so it becomes a page of zeroes
//! ([`Userfaultfd::make_zero`]). That takes a userfaultfd with which the mapping is registered. A
//! mapping can be registered with only one, so this is the one of the job or the tracker that has
//! the mappings registered now ([`Registered`]), or else one of its own for a moment.

use crate::error::Error;
use crate::mapping_process::{UserfaultPurpose, Userfaults, open_own_pagemap};
use crate::registration::Registered;
use crate::sync::lock;
use crate::threads::{catch_panic, spawn_thread};
use pageferry_protocol::control::clones::{GiveBack, GiveBackTo};
use pageferry_protocol::error::chain;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::userfault::{AddressRange, RegisterMode, UserfaultError, Userfaultfd};
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

/// The private mapping of a block.
#[derive(Debug)]
pub(crate) struct PrivateMemory {
    name: String,
    address: u64,
    length: u64,
    userfaults: Arc<Userfaults>,
    registered: Arc<Registered>,
    /// For the moments in which nobody else has the mapping registered.
    own: Mutex<Option<Userfaultfd>>,
}

/// What the agent gets to read the memory of a clone: the `/proc/self/mem` and the
/// `/proc/self/pagemap` of this process.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) memory: OwnedFd,
    pub(crate) pagemap: OwnedFd,
}

impl View {
    /// Opens both.
    pub(crate) fn open() -> Result<Self, Error> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let memory = rustix::fs::open("/proc/self/mem", flags, Mode::empty());
        Ok(Self {
            memory: memory.map_err(Error::kernel("open /proc/self/mem"))?,
            pagemap: open_own_pagemap().map_err(Error::kernel("open /proc/self/pagemap"))?,
        })
    }
}

impl PrivateMemory {
    /// The mapping of `length` bytes at `address`.
    pub(crate) fn new(
        name: &str, (address, length): (u64, u64), userfaults: &Arc<Userfaults>,
        registered: &Arc<Registered>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            address,
            length,
            userfaults: Arc::clone(userfaults),
            registered: Arc::clone(registered),
            own: Mutex::default(),
        }
    }

    /// Finds out whether pages can be given back.
    pub(crate) fn check(&self) -> Result<(), Error> {
        self.userfaults.check(&[UserfaultPurpose::WriteTracking])
    }

    /// Gives pages back. This cannot fail (`discard-cannot-fail`): if the kernel refuses, the pages
    /// keep their content, which is stale.
    pub(crate) fn give_back(&self, request: GiveBack) -> Result<(), Errno> {
        let given_back = self.try_give_back(request);
        given_back.inspect_err(|errno| {
            let (name, pages) = (&self.name, request.pages);
            let (start, bytes) = (pages.offset(), pages.bytes());
            log::warn!("block {name}: cannot free {bytes:#x} bytes at {start:#x}: {errno}");
        })
    }

    fn try_give_back(&self, GiveBack { to, pages }: GiveBack) -> Result<(), Errno> {
        let range = AddressRange { start: self.address + pages.offset(), length: pages.bytes() };
        let give_back = |uffd: &Userfaultfd| match to {
            GiveBackTo::Base => uffd.drop_private(range),
            GiveBackTo::Zero => {
                let left = uffd.make_zero(range)?;
                if left > 0 {
                    let name = &self.name;
                    log::warn!("block {name}: the guest uses {left:#x} bytes that it gave back");
                }
                Ok(())
            }
        };
        self.registered.with_current(|current| {
            match current.map(give_back) {
                // The block was added after the others were registered.
                None | Some(Err(Errno::NOENT)) => {}
                Some(given_back) => return given_back,
            }
            let mut own = lock(&self.own);
            let uffd = match own.take() {
                Some(uffd) => uffd,
                None => self.open_own()?,
            };
            let registered = uffd.register(range, RegisterMode::WriteProtect);
            registered.map_err(|error| match error {
                UserfaultError::Register { source, .. } => source,
                _ => Errno::IO,
            })?;
            let given_back = give_back(&uffd);
            let ended = uffd.unregister(range);
            *own = Some(uffd);
            given_back.and(ended)
        })
    }

    fn open_own(&self) -> Result<Userfaultfd, Errno> {
        self.userfaults.open(UserfaultPurpose::WriteTracking).map_err(|error| {
            log::error!("block {}: {}", self.name, chain(&error));
            Errno::IO
        })
    }

    /// Makes zero of pages.
    pub(crate) fn punch(&self, pages: PageRange) {
        // What fails is logged.
        let _ = self.give_back(GiveBack { to: GiveBackTo::Zero, pages });
    }
}

/// A thread that gives pages back for an agent. It ends with the agent's end of the socket, or with
/// [`Service::end`].
#[derive(Debug)]
pub(crate) struct Service {
    socket: Arc<OwnedFd>,
    /// False once the agent is given up: what it has asked for then is not done any more.
    serves: Arc<Mutex<bool>>,
}

impl Service {
    /// Starts the thread. Returns the agent's end.
    pub(crate) fn start(memory: &Arc<PrivateMemory>) -> Result<(Self, OwnedFd), Error> {
        let (ours, agents) = crate::control::socket_pair()?;
        let service = Self { socket: Arc::new(ours), serves: Arc::new(Mutex::new(true)) };
        let (memory, socket, serves) =
            (Arc::clone(memory), Arc::clone(&service.socket), Arc::clone(&service.serves));
        let run = move || {
            if let Err(panic) = catch_panic(|| serve(&memory, &socket, &serves)) {
                log::error!("the thread that gives memory back panicked: {panic}");
                // Whoever waits for an answer goes on.
                let _ = shutdown(&*socket, Shutdown::Both);
            }
        };
        spawn_thread("pageferry-clone", run)?;
        Ok((service, agents))
    }

    /// The agent is given up. When this returns, nothing is given back for it any more.
    pub(crate) fn end(&self) {
        *lock(&self.serves) = false;
        let _ = shutdown(&*self.socket, Shutdown::Both);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.end();
    }
}

fn serve(memory: &PrivateMemory, socket: &OwnedFd, serves: &Mutex<bool>) {
    let mut request = [0; GiveBack::SIZE];
    while let Some(()) = receive(socket, &mut request) {
        let request = match GiveBack::decode(&request, memory.length) {
            Ok(request) => request,
            Err(error) => {
                log::warn!("the agent asks to give memory back: {error}");
                break;
            }
        };
        let serves = lock(serves);
        if !*serves {
            return;
        }
        let given_back = memory.give_back(request);
        drop(serves);
        let errno = given_back.err().map_or(0, Errno::raw_os_error);
        // The agent may be gone: that raises no SIGPIPE, whatever the VMM does with signals.
        let answer = errno.to_le_bytes();
        if retry_on_intr(|| send(socket, &answer, SendFlags::NOSIGNAL)).is_err() {
            break;
        }
    }
    let _ = shutdown(socket, Shutdown::Both);
}

/// Receives a whole request. `None` if there is none any more.
fn receive(socket: &OwnedFd, request: &mut [u8]) -> Option<()> {
    let mut done = 0;
    while done < request.len() {
        match rustix::io::read(socket, &mut request[done..]) {
            Ok(0) => return None,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
    Some(())
}
