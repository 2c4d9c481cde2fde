//! One connection to an agent, and the decision to give the agent up.

use crate::agent_process::AgentProcess;
use crate::memfd::Fence;
use crate::ownership::SharedOwnership;
use crate::sync::lock;
use rustix::net::{Shutdown, shutdown};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// One connection to an agent: what it takes to give the agent up from any thread, without a lock
/// that anybody holds while waiting.
///
/// # The end of an agent
///
/// Whoever finds out that the agent is lost calls [`Link::shut_down`] or [`Link::give_up`]. Both
/// first withdraw the agent's number from the fence word and then shut both sockets down, so an
/// agent that wakes up finds one or the other. An agent that hangs, or breaks the protocol, is
/// killed at once. One that closed the connection is about to end, as after SIGTERM, and is left to
/// do so; if it has not when it matters, [`Session::end_lost_agent`] kills it.
///
/// One agent is not killed: the one that the guest was given up to a migration with. The guest may
/// run at the destination, and get its memory from that agent. [`Ownership`] stays `Relinquished`
/// whether or not it lives, and it cannot send a commit that it has not sent yet, since it looks
/// at the fence word before. An agent that hung between that look and the commit is why
/// `take_by_force` and `reattach` kill it all the same, and wait for its end, before they go on.
///
/// [`Ownership`]: crate::Ownership
/// [`Session::end_lost_agent`]: crate::session::Session::end_lost_agent
#[derive(Debug)]
pub(crate) struct Link {
    /// Tells this connection from those before and after it. Also the number of its agent in the
    /// fence word; counted from 1.
    pub(crate) id: u64,
    control: OwnedFd,
    hooks: OwnedFd,
    fence: Arc<Fence>,
    ownership: Arc<SharedOwnership>,
    /// Known once the agent has answered the hello.
    process: OnceLock<Arc<AgentProcess>>,
    state: Mutex<LinkState>,
}

/// What was decided about an agent. It only ever moves on, from the first to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum LinkState {
    /// It acts for this VMM.
    Attached,
    /// It is lost: it hangs, broke the protocol, or closed the connection.
    GivenUp,
    /// The VMM decided to do without it, and sees to its process by itself. The VMM may come back
    /// to the same process by another connection: so no other thread kills it from now on.
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

    /// Gives the agent up: it does not act for this VMM any more, and both channels end for both
    /// sides. What came before can still be read.
    pub(crate) fn shut_down(&self) {
        self.advance(LinkState::GivenUp);
    }

    /// True if somebody gave the agent up.
    pub(crate) fn is_shut_down(&self) -> bool {
        *self.state() > LinkState::Attached
    }

    /// Gives up an agent that hangs or breaks the protocol, and kills it, unless the guest may
    /// depend on it elsewhere. Does not wait for its end.
    pub(crate) fn give_up(&self) {
        if self.advance(LinkState::GivenUp) != LinkState::Attached {
            return;
        }
        let Some(process) = self.process.get() else { return };
        if self.ownership.lock().may_run_elsewhere() {
            log::warn!(
                "agent process {} is given up, and not killed: the guest may run elsewhere",
                process.pid()
            );
            return;
        }
        let killed = {
            let state = self.state();
            if *state == LinkState::GivenUp { process.kill() } else { Ok(()) }
        };
        if let Err(why) = killed {
            log::warn!("agent process {} is given up, and lives on: {why}", process.pid());
        }
    }

    /// The VMM gives the agent up by its own decision, and sees to its process by itself. When this
    /// returns no other thread kills it.
    pub(crate) fn retire(&self) {
        self.advance(LinkState::Retired);
    }

    /// True if the agent is lost and lives on, since the guest may depend on it elsewhere, and the
    /// VMM has not decided otherwise.
    pub(crate) fn is_kept_alive(&self) -> bool {
        *self.state() < LinkState::Retired && self.ownership.lock().may_run_elsewhere()
    }

    /// Returns what was decided before.
    fn advance(&self, next: LinkState) -> LinkState {
        let mut state = self.state();
        let before = *state;
        *state = before.max(next);
        self.fence.word.revoke(self.id);
        // Fails only where there is no connection any more.
        let _ = shutdown(&self.control, Shutdown::Both);
        self.shut_down_hooks();
        before
    }

    /// Held for moments: nothing is waited for, asked or logged under it.
    fn state(&self) -> MutexGuard<'_, LinkState> {
        lock(&self.state)
    }

    /// The agent's process, if the agent has answered the hello.
    pub(crate) fn process(&self) -> Option<&Arc<AgentProcess>> {
        self.process.get()
    }

    /// Both sockets, to see when they end: control, and hooks.
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
