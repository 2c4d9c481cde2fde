// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents one after the other: a lost agent is replaced by the next.
//!
//! One thread runs the hook channel of the agent. When the agent is lost, the channel has undone
//! what the agent began ([`hooks`](crate::hooks)). The thread then starts the next agent, or
//! connects to it, attaches it, and continues with its hook channel and the same hooks.
//!
//! The thread holds no client while it runs a channel or waits. So the last client can be dropped
//! at any time, which ends the channel or the wait, and the thread.
//!
//! [`after_loss`](crate::after_loss) decides in which states the thread starts an agent by itself.

use crate::after_loss::AfterLoss;
use crate::backoff::Backoff;
use crate::child;
use crate::client::{Client, WeakClient};
use crate::config::Config;
use crate::continuation::Replacer;
use crate::error::Error;
use crate::hooks::{HookChannel, Hooks, tell_attached};
use crate::link::Link;
use crate::sync::lock;
use crate::threads::{catch_panic, join, spawn_thread};
use crate::wakeup::Wakeup;
use pageferry_protocol::error::chain;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// As good as for ever, since what matters wakes the thread.
const LONG: Duration = Duration::from_secs(3600);

/// A VMM's agents: starts an agent, or connects to one, and runs its hooks. When the agent is lost,
/// does the same with the next.
///
/// ```no_run
/// # use pageferry_client::{Config, Hooks, Supervisor};
/// # fn vmm(hooks: impl Hooks + 'static) -> Result<(), pageferry_client::Error> {
/// let command = || {
///     let mut command = std::process::Command::new("pageferry");
///     command.args(["agent", "--stdin"]);
///     command
/// };
/// let (client, supervisor) = Supervisor::spawn(command, Config::default(), hooks)?;
/// // Add the memory and declare the trackers, once: every later agent gets them, too.
///
/// // At the end of the VMM:
/// drop(client);
/// let hooks = supervisor.join();
/// # Ok(()) }
/// ```
///
/// An agent that others start, such as systemd, listens at a path. A supervisor connects to it with
/// [`Supervisor::connect`], and connects again when it is lost. In what follows, *started* then
/// means *connected*.
///
/// # When the next agent is started
///
/// The guest does not wait for it, unless its memory is missing: whatever the lost agent began is
/// undone, discards and populates continue, and a guest that was paused runs again. The job of the
/// lost agent is lost, unless the table says otherwise. Nobody starts it again but the VMM or its
/// operator.
///
/// | when the agent is lost | then |
/// | --- | --- |
/// | the guest is ours, and all its memory is here | the next agent is started. That includes a migration before its commit, and a snapshot |
/// | the guest runs, and memory is still to come, by a lazy restore or a postcopy | the next agent is started at once, and continues the job of the lost one. Until then the guest waits where it touches missing memory. If there is no such agent within [`Config::continue_within`], the memory is [lost](Hooks::memory_lost) |
/// | a guest is awaited | the next agent is started. What was under way is lost; the VMM starts to wait or to restore again ([`Hooks::agent_attached`]) |
/// | the guest was given up ([`Relinquished`](crate::Ownership::Relinquished)) | none. The lost agent may still send memory that the guest needs elsewhere, and the next would end it. The operator looks at both sides, and then the VMM calls [`Supervisor::replace_agent`] and [`Client::recover`], or [`Client::take_by_force`], after which the next agent is started |
/// | the guest has left ([`Gone`](crate::Ownership::Gone)) | none. For another guest call [`Supervisor::replace_agent`] |
/// | memory of the guest is [lost](Hooks::memory_lost) | none: there is no guest to serve. To await another guest call [`Supervisor::replace_agent`] |
/// | the VMM called [`Client::end_agent`] | none until [`Supervisor::replace_agent`] or [`Client::take_by_force`] |
/// | the VMM attached an agent itself ([`Client::reattach`], [`Client::respawn`]) | none: the VMM serves the hooks of that agent itself, until [`Supervisor::replace_agent`] |
///
/// Before each attempt there is a pause. It is 100 ms at first, and doubles to 5 s until an agent
/// has served for 5 s. Attempts are not limited in number. Each is logged.
///
/// Between the loss of one agent and the next, calls of the client that need an agent return
/// [`Error::AgentLost`].
#[derive(Debug)]
pub struct Supervisor<H> {
    shared: Arc<Shared>,
    thread: JoinHandle<H>,
}

