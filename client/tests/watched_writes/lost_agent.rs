// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents that die or hang while writes wait: the writes continue.

use crate::support::*;
use crate::*;
use pageferry_client::{Config, Dispatch, HookError, Hooks, Ownership, RunState, StatePiece};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::request::MAX_RANGES;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

#[test]
fn dead_agent_releases_waiting_writers() {
    let Some(watched) = Watched::new() else { return };
    let done = [watched.writer(1), watched.writer(6)];
    let Watched { attached, ram, uffd } = watched;
    let (client, vmm) = attached.lose_agent();
    for done in done {
        done.recv_timeout(SOON).unwrap();
    }
    assert_eq!((ram.read(1), ram.read(6)), (u64::MAX, u64::MAX));
    assert_eq!(uffd.protect(ram.all()), Err(rustix::io::Errno::NOENT));
    assert_eq!(
        (client.ownership(), vmm.calls()),
        (
            Ownership::Ours,
            vec!["watched".to_owned(), "unwatched".to_owned(), "lost Ours".to_owned()]
        ),
        "the guest keeps running"
    );
}

/// A VMM that writes guest memory when it resumes its guest.
struct Writes(Ram);

impl Hooks for Writes {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }
    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), HookError> {
        self.0.write(2);
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(Vec::new())
    }
    fn load_state(&mut self, _: Vec<StatePiece>) -> Result<(), HookError> {
        Ok(())
    }
}

/// Makes the hook channel's own thread wait to write a page. Then `lose` makes the agent die or
/// hang.
fn hook_that_waits(impatience: Config, lose: impl FnOnce(FakeAgent) -> Option<FakeAgent>) {
    if uffd().is_none() {
        return;
    }
    let (client, channel, agent) = client_with(impatience, MAX_RANGES, |agent| agent);
    let mut agent = agent.join().unwrap();
    let ram = Ram::new();
    let thread = channel.spawn(Writes(ram.clone())).unwrap();
    add_block(&client, &mut agent, &ram, 2);
    assert_eq!(agent.hook(&Hook::Pause), Ok(()));
    let uffd = watch(&mut agent);
    uffd.protect(ram.all()).unwrap();
    agent.send_hook(&Hook::Resume { force: false, paused: false }, Vec::new());
    assert_waits_at(&uffd, ram.page(2));
    let _agent = lose(agent);
    let (say, ended) = channel_of_end(thread);
    ended.recv_timeout(SOON).expect("the hook to return and the channel to end");
    say.join().unwrap();
    assert_eq!(ram.read(2), u64::MAX);
    assert_lost(client.status());
    assert_eq!(client.ownership(), Ownership::Ours);
}

fn channel_of_end<H: Send + 'static>(
    thread: pageferry_client::HookThread<H>,
) -> (JoinHandle<()>, Receiver<()>) {
    let (say, ended) = channel();
    let joining = spawn(move || {
        thread.join();
        let _ = say.send(());
    });
    (joining, ended)
}

#[test]
fn waiting_hook_is_released_when_the_agent_dies() {
    hook_that_waits(quiet(), |agent| {
        drop(agent);
        None
    });
}

#[test]
fn waiting_hook_is_released_when_the_agent_hangs() {
    // The agent keeps its sockets open, and answers no heartbeat.
    hook_that_waits(impatient(), Some);
}

#[test]
fn waiting_hook_is_released_when_the_hook_socket_closes() {
    hook_that_waits(quiet(), |agent| {
        agent.hooks.shutdown();
        Some(agent)
    });
}

#[test]
fn request_that_hangs_does_not_hide_the_death_of_the_agent() {
    let Some(watched) = Watched::new() else { return };
    let done = watched.writer(1);
    let Watched { attached, .. } = watched;
    // This request holds the session's lock and waits for a reply that does not come.
    let asking = attached.client.clone();
    let asked = spawn(move || asking.status());
    let mut agent = attached.agent;
    agent.request().unwrap();
    drop(agent);
    done.recv_timeout(SOON).unwrap();
    assert_lost(asked.join().unwrap());
    attached.thread.join();
}

#[test]
fn next_agent_watches_the_same_memory() {
    let Some(watched) = Watched::new() else { return };
    let done = watched.writer(1);
    let Watched { attached, ram, uffd: old } = watched;
    let (ours, agents) = UnixStream::pair().unwrap();
    let second = spawn(move || {
        let mut agent = FakeAgent::shake_hands(agents.into(), MAX_RANGES);
        agent.accept_block();
        agent
    });
    let channel = attached.client.reattach_socket(ours.into()).unwrap();
    done.recv_timeout(SOON).unwrap();
    assert_eq!(old.protect(ram.all()), Err(rustix::io::Errno::NOENT));
    drop(old);
    let mut attached =
        Attached::over(attached.client, channel, second.join().unwrap(), Vmm::default());
    let uffd = watch(&mut attached.agent);
    uffd.protect(ram.all()).unwrap();
    let done = ram.writer(1);
    assert_waits_at(&uffd, ram.page(1));
    attached.lose_agent();
    done.recv_timeout(SOON).unwrap();
}

#[test]
fn the_end_of_an_agent_keeps_the_watch_of_the_next_one() {
    if uffd().is_none() {
        return;
    }
    let (client, mut old, mut first) = connected();
    let ram = Ram::new();
    add_block(&client, &mut first, &ram, 2);
    let mut vmm = Vmm::default();
    first.send_hook(&Hook::WatchWrites, Vec::new());
    assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Open);
    let (ours, agents) = UnixStream::pair().unwrap();
    let second = spawn(move || {
        let mut agent = FakeAgent::shake_hands(agents.into(), MAX_RANGES);
        agent.accept_block();
        agent
    });
    let mut new = client.reattach_socket(ours.into()).unwrap();
    let mut second = second.join().unwrap();
    second.send_hook(&Hook::WatchWrites, Vec::new());
    assert_eq!(new.dispatch(&mut vmm).unwrap(), Dispatch::Open);
    // The old channel notices late that it was replaced.
    assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(vmm.calls(), ["watched", "watched", "lost Ours"]);
    drop(second);
    assert_eq!(new.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(vmm.calls(), ["unwatched", "lost Ours"]);
}

#[test]
fn agent_that_hangs_while_writes_wait_gets_only_stall_timeout() {
    // With the request timeout alone, a writer would wait for two minutes.
    let config = Config {
        request_timeout: Duration::from_secs(120),
        stall_timeout: Duration::from_millis(500),
        ..quiet()
    };
    let (client, channel, agent) = client_with(config, MAX_RANGES, |agent| agent);
    let attached = Attached::over(client, channel, agent.join().unwrap(), Vmm::default());
    let Some(watched) = Watched::over(attached) else { return };
    let done = watched.writer(1);
    done.recv_timeout(SOON).expect("the writer to continue");
    watched.assert_unwatched();
    let Watched { attached, .. } = watched;
    let Attached { client, agent, thread, .. } = attached;
    assert_lost(client.status());
    assert_eq!(thread.join().calls().last().unwrap(), "lost Ours");
    drop(agent);
}
