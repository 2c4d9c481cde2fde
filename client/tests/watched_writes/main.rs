// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes that wait for a background snapshot.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../support/mod.rs"]
mod support;

mod lost_agent;
mod scanning;
mod watching;

use pageferry_client::{BlockSpec, Client, MappedBitmap};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::hook_reply::decode_hook_reply;
use pageferry_protocol::userfault::{AddressRange, Events, Userfaultfd};
use rustix::event::PollFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::spawn;
use std::time::Duration;
use support::*;

pub(crate) const PAGES: u64 = 8;
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// Guest memory that is mapped.
#[derive(Clone)]
pub(crate) struct Ram {
    pub(crate) memory: Arc<OwnedFd>,
    /// The mapping, with any bitmap.
    pub(crate) words: Arc<MappedBitmap>,
}

impl Ram {
    pub(crate) fn new() -> Self {
        let memory = written(PAGES);
        let words = MappedBitmap::shared(memory.as_fd(), PAGES * PAGE * 8).unwrap();
        Self { memory: Arc::new(memory), words: Arc::new(words) }
    }

    pub(crate) fn spec(&self, id: u32) -> BlockSpec<'_> {
        let gpa = u64::from(id) << 20;
        BlockSpec { vmm_address: self.page(0).start, ..spec(id, gpa, &self.memory) }
    }

    pub(crate) fn all(&self) -> AddressRange {
        AddressRange { length: PAGES * PAGE, ..self.page(0) }
    }

    pub(crate) fn page(&self, page: u64) -> AddressRange {
        let start = self.words.storage().address_range().start as u64 + page * PAGE;
        AddressRange { start, length: PAGE }
    }

    pub(crate) fn write(&self, page: u64) {
        self.words.or_word(page * PAGE / 8, u64::MAX);
    }

    pub(crate) fn read(&self, page: u64) -> u64 {
        self.words.word(page * PAGE / 8)
    }

    /// Writes a page on its own thread. The receiver gets a message when the write is done.
    pub(crate) fn writer(&self, page: u64) -> Receiver<()> {
        let (ram, (say, done)) = (self.clone(), channel());
        spawn(move || {
            ram.write(page);
            let _ = say.send(());
        });
        done
    }
}

/// Adds a block while the test plays the agent.
pub(crate) fn add_block(client: &Client, agent: &mut FakeAgent, ram: &Ram, id: u32) {
    let (client, ram) = (client.clone(), ram.clone());
    let added = spawn(move || client.add_block(ram.spec(id)).unwrap());
    agent.accept_block();
    added.join().unwrap();
}

pub(crate) fn watch(agent: &mut FakeAgent) -> Userfaultfd {
    let mut answer = agent.hook_frame(&Hook::WatchWrites, Vec::new());
    assert_eq!(decode_hook_reply(&answer.body).unwrap(), Ok(()));
    assert_eq!(answer.fds.len(), 1);
    answer.fds.remove(0).into()
}

/// Waits for a fault, and checks that it is at this page.
pub(crate) fn assert_waits_at(uffd: &Userfaultfd, page: AddressRange) {
    assert_eq!(
        pageferry_protocol::control::socket::wait(uffd.as_fd(), PollFlags::IN, soon()),
        Ok(true),
        "a fault"
    );
    let mut events = Events::default();
    uffd.read_events(&mut events).unwrap();
    assert_eq!(events.faults().len(), 1);
    assert_eq!(events.faults()[0] / PAGE * PAGE, page.start);
}

/// A VMM with one block whose writes are watched. All of it is protected.
pub(crate) struct Watched {
    pub(crate) attached: Attached,
    pub(crate) ram: Ram,
    pub(crate) uffd: Userfaultfd,
}

impl Watched {
    /// `None` if there is no userfaultfd.
    pub(crate) fn new() -> Option<Self> {
        Self::over(Attached::new(Vmm::default()))
    }

    pub(crate) fn over(mut attached: Attached) -> Option<Self> {
        uffd()?;
        let ram = Ram::new();
        add_block(&attached.client, &mut attached.agent, &ram, 2);
        let uffd = watch(&mut attached.agent);
        uffd.protect(ram.all()).unwrap();
        Some(Self { attached, ram, uffd })
    }

    /// A writer that waits for the page.
    pub(crate) fn writer(&self, page: u64) -> Receiver<()> {
        let done = self.ram.writer(page);
        assert_waits_at(&self.uffd, self.ram.page(page));
        assert!(done.try_recv().is_err(), "it waits");
        done
    }

    pub(crate) fn assert_unwatched(&self) {
        self.ram.write(0);
        assert_eq!(
            self.uffd.protect(self.ram.all()),
            Err(rustix::io::Errno::NOENT),
            "how an agent finds it out"
        );
    }
}
