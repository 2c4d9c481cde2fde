// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the agent calls: it asks the service of stores, and waits for the answer.
//!
//! Each request has a socket of its own for its answer, so any number of threads may ask at once.
//! If the service died, the next request starts another.

use super::error::{StoreError, StoreErrorKind};
use super::process;
use super::wire::{Ask, Kind, Numbers, Speed, decode_answer, decode_progress, join};
use crate::cancel::Cancel;
use crate::lock::lock;
use crate::transport::Limiter;
use crate::waiting::may_wait;
use pageferry_protocol::control::{FrameSocket, SocketError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Longest time until the service takes a request.
const SEND: Duration = Duration::from_secs(10);
/// A read of at most so many bytes is one that somebody waits for. Others read ahead.
const URGENT: u64 = 64 << 10;
/// How many bytes after a long read are fetched before somebody asks for them.
const AHEAD: u64 = 16 << 20;
/// How long the service may take to give a request up. It may be stopped; a cancel does not wait
/// for that.
const GIVE_UP: Duration = Duration::from_secs(1);
/// How often a request is made again because the service died.
const ATTEMPTS: u32 = 3;

/// The socket to the service.
static SERVICE: Mutex<Option<FrameSocket>> = Mutex::new(None);

/// True if `path` is the name of an object in a store, and not the path of a file.
pub fn is_stored(path: &Path) -> bool {
    path.to_str().is_some_and(pageferry_protocol::image::stored::is_stored)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Whether the object of this name may be used by this process.
///
/// # Errors
/// If not: the error says why.
pub fn check(path: &Path) -> Result<(), StoreError> {
    ask(&Ask::Check { name: text(path) }).map(drop)
}

/// The bytes of an object of at most `limit` bytes.
///
/// # Errors
/// If there is none, it is longer, or the store does not answer.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>, StoreError> {
    let (_, fds) = ask(&Ask::Get { name: text(path), limit })?;
    let [file] = descriptors(fds)?;
    let read = crate::opener::read_open(File::from(file), limit as usize);
    read.map_err(|error| StoreError::cache("read an object", error))
}

/// An image in a store: a file of the cache, which has the pieces that were read before.
#[derive(Debug)]
pub struct StoredFile {
    name: String,
    hash: [u8; 16],
    data: OwnedFd,
    present: OwnedFd,
    piece_size: u64,
    length: u64,
    /// While it limits the reads, nothing is read ahead.
    limiter: OnceLock<Arc<Limiter>>,
}

impl AsFd for StoredFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }
}

impl StoredFile {
    /// The image of this name.
    ///
    /// # Errors
    /// If there is none, the store does not answer, or the cache cannot be used.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let name = text(path);
        let (numbers, fds) = ask(&Ask::Open { name: name.clone() })?;
        let ([length, piece_size, low, high], [data, present]) = (numbers, descriptors(fds)?);
        if !piece_size.is_power_of_two() {
            return Err(broken());
        }
        let (hash, limiter) = (join([low, high]), OnceLock::new());
        Ok(Self { name, hash, data, present, piece_size, length, limiter })
    }

    /// Length of the image file in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Notes that whoever reads in long ranges waits for `limiter` before each. What is read ahead
    /// does not wait for it, so nothing is read ahead while there is a limit.
    pub fn limit(&self, limiter: &Arc<Limiter>) {
        // The first one stays: a file is read by one job.
        let _ = self.limiter.set(limiter.clone());
    }

    /// Has these bytes of the file in the cache. Waits for the store, if it has to.
    ///
    /// # Errors
    /// If the store has not got them as they were put there, or does not answer.
    pub fn ensure(&self, bytes: Range<u64>) -> Result<(), StoreError> {
        let end = bytes.end.min(self.length);
        if bytes.start >= end {
            return Ok(());
        }
        let pieces = bytes.start / self.piece_size..end.div_ceil(self.piece_size);
        let Some(first) = self.next_absent(pieces.clone())? else { return Ok(()) };
        let speed = if end - bytes.start <= URGENT { Speed::Now } else { Speed::Soon };
        self.fetch(first..pieces.end, speed)?;
        if speed == Speed::Soon && pieces.end - first > 1 {
            self.will_need(end..end.saturating_add(AHEAD));
        }
        Ok(())
    }

    /// Has the service begin to bring these bytes, and does not wait for that. Does nothing while
    /// reads are limited.
    pub fn will_need(&self, bytes: Range<u64>) {
        if self.limiter.get().is_some_and(|limiter| limiter.is_limited()) {
            return;
        }
        let end = bytes.end.min(self.length).div_ceil(self.piece_size);
        let pieces = bytes.start / self.piece_size..end;
        // If this fails, whoever reads it gets the error.
        if let Ok(Some(first)) = self.next_absent(pieces.clone()) {
            let _ = self.fetch(first..pieces.end, Speed::Later);
        }
    }

    fn fetch(&self, pieces: Range<u64>, speed: Speed) -> Result<(), StoreError> {
        let (name, hash) = (self.name.clone(), self.hash);
        let (first, count) = (pieces.start, pieces.end - pieces.start);
        ask(&Ask::Fetch { name, hash, first, count, speed }).map(drop)
    }

    /// The first of these pieces that the cache does not have.
    fn next_absent(&self, pieces: Range<u64>) -> Result<Option<u64>, StoreError> {
        let mut states = [0; 512];
        let mut next = pieces.start;
        while next < pieces.end {
            let states = &mut states[..(pieces.end - next).min(512) as usize];
            let read =
                rustix::io::pread(&self.present, &mut *states, super::cache::PRESENT_HEAD + next);
            match read {
                Ok(0) => return Ok(Some(next)),
                Ok(read) => {
                    let present = super::cache::State::Present as u8;
                    if let Some(at) = states[..read].iter().position(|state| *state != present) {
                        return Ok(Some(next + at as u64));
                    }
                    next += read as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(StoreError::cache("read the cache", errno)),
            }
        }
        Ok(None)
    }
}