/// What the thread and [`Supervisor::replace_agent`] share.
struct Shared {
    client: WeakClient,
    /// Wakes the thread while it waits: when the last client is dropped, and when a client or
    /// `next` has changed.
    wakeup: Arc<Wakeup>,
    /// Locked while an agent is started, so that only one is started at a time.
    source: Mutex<Source>,
    /// An agent that was attached, and whose channel the thread is to run next.
    next: Mutex<Option<Agent>>,
    /// How long the last agent may take to exit.
    exit_timeout: Duration,
}

/// Where the next agent comes from.
enum Source {
    /// It is a child that this command starts.
    Command(Box<dyn FnMut() -> Command + Send>),
    /// It listens at this path.
    Path(PathBuf),
}

/// An agent that is attached.
#[derive(Debug)]
struct Agent {
    channel: HookChannel,
    /// If it is a child.
    process: Option<Child>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("next", &self.next).finish_non_exhaustive()
    }
}

impl<H: Hooks + 'static> Supervisor<H> {
    /// Starts an agent, connects to it as [`Client::spawn`] does, and starts the thread
    /// `pageferry-hooks`, which calls `hooks` and replaces lost agents. `command` makes the command
    /// of each agent, such as `pageferry agent --stdin`.
    ///
    /// # Errors
    /// As [`Client::spawn`], for the first agent; or if the thread cannot be started.
    pub fn spawn(
        mut command: impl FnMut() -> Command + Send + 'static, config: Config, hooks: H,
    ) -> Result<(Client, Self), Error> {
        let exit_timeout = config.request_timeout;
        let (client, channel, process) = Client::spawn(&mut command(), config)?;
        let agent = Agent { channel, process: Some(process) };
        Self::start(client, agent, Source::Command(Box::new(command)), exit_timeout, hooks)
    }

    /// Connects to an agent that listens at `path`, as [`Client::connect`] does, and starts the
    /// thread `pageferry-hooks`, which calls `hooks` and connects again when the agent is lost.
    ///
    /// # Errors
    /// As [`Client::connect`], for the first agent; or if the thread cannot be started.
    pub fn connect(
        path: impl Into<PathBuf>, config: Config, hooks: H,
    ) -> Result<(Client, Self), Error> {
        let (path, exit_timeout) = (path.into(), config.request_timeout);
        let (client, channel) = Client::connect(&path, config)?;
        let agent = Agent { channel, process: None };
        Self::start(client, agent, Source::Path(path), exit_timeout, hooks)
    }

    fn start(
        client: Client, first: Agent, source: Source, exit_timeout: Duration, hooks: H,
    ) -> Result<(Client, Self), Error> {
        let shared = Arc::new(Shared {
            client: client.downgrade(),
            wakeup: Arc::clone(client.wakeup()),
            exit_timeout,
            source: Mutex::new(source),
            next: Mutex::new(Some(first)),
        });
        let replacing = Arc::downgrade(&shared);
        client.missing().replace_by(Replacer {
            replace: Box::new(move |link| {
                let Some(shared) = replacing.upgrade() else { return Ok(()) };
                // A panic of the VMM's closure counts as an attempt that failed.
                catch_panic(|| shared.replace_lost(link).map_err(|error| chain(&error)))?
            }),
            wakeup: Arc::clone(&shared.wakeup),
            limit: client.continue_within(),
        });
        let supervised = Arc::clone(&shared);
        match spawn_thread("pageferry-hooks", move || supervise(&supervised, hooks)) {
            Ok(thread) => Ok((client, Self { shared, thread })),
            Err(error) => {
                // The agent ends with its client.
                drop(client);
                if let Some(process) = lock(&shared.next).take().and_then(|agent| agent.process) {
                    child::end(process, Duration::ZERO);
                }
                Err(error)
            }
        }
    }

    /// Starts another agent now, in place of the current one or of a lost one, whatever the state
    /// is: see the table above. The current agent is given up and killed, as
    /// [`Client::reattach_socket`] says. May be called in a hook.
    ///
    /// # Errors
    /// As [`Client::respawn`] or [`Client::reattach`], or [`Error::AgentLost`] if there is no
    /// client any more.
    pub fn replace_agent(&self) -> Result<(), Error> {
        let reason = "the last client was dropped".to_owned();
        let client = self.shared.client.upgrade().ok_or(Error::AgentLost { reason })?;
        let mut source = lock(&self.shared.source);
        self.shared.attach(&client, &mut source)
    }

    /// True if the last client was dropped and the thread ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the end of the thread, and returns the hooks. Drop the client first.
    ///
    /// A child exits by itself when the last client is dropped; one that has not within
    /// [`Config::request_timeout`] hangs and is killed. But if the guest was given up, this does
    /// not wait for the agent, and nobody kills it: the guest may need it elsewhere.
    pub fn join(self) -> H {
        join(self.thread)
    }
}

