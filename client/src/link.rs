// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One connection to an agent, and the decision to give the agent up.

use crate::agent_process::AgentProcess;
use crate::memfd::Fence;
use crate::ownership::SharedOwnership;
use crate::private_memory::Service;
use crate::sync::lock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// One connection to an agent. It holds what is needed to give the agent up from any thread,
/// without a lock that a thread holds while it waits.
///
/// # The end of an agent
///
/// A thread that finds the agent lost calls [`Link::shut_down`] or [`Link::give_up`]. Both first
/// withdraw the number of the agent from the fence word, and then shut both sockets down. An agent
/// that hangs and wakes up finds one or the other.
///
/// - An agent that hangs or breaks the protocol is killed at once.
/// - An agent that closed the connection is about to exit, for example after SIGTERM. It gets the
///   time for that. If it has not exited when that matters, [`Session::end_lost_agent`] kills it.
/// - One agent is not killed: the agent to which the guest was relinquished. The guest may run at
///   the destination and get its memory from this agent. This is safe. [`Ownership`] stays
///   `Relinquished` whether or not the agent lives, and the agent cannot send a new commit, since
///   it checks the fence word before.
///
/// An agent may hang between that check and the commit. So `take_by_force` and `reattach` kill even
/// this agent and wait for its exit before they continue.
///
/// [`Ownership`]: crate::Ownership
/// [`Session::end_lost_agent`]: crate::session::Session::end_lost_agent
#[derive(Debug)]
pub(crate) struct Link {
    /// Number of the connection, and of its agent in the fence word; counted from 1.
    pub(crate) id: u64,
    control: OwnedFd,
    hooks: OwnedFd,
    fence: Arc<Fence>,
    ownership: Arc<SharedOwnership>,
    /// Known once the agent has answered the hello.
    process: OnceLock<Arc<AgentProcess>>,
    state: Mutex<LinkState>,
    /// Give memory of clones back for this agent, by block. Never locked while the state is.
    services: Mutex<HashMap<u32, Service>>,
}

/// What was decided about an agent. It only moves forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum LinkState {
    /// The agent acts for this VMM.
    Attached,
    /// The agent is lost: it hangs, broke the protocol, or closed the connection.
    GivenUp,
    /// The VMM has decided to do without the agent, and its caller sees to the process. The VMM may
    /// connect to the same process again, so from now on no other thread may kill it.
    Retired,
}

impl Link {
    /// A new connection: duplicates of its control socket and its hook socket.
    pub(crate) fn new(
        control: OwnedFd, hooks: OwnedFd, fence: &Arc<Fence>, ownership: &Arc<SharedOwnership>,
    ) -> Self {
        static LINKS: AtomicU64 = AtomicU64::new(1);
        Self {
            id: LINKS.fetch_add(1, Ordering::Relaxed),
            control,
            hooks,
            fence: Arc::clone(fence),
            ownership: Arc::clone(ownership),
            process: OnceLock::new(),
            state: Mutex::new(LinkState::Attached),
            services: Mutex::default(),
        }
    }

    /// The agent has answered the hello: this is its process.
    pub(crate) fn set_process(&self, process: AgentProcess) {
        // Set once, since a hello is sent once.
        let _ = self.process.set(Arc::new(process));
    }

    /// From now on the agent acts for this VMM. No other agent may be alive that did before.
    pub(crate) fn admit(&self) {
        self.ownership.lock().admit(self.id);
        self.fence.word.admit(self.id);
    }