/// A file that becomes an object of a store when it is complete.
#[derive(Debug)]
pub struct NewObject {
    name: String,
    replace: bool,
    kind: Kind,
    file: OwnedFd,
    upload: Mutex<Option<[u8; 16]>>,
}

impl Drop for NewObject {
    fn drop(&mut self) {
        if let Some(upload) = lock(&self.upload).take()
            && let Err(error) = ask(&Ask::Abandon { upload })
        {
            log::warn!("{}: what was uploaded is left for prune: {error}", self.name);
        }
    }
}

impl AsFd for NewObject {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl NewObject {
    /// A file for the object of this name, of a kind that begins with `magic`.
    ///
    /// # Errors
    /// If there is such an object and it may not be replaced, or is of another kind; or the store
    /// does not answer.
    pub fn create(
        path: &Path, replace: bool, magic: &[u8], kind: &str,
    ) -> Result<Self, StoreError> {
        let (name, kind) = (text(path), Kind { magic: magic.to_vec(), name: kind.to_owned() });
        let create = Ask::Create { name: name.clone(), replace, kind: kind.clone() };
        let [file] = descriptors(ask(&create)?.1)?;
        Ok(Self { name, replace, kind, file, upload: Mutex::default() })
    }

    /// Puts all of an image into the store but what makes it one. Calls `progress` with the bytes
    /// of data that are in the store, and the bytes of all data.
    ///
    /// # Errors
    /// If it is cancelled, or the store refuses or does not answer. Then nothing is left of it.
    pub fn upload(&self, progress: &dyn Fn(u64, u64)) -> Result<(), StoreError> {
        let mut uploaded = lock(&self.upload);
        let is_image = self.kind.magic == pageferry_protocol::image::header::MAGIC;
        if !is_image || uploaded.is_some() {
            return Ok(());
        }
        let upload = Ask::Upload { name: self.name.clone() };
        let ([low, high, bytes, _], _) =
            ask_with(&upload, Some(self.file.as_fd()), Some(progress))?;
        log::info!("{}: {bytes} bytes are uploaded", self.name);
        *uploaded = Some(join([low, high]));
        Ok(())
    }

