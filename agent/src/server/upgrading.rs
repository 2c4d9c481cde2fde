// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The server ends for the next program of this process: [`crate::upgrade`].

use super::listener::ControlListener;
use super::{Server, UPGRADE};
use crate::transport::unix_path::UnixPathListener;
use crate::upgrade::last_job::LastJob;
use crate::upgrade::program::{Program, ProgramError};
use crate::upgrade::{HandedOver, Upgrade};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

impl Server {
    /// Listens on the socket that this process had before it was upgraded. It has listened on
    /// `path`, if that is the agent's own.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn listen_again(&mut self, handed_over: HandedOver, path: Option<&Path>) -> io::Result<()> {
        let HandedOver { socket, file, last_job, image_key: _ } = handed_over;
        if let Some(status) = last_job.and_then(LastJob::read) {
            self.hub.session.lock().remember_job(status);
        }
        self.listen_on(match path.zip(file) {
            Some((path, file)) => {
                ControlListener::Bound(UnixPathListener::adopt(socket, path, file))
            }
            None => ControlListener::Inherited(socket),
        })
    }

    /// Ends for an upgrade when `upgrades` becomes readable or an operator asks for it, and no job
    /// runs that the next program could not continue. For a server that listens. `program` is the
    /// one that runs.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn upgrade_on(&mut self, upgrades: UnixStream, program: Program) -> io::Result<()> {
        self.hub.upgrade.allow(program)?;
        upgrades.set_nonblocking(true)?;
        self.reactor.add(upgrades.as_fd(), UPGRADE)?;
        self.upgrades = Some(upgrades);
        Ok(())
    }

    /// Ends all connections before this program is replaced in the middle of a job. From here on
    /// the job may fail, since the kernel refuses threads to a process that executes a program
    /// (EAGAIN). Nobody may hear of that: its VMM would give the memory up.
    pub(super) fn fall_silent(&self) {
        // Locked, so that nobody asks for the status in between.
        let session = self.hub.session.lock();
        session.close_hooks();
        self.connections.values().for_each(|(connection, _)| connection.close());
    }

    /// What the next program gets, if this server ends for an upgrade.
    pub(super) fn hand_over(&mut self, job_continues: bool) -> io::Result<Option<Upgrade>> {
        if !self.upgrading || self.stopping {
            return Ok(None);
        }
        let (listener, program) = (self.listener.take(), self.hub.upgrade.wanted());
        let Some((listener, program)) = listener.zip(program) else { return Ok(None) };
        let last_job = self.hub.session.lock().ended_job();
        let control = listener.hand_over()?.with_last_job(last_job.as_ref());
        Ok(Some(Upgrade { control, program, job_continues }))
    }

    /// True if a signal has asked this server to end that it has not reacted to.
    pub fn was_asked_to_end(&self) -> bool {
        let waits = |signals| {
            let mut polled = [PollFd::new(signals, PollFlags::IN)];
            poll(&mut polled, Some(&Timespec::default())).is_ok_and(|count| count > 0)
        };
        self.signals.as_ref().is_some_and(waits)
    }

    /// Reacts to a signal that asks for an upgrade: a thread checks the program. If it is good, the
    /// upgrade is prepared.
    pub(super) fn check_upgrade(&mut self) {
        // However many requests there were.
        if let Some(upgrades) = &mut self.upgrades {
            while upgrades.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
        }
        let hub = self.hub.clone();
        let check = move || match hub.upgrade.check("") {
            Ok(()) => hub.want_upgrade(),
            Err(ProgramError::UnderWay(_)) => {}
            Err(error) => log::error!("the agent is not upgraded: {}", crate::error::chain(&error)),
        };
        let thread = std::thread::Builder::new().name("upgrade".into());
        if let Err(error) = thread.spawn(check) {
            log::error!("the agent is not upgraded: cannot start a thread: {error}");
        }
    }

    /// Prepares an upgrade. A job that runs goes on, and no other is started: one whose guest needs
    /// memory would end with this program, and the next one continues it.
    pub(super) fn prepare_upgrade(&mut self) {
        if !std::mem::replace(&mut self.upgrading, true) {
            let mut session = self.hub.session.lock();
            session.prepare_upgrade();
            let waits = if session.survives_agent() { "" } else { " when its job has ended" };
            log::info!("the agent is upgraded{waits}");
        }
    }
}