impl Shared {
    /// Starts an agent, or connects to one, and attaches it. The thread runs its channel next.
    fn attach(&self, client: &Client, source: &mut Source) -> Result<(), Error> {
        let (channel, process) = match source {
            Source::Command(command) => {
                let (channel, process) = client.respawn(&mut command())?;
                (channel, Some(process))
            }
            Source::Path(path) => (client.reattach(path)?, None),
        };
        log::info!("agent process {} serves this VM now", client.agent_pid());
        let unused = lock(&self.next).replace(Agent { channel, process });
        self.wakeup.wake();
        if let Some(process) = unused.and_then(|agent| agent.process) {
            child::reap(process);
        }
        Ok(())
    }

    /// Attaches an agent in place of the one of connection `link`, unless the state has changed
    /// meanwhile.
    fn replace_lost(&self, link: u64) -> Result<(), Error> {
        let mut source = lock(&self.source);
        let Some(client) = self.client.upgrade() else { return Ok(()) };
        let is_wanted = matches!(client.after_loss(link), AfterLoss::Replace | AfterLoss::Await);
        // The thread may not have come to the agent that is lost now: it may wait for a page.
        let is_other = |agent: &Agent| agent.channel.link().id != link;
        if lock(&self.next).as_ref().is_some_and(is_other) || !is_wanted {
            return Ok(());
        }
        self.attach(&client, &mut source)
    }

    /// The agent whose channel is run next, after the one of connection `link` is lost. `None` when
    /// the last client is dropped.
    ///
    /// `tell_loss` tells the VMM if memory is lost by now.
    fn wait_for_next(
        &self, link: &Link, backoff: &mut Backoff, mut tell_loss: impl FnMut(),
    ) -> Option<Agent> {
        let (mut attempts, mut reason) = (0u64, None);
        loop {
            let seen = self.wakeup.count();
            tell_loss();
            // Locked: another thread may be attaching an agent, which is the next one then.
            let attaching = lock(&self.source);
            if let Some(agent) = lock(&self.next).take() {
                return Some(agent);
            }
            let decided = self.client.upgrade()?.after_loss(link.id);
            drop(attaching);
            match decided {
                AfterLoss::Await => self.wakeup.wait(seen, LONG),
                AfterLoss::Replace => {
                    attempts += 1;
                    let pause = backoff.pause();
                    log::warn!(
                        "the agent of this VM is lost: {}; in {pause:?} another is started (attempt {attempts})",
                        link.end_in_words().unwrap_or_default()
                    );
                    self.pause(pause);
                    // A panic of the VMM's closure counts as an attempt that failed.
                    let outcome = catch_panic(|| self.replace_lost(link.id).map_err(|e| chain(&e)));
                    if let Err(why) = outcome.and_then(|outcome| outcome) {
                        log::warn!("no agent for this VM yet (attempt {attempts}): {why}");
                    }
                }
                AfterLoss::Stay(why) => {
                    if reason.replace(why) != Some(why) {
                        log::warn!(
                            "the agent of this VM is lost: {}; no other is started by itself: {why}",
                            link.end_in_words().unwrap_or_default()
                        );
                    }
                    self.wakeup.wait(seen, LONG);
                }
            }
        }
    }

    /// Waits before an attempt. Ends early if there is nothing to attempt any more.
    fn pause(&self, time: Duration) {
        let end = Instant::now() + time;
        loop {
            let seen = self.wakeup.count();
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.client.is_alive() || lock(&self.next).is_some() {
                return;
            }
            self.wakeup.wait(seen, left);
        }
    }
}

/// Runs the channel of one agent after the other, until the last client is dropped.
fn supervise<H: Hooks>(shared: &Shared, mut hooks: H) -> H {
    let mut backoff = Backoff::default();
    let mut next = lock(&shared.next).take();
    while let Some(Agent { channel, process }) = next {
        let (link, ownership, loss) = (channel.link(), channel.ownership(), channel.loss());
        let attached = Instant::now();
        if let Err(error) = channel.run(&mut hooks) {
            log::error!("{}", chain(&error));
        }
        backoff.served(attached.elapsed());
        // Before it is reaped: nobody can tell after that. The next error of the client says it.
        let _ = link.end_in_words();
        let may_be_needed = shared.client.is_alive() || ownership.lock().may_run_elsewhere();
        match process {
            Some(process) if may_be_needed => child::reap(process),
            Some(process) => child::end(process, shared.exit_timeout),
            None => {}
        }
        next = shared.wait_for_next(&link, &mut backoff, || loss.tell(&mut hooks));
        if next.is_some() {
            tell_attached(&mut hooks);
        }
    }
    hooks
}
