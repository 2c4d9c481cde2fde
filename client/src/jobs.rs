// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Starting, changing, watching and cancelling migrations, snapshots and restores.

use crate::client::Client;
use crate::error::{Error, PathError};
use crate::ownership::{Migration, Ownership};
use pageferry_protocol::control::job::{
    IncomingOptions, JobStatus, MAX_ADDRESS, OutgoingOptions, Parameters, RestoreOptions,
    SnapshotOptions,
};
use pageferry_protocol::control::reply::JobStarted;
use pageferry_protocol::control::request::Request;
use pageferry_protocol::control::{AgentInfo, Grants};
use pageferry_protocol::image::stored::{is_stored, unknown_scheme};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// The other end of a migration.
#[derive(Debug)]
pub enum Target {
    /// `tcp:HOST:PORT`, `tls:HOST:PORT` or `unix:PATH`: the address to connect to, or to listen at.
    /// A path has at most 107 bytes. To listen, the path may name a socket at which nobody listens,
    /// but no other existing file.
    Address(String),
    /// A connected stream socket, such as the one of [`PageStream::pair`](crate::PageStream::pair).
    Socket(OwnedFd),
}

impl Target {
    /// The target as it travels: the text, and the descriptor if there is one.
    fn parts(&self) -> Result<(String, Option<BorrowedFd<'_>>), Error> {
        match self {
            Self::Address(address) if address.len() > MAX_ADDRESS => {
                Err(Error::AddressTooLong { length: address.len() })
            }
            Self::Address(address) => Ok((address.clone(), None)),
            Self::Socket(socket) => Ok(("fd".to_owned(), Some(socket.as_fd()))),
        }
    }
}

/// Longest interval between two queries in [`Client::wait`].
const LONGEST_POLL: Duration = Duration::from_millis(5);
/// Shortest interval.
const SHORTEST_POLL: Duration = Duration::from_micros(200);

impl Client {
    /// Starts to send the guest. The progress comes by hooks, [`Client::status`] and
    /// [`Client::wait`]. Returns at once, except that it looks the name of a host up first, which
    /// may take seconds: give an IP address, or call it from a thread that may wait.
    ///
    /// # Errors
    /// If the guest is not ours, some of its memory was [lost](crate::Hooks::memory_lost), the
    /// agent refuses, or the agent is lost.
    pub fn start_outgoing(
        &self, target: Target, options: &OutgoingOptions,
    ) -> Result<JobStarted, Error> {
        self.check_guest_is_ours()?;
        let (text, socket) = target.parts()?;
        let request = Request::StartOutgoing { target: text, options: options.clone() };
        self.grant(Grants::of(&request))?;
        self.flushed_session().control.request(&request, socket.as_slice(), JobStarted::decode)
    }

    /// Starts to wait for a guest. From now on the guest is not ours, until the commit of the
    /// source has arrived and the agent has the guest resumed. The VMM must not run a guest in this
    /// memory meanwhile.
    ///
    /// # Errors
    /// If the agent refuses; ownership does not change then. Or if the agent is lost; ownership
    /// does change then if the request may have arrived.
    pub fn start_incoming(
        &self, listen: Target, options: &IncomingOptions,
    ) -> Result<JobStarted, Error> {
        let (text, socket) = listen.parts()?;
        let request = Request::StartIncoming { listen: text, options: options.clone() };
        self.start_incoming_job(&request, socket.as_slice())
    }

    /// Starts to save the guest into an image. Returns at once, as [`Client::start_outgoing`] does.
    /// Paths are relative to the current directory, here and in the options.
    ///
    /// In the mode [`Background`](crate::SnapshotMode::Background), while the job runs, a write
    /// through the mappings in [`BlockSpec::vmm_address`](crate::BlockSpec::vmm_address) waits for
    /// a moment if the page is not saved yet. `write` to the file does not wait, and neither do
    /// other mappings of it, as in other processes; what they write may be in the image. So such
    /// writers must be stopped meanwhile: the VMM is told by
    /// [`Hooks::writes_watched`](crate::Hooks::writes_watched). Or use the mode
    /// [`Paused`](crate::SnapshotMode::Paused).
    ///
    /// # Errors
    /// If the guest is not ours, some of its memory was [lost](crate::Hooks::memory_lost), a path
    /// cannot be sent, the agent refuses, or the agent is lost.
    pub fn start_snapshot(
        &self, image: &Path, options: &SnapshotOptions,
    ) -> Result<JobStarted, Error> {
        self.check_guest_is_ours()?;
        let base = optional_path("base", &options.base)?;
        let options = SnapshotOptions { base, ..options.clone() };
        let request = Request::StartSnapshot { path: absolute_path("image", image)?, options };
        self.grant(Grants::of(&request))?;
        self.flushed_session().control.request(&request, &[], JobStarted::decode)
    }

