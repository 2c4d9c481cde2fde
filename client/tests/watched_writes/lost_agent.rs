// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A write goes on if the agent that watches it dies or hangs.

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
fn dead_agent_lets_go_who_waits_to_write() {
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
        "it runs on"
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

/// Has the hook channel's own thread wait for a page, on an agent that is `lost` then.
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
fn hook_that_waits_to_write_is_let_go_when_the_agent_dies() {
    hook_that_waits(quiet(), |agent| {
        drop(agent);
        None
    });
}

#[test]
fn hook_that_waits_to_write_is_let_go_when_the_agent_hangs() {
    // It holds its sockets, and answers no sign of life.
    hook_that_waits(impatient(), Some);
}

#[test]
fn hook_that_waits_to_write_is_let_go_when_the_agent_gives_up_its_hooks() {
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
    // Holds the session's lock, and waits for an answer that does not come.
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
fn new_agent_watches_what_the_last_one_did() {
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
fn the_end_of_an_agent_lets_nothing_go_that_stands_still_for_the_next_one() {
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
    // It comes late.
    assert_eq!(old.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(vmm.calls(), ["watched", "watched", "lost Ours"]);
    drop(second);
    assert_eq!(new.dispatch(&mut vmm).unwrap(), Dispatch::Closed);
    assert_eq!(vmm.calls(), ["unwatched", "lost Ours"]);
}

#[test]
fn agent_that_hangs_while_writes_wait_is_given_far_less_time_than_any_other() {
    // A writer would wait for two minutes.
    let config = Config {
        request_timeout: Duration::from_secs(120),
        stall_timeout: Duration::from_millis(500),
        ..quiet()
    };
    let (client, channel, agent) = client_with(config, MAX_RANGES, |agent| agent);
    let attached = Attached::over(client, channel, agent.join().unwrap(), Vmm::default());
    let Some(watched) = Watched::over(attached) else { return };
    let done = watched.writer(1);
    done.recv_timeout(SOON).expect("the writer to go on");
    watched.assert_unwatched();
    let Watched { attached, .. } = watched;
    let Attached { client, agent, thread, .. } = attached;
    assert_lost(client.status());
    assert_eq!(thread.join().calls().last().unwrap(), "lost Ours");
    drop(agent);
}