    /// The file of the fence word, for the agent.
    pub(crate) fn fence_fd(&self) -> BorrowedFd<'_> {
        self.fence.fd.as_fd()
    }

    /// Gives the agent up: it no longer acts for this VMM, and both channels end for both sides.
    /// What was sent before can still be read.
    pub(crate) fn shut_down(&self) {
        self.advance(LinkState::GivenUp);
    }

    /// True if the agent was given up.
    pub(crate) fn is_shut_down(&self) -> bool {
        *self.state() > LinkState::Attached
    }

    /// Gives up an agent that hangs or breaks the protocol, and kills it, unless the guest may run
    /// elsewhere and depend on it. Does not wait for its exit.
    pub(crate) fn give_up(&self) {
        if self.advance(LinkState::GivenUp) != LinkState::Attached {
            return;
        }
        let Some(process) = self.process.get() else { return };
        if self.ownership.lock().may_run_elsewhere() {
            log::warn!(
                "agent process {} is given up but not killed: the guest may run elsewhere and depend on it",
                process.pid()
            );
            return;
        }
        let killed = {
            let state = self.state();
            if *state == LinkState::GivenUp { process.kill() } else { Ok(()) }
        };
        if let Err(why) = killed {
            log::warn!("agent process {} is given up but still lives: {why}", process.pid());
        }
    }

    /// The VMM gives the agent up by its own decision. When this returns, no other thread kills the
    /// process.
    pub(crate) fn retire(&self) {
        self.advance(LinkState::Retired);
    }

    /// True if the agent is not to be killed: the guest may run elsewhere and depend on it, and the
    /// VMM has not retired it.
    pub(crate) fn is_kept_alive(&self) -> bool {
        *self.state() < LinkState::Retired && self.ownership.lock().may_run_elsewhere()
    }

    /// Moves to `next` and shuts the connection down. Returns the state before.
    fn advance(&self, next: LinkState) -> LinkState {
        let mut state = self.state();
        let before = *state;
        *state = before.max(next);
        self.fence.word.revoke(self.id);
        // Fails only if the connection has ended already.
        let _ = shutdown(&self.control, Shutdown::Both);
        self.shut_down_hooks();
        drop(state);
        // What the agent has asked for and was not done is not done any more.
        lock(&self.services).clear();
        before
    }

    /// A thread that serves this agent, until it is given up.
    pub(crate) fn add_service(&self, block: u32, service: Service) {
        let mut services = lock(&self.services);
        // Otherwise it ends here.
        if !self.is_shut_down() {
            services.insert(block, service);
        }
    }

    /// The agent does not have this block any more.
    pub(crate) fn end_service(&self, block: u32) {
        lock(&self.services).remove(&block);
    }

    /// What became of an agent whose connection has ended, in words; `None` if it has not ended.
    pub(crate) fn end_in_words(&self) -> Option<String> {
        // The VMM may have closed the other one.
        let mut polled = [PollFd::new(&self.control, PollFlags::RDHUP)];
        match poll(&mut polled, Some(&Timespec::default())) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(self.process().map_or_else(
                || "it closed the connection".to_owned(),
                |process| process.how_it_ended(),
            )),
        }
    }

    /// Held for a moment only: no thread waits, sends or logs while it holds this lock.
    fn state(&self) -> MutexGuard<'_, LinkState> {
        lock(&self.state)
    }

    /// The agent's process, if the agent has answered the hello.
    pub(crate) fn process(&self) -> Option<&Arc<AgentProcess>> {
        self.process.get()
    }

    /// Both sockets, control and hooks, to see when they end.
    pub(crate) fn sockets(&self) -> [BorrowedFd<'_>; 2] {
        [self.control.as_fd(), self.hooks.as_fd()]
    }

    /// A connection to nobody, and the far ends of its channels.
    #[cfg(test)]
    pub(crate) fn for_test() -> (Self, [OwnedFd; 2]) {
        let pair = || std::os::unix::net::UnixStream::pair().unwrap();
        let ((control, far_control), (hooks, far_hooks)) = (pair(), pair());
        let (fence, ownership) = (Fence::new().unwrap(), SharedOwnership::new());
        let link = Self::new(control.into(), hooks.into(), &Arc::new(fence), &Arc::new(ownership));
        (link, [far_control.into(), far_hooks.into()])
    }

    /// Ends the hook channel for both sides.
    pub(crate) fn shut_down_hooks(&self) {
        let _ = shutdown(&self.hooks, Shutdown::Both);
    }
}