    /// Starts to restore a guest from an image. From now on the guest is not ours, until the agent
    /// has the restored one resumed. If the job fails, it stays so. The VMM must not run a guest in
    /// this memory meanwhile. Paths are relative to the current directory, here and in the options.
    ///
    /// # Errors
    /// If a path cannot be sent or the agent refuses; ownership does not change then. Or if the
    /// agent is lost; ownership does change then if the request may have arrived.
    pub fn start_restore(
        &self, image: &Path, options: &RestoreOptions,
    ) -> Result<JobStarted, Error> {
        let working_set = optional_path("working_set", &options.working_set)?;
        let options = RestoreOptions { working_set, ..options.clone() };
        let request = Request::StartRestore { path: absolute_path("image", image)?, options };
        self.start_incoming_job(&request, &[])
    }

    /// Lets an agent in a sandbox read files in `folder` and below it. Each job does that for the
    /// folders of its own paths; this is for images in other folders on which its image builds.
    ///
    /// # Errors
    /// If the agent refuses, or is lost.
    pub fn grant_folder(&self, folder: &Path) -> Result<(), Error> {
        self.grant(Grants::default().folder(folder))
    }

    fn grant(&self, grants: Grants) -> Result<(), Error> {
        self.session().control.grant(&grants.into_fds())
    }

    fn check_guest_is_ours(&self) -> Result<(), Error> {
        match self.ownership() {
            Ownership::Ours if self.missing().is_lost() => Err(Error::MemoryLost),
            Ownership::Ours => Ok(()),
            ownership => Err(Error::NotOurs { ownership }),
        }
    }