    /// Gives the object its name.
    ///
    /// # Errors
    /// If there is an object that may not be replaced, or the store does not answer. Then what has
    /// this name is unchanged.
    pub fn finish(&self) -> Result<(), StoreError> {
        self.upload(&|_, _| {})?;
        let replace = self.replace;
        // Whatever comes of it, the service has nothing of it then.
        let uploaded = lock(&self.upload).take();
        match uploaded {
            Some(upload) => ask(&Ask::Commit { upload, replace }).map(drop),
            None => {
                let put = Ask::Put { name: self.name.clone(), replace, kind: self.kind.clone() };
                ask_with(&put, Some(self.file.as_fd()), None).map(drop)
            }
        }
    }
}

fn descriptors<const N: usize>(fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], StoreError> {
    fds.try_into().map_err(|_| broken())
}

/// Our end of a socket to the service, and the other one.
fn pair() -> Result<(FrameSocket, OwnedFd), StoreError> {
    let made = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let (ours, services) = made.map_err(|errno| StoreError::cache("make a socket", errno))?;
    Ok((FrameSocket::from(ours), services))
}

/// The service does not answer as it should.
fn broken() -> StoreError {
    StoreError::cache("use the service of stores", "it answers what was not asked")
}

/// Asks the service, and waits for its answer. If the job of this thread is cancelled meanwhile,
/// the service gives the request up as the socket for the answer closes.
fn ask(ask: &Ask) -> Result<(Numbers, Vec<OwnedFd>), StoreError> {
    ask_with(ask, None, None)
}

/// The same with a file that belongs to the request. `progress` is called as an upload goes on.
fn ask_with(
    ask: &Ask, file: Option<BorrowedFd<'_>>, progress: Option<&dyn Fn(u64, u64)>,
) -> Result<(Numbers, Vec<OwnedFd>), StoreError> {
    may_wait("ask the service of stores");
    let cancel = Cancel::of_this_thread().filter(|_| ask.may_be_given_up());
    for _ in 0..ATTEMPTS {
        let (mut answer, services) = pair()?;
        let (mut reports, services_reports) = progress.map(|_| pair()).transpose()?.unzip();
        let mut fds = vec![services.as_fd()];
        fds.extend(file);
        fds.extend(services_reports.as_ref().map(AsFd::as_fd));
        send(ask, &fds)?;
        drop(fds);
        drop((services, services_reports));
        loop {
            match answer.try_recv() {
                Ok(Some(frame)) => {
                    let numbers = decode_answer(&frame.body).map_err(|_| broken())??;
                    return Ok((numbers, frame.fds));
                }
                Ok(None) => {
                    if let (Some(progress), Some(socket)) = (progress, &mut reports)
                        && !pass_on(socket, progress)
                    {
                        reports = None;
                    }
                    let waited = wait_for(&answer, reports.as_ref(), cancel.as_deref());
                    if waited.is_err() && matches!(ask, Ask::Upload { .. }) {
                        give_up_upload(&mut answer);
                    }
                    waited?;
                }
                // The service died. What was asked can be asked again.
                Err(SocketError::Closed | SocketError::ClosedInFrame { .. }) => break,
                Err(error) => return Err(StoreError::cache("ask the service of stores", error)),
            }
        }
        log::warn!("the service of stores has died: another one is started");
    }
    Err(StoreError::new(StoreErrorKind::Unreachable, "the service of stores dies again and again"))
}

/// Passes the progress of an upload on. Returns false if no more comes.
fn pass_on(reports: &mut FrameSocket, progress: &dyn Fn(u64, u64)) -> bool {
    let mut last = None;
    let more = loop {
        match reports.try_recv() {
            Ok(Some(frame)) => last = decode_progress(&frame.body).ok().or(last),
            Ok(None) => break true,
            // An older service closes it at once. The answer says how the upload has ended.
            Err(_) => break false,
        }
    };
    if let Some((done, all)) = last {
        progress(done, all);
    }
    more
}

/// Has the service give an upload up. If it is complete by now, it is abandoned: otherwise the
/// service would keep it for good.
fn give_up_upload(answer: &mut FrameSocket) {
    // The service sees that as the end of the request, and can still answer.
    let _ = shutdown(&*answer, Shutdown::Write);
    let until = Instant::now() + GIVE_UP;
    // An error is the end that was wanted, or a service that is stopped. That one abandons what it
    // cannot answer.
    let Ok(frame) = answer.recv(until) else { return };
    if let Ok(Ok([low, high, ..])) = decode_answer(&frame.body) {
        let upload = join([low, high]);
        if let Err(error) = ask(&Ask::Abandon { upload }) {
            log::warn!("what was uploaded is left for prune: {error}");
        }
    }
}

/// Waits until one of the sockets has something.
///
/// # Errors
/// If the job is cancelled.
fn wait_for(
    answer: &FrameSocket, reports: Option<&FrameSocket>, cancel: Option<&Cancel>,
) -> Result<(), StoreError> {
    let mut polled = vec![PollFd::new(answer, PollFlags::IN)];
    polled.extend(reports.map(|reports| PollFd::new(reports, PollFlags::IN)));
    polled.extend(cancel.map(|cancel| PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN)));
    match poll(&mut polled, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(StoreError::cache("wait for the service of stores", errno)),
    }
    if cancel.is_some_and(Cancel::is_cancelled) {
        return Err(StoreError::new(StoreErrorKind::Cancelled, "the job was cancelled"));
    }
    Ok(())
}

/// Sends a request, to another service if there is none or it died.
fn send(ask: &Ask, fds: &[BorrowedFd<'_>]) -> Result<(), StoreError> {
    let mut service = lock(&SERVICE);
    for _ in 0..ATTEMPTS {
        let socket = match &mut *service {
            Some(socket) => socket,
            none => none.insert(FrameSocket::from(process::connect()?)),
        };
        let until = Instant::now() + SEND;
        match socket.send_parts(ask.code(), 0, &ask.encode(), fds, until) {
            Ok(()) => return Ok(()),
            Err(error) => {
                log::debug!("service of stores: {error}");
                *service = None;
            }
        }
    }
    Err(StoreError::new(StoreErrorKind::Unreachable, "the service of stores takes no request"))
}