    /// Starts a job that brings a guest.
    fn start_incoming_job(
        &self, request: &Request, fds: &[BorrowedFd<'_>],
    ) -> Result<JobStarted, Error> {
        self.grant(Grants::of(request))?;
        let mut session = self.session();
        if let Some(lost) = session.control.lost_error() {
            return Err(lost);
        }
        // What is queued is of the guest that is here now.
        self.flush_queued(&mut session)?;
        // Before the request is sent: the resume hook may come before the answer.
        let before = self.shared_ownership().lock().begin_start(session.control.link().id);
        let started = session.control.request(request, fds, JobStarted::decode);
        match &started {
            Err(Error::Refused { .. }) => self.shared_ownership().lock().start_refused(before),
            Ok(_) | Err(_) => self.shared_ownership().lock().start_answered(),
        }
        if started.is_ok() {
            self.missing().forget_lost();
        }
        started
    }

    /// Cancels the job that runs.
    ///
    /// # Errors
    /// If no job runs, it is past the point of cancelling, or the agent is lost.
    pub fn cancel(&self) -> Result<(), Error> {
        self.session().control.request(&Request::Cancel, &[], |_| Ok(()))
    }

    /// Switches the running outgoing migration of mode [`Mode::Hybrid`](crate::Mode::Hybrid) to
    /// postcopy, after its current pass.
    ///
    /// # Errors
    /// If no such migration runs, its passes have ended, or the agent is lost.
    pub fn start_postcopy(&self) -> Result<(), Error> {
        self.session().control.request(&Request::StartPostcopy, &[], |_| Ok(()))
    }

    /// Connects a paused postcopy again. Returns at once, as [`Client::start_outgoing`] does.
    ///
    /// At the source it connects to `address`, or to the address before. Call it also if the
    /// source's agent was lost in postcopy and a new one was [attached](Client::reattach). The new
    /// agent needs an address and `options`; a job that is paused in its agent keeps its own
    /// options.
    ///
    /// At the destination the job listens at `address` in addition. It still listens where it
    /// listened before, so this is needed only if the network changed.
    ///
    /// # Errors
    /// If there is nothing to recover, the agent refuses, or the agent is lost.
    pub fn recover(
        &self, address: Option<&str>, options: &OutgoingOptions,
    ) -> Result<JobStarted, Error> {
        let address = address.unwrap_or_default();
        if address.len() > MAX_ADDRESS {
            return Err(Error::AddressTooLong { length: address.len() });
        }
        let ownership = self.ownership();
        let Migration { session, release } = match (self.shared_ownership().migration(), ownership)
        {
            (Some(migration), _) => migration,
            // The destination's job, which can only be paused in this agent.
            (None, Ownership::Ours) => Migration::default(),
            (None, _) => return Err(Error::NothingToRecover { ownership }),
        };
        // With release, the memory here is incomplete, whatever the options say now.
        let options = OutgoingOptions { release: options.release || release, ..options.clone() };
        let request = Request::Recover { session, address: address.to_owned(), options };
        self.grant(Grants::of(&request))?;
        self.session().control.request(&request, &[], JobStarted::decode)
    }

    /// Changes options of the job that runs. What is `None` stays as it is. A snapshot and a
    /// restore have only the bandwidth.
    ///
    /// # Errors
    /// If no such job runs, a value is not allowed, or the agent is lost.
    pub fn set_parameters(&self, parameters: &Parameters) -> Result<(), Error> {
        let request = Request::SetParameters { parameters: *parameters };
        self.session().control.request(&request, &[], |_| Ok(()))
    }

    /// The status of the job that runs or ran last.
    ///
    /// # Errors
    /// If the agent is lost.
    pub fn status(&self) -> Result<JobStatus, Error> {
        self.session().control.request(&Request::QueryStatus, &[], JobStatus::decode)
    }

    /// What the agent serves, and its version and process.
    ///
    /// # Errors
    /// If the agent is lost.
    pub fn agent(&self) -> Result<AgentInfo, Error> {
        self.session().control.request(&Request::QueryAgent, &[], AgentInfo::decode)
    }

    /// Waits for the end of the job. The phase and the error of the result say how it ended.
    ///
    /// This polls every 5 ms, and more often at first for short jobs. Nothing important waits for
    /// it: the guest is paused, resumed and given up by hooks, and a status costs the agent
    /// microseconds. A subscription would need a thread that reads this socket at all times.
    ///
    /// # Errors
    /// If the job did not end within `timeout`, is not the last job of the agent, or the agent is
    /// lost.
    pub fn wait(&self, job: u64, timeout: Duration) -> Result<JobStatus, Error> {
        let started = Instant::now();
        loop {
            let status = self.status()?;
            if status.job != job {
                return Err(Error::UnknownJob { job, last: status.job });
            }
            if status.phase.is_final() {
                return Ok(status);
            }
            let waited = started.elapsed();
            if waited >= timeout {
                return Err(Error::JobNotEnded { job, phase: status.phase.name(), waited });
            }
            std::thread::sleep(
                (waited / 8).clamp(SHORTEST_POLL, LONGEST_POLL).min(timeout - waited),
            );
        }
    }
}

/// A path as it travels: absolute, since the agent has another current directory. The name of an
/// object in a store is left as it is.
pub(crate) fn absolute_path(what: &'static str, path: &Path) -> Result<String, Error> {
    let refused = |source| Error::Path { what, path: path.to_owned(), source };
    if let Some(scheme) = path.to_str().and_then(unknown_scheme) {
        return Err(refused(PathError::UnknownScheme { scheme: scheme.to_owned() }));
    }
    let absolute = match path.to_str().is_some_and(is_stored) {
        true => Ok(path.to_owned()),
        false => std::path::absolute(path),
    };
    let absolute = absolute.map_err(|source| refused(PathError::NotAbsolute { source }))?;
    match absolute.into_os_string().into_string() {
        Ok(text) if text.len() > MAX_ADDRESS => {
            Err(refused(PathError::TooLong { length: text.len() }))
        }
        Ok(text) => Ok(text),
        Err(_) => Err(refused(PathError::NotUtf8)),
    }
}

/// The same for a path that may be empty.
fn optional_path(what: &'static str, path: &str) -> Result<String, Error> {
    if path.is_empty() { Ok(String::new()) } else { absolute_path(what, Path::new(path)) }
}
