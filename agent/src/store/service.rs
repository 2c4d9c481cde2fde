// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The service of stores: it talks to stores and fills the cache, for an agent that may do neither.
//!
//! It is the only room with an asynchronous runtime, on threads of its own. It runs in a process
//! beside an agent in a sandbox ([`super::process`]), and otherwise on threads of the process that
//! needs it. Either ends when the other end of its socket closes.
//!
//! It keeps nothing that cannot be made again: a service that died is replaced, and whoever asks
//! names what he wants.

use super::cache::Cache;
use super::error::{StoreError, StoreErrorKind};
use super::fetch::{Limits, Stored};
use super::names::{Name, Object, Stores};
use super::upload::{Upload, check_free, put_named};
use super::wire::{Ask, Kind, Numbers, Speed, UPLOAD, encode_answer, encode_progress, join, split};
use crate::lock::lock;
use bytes::Bytes;
use object_store::ObjectStoreExt;
use pageferry_protocol::control::frame::FLAG_REPLY;
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use pageferry_protocol::image::header;
use pageferry_protocol::image::stored::MAX_SIZE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Number of threads that wait for the network.
const THREADS: usize = 2;
/// Most images that are kept open.
const OPEN: usize = 64;
/// Longest single wait for a request.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
/// How often it is looked whether somebody still waits for an upload.
const LOOK: Duration = Duration::from_millis(200);
/// How long this waits for what is under way when it ends.
const LAST: Duration = Duration::from_secs(5);
/// So many pieces at the end of an image are fetched as it is opened.
const TAIL: u64 = 4;
/// How often an index is read that is damaged.
const ATTEMPTS: u32 = 4;
/// Longest object that is put or read as a whole, in bytes.
const LARGEST_OBJECT: u64 = 64 << 20;

/// What a service works with.
#[derive(Debug)]
pub(super) struct Service {
    stores: Stores,
    cache: Arc<Cache>,
    limits: Arc<Limits>,
    /// What may be used: these names, and what is below them. `None` if all may.
    allowed: Option<Vec<Name>>,
    /// The images that are open, the one that was used last at the end.
    open: Mutex<Vec<(String, Arc<Stored>)>>,
    /// Uploads that wait for their commit.
    uploads: Mutex<HashMap<[u8; 16], Upload>>,
}

type Answer = Result<(Numbers, Vec<OwnedFd>), StoreError>;

impl Service {
    /// A service for the names `allowed`, and what is below them.
    ///
    /// # Errors
    /// If there can be no cache, or one of them is no name.
    pub(super) fn new(allowed: Option<Vec<String>>, cache: Cache) -> Result<Self, StoreError> {
        let cache = Arc::new(cache);
        let parse = |names: Vec<String>| names.iter().map(|name| Name::parse(name)).collect();
        let allowed = allowed.map(parse).transpose()?;
        Ok(Self {
            stores: Stores::default(),
            limits: Arc::new(Limits::new(cache.clone())),
            cache,
            allowed,
            open: Mutex::default(),
            uploads: Mutex::default(),
        })
    }

    /// Serves whoever has the other end of `socket` until it closes.
    ///
    /// # Errors
    /// If it sends what is no frame, or the kernel refuses.
    pub(super) fn serve(self, socket: OwnedFd) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("pageferry-store")
            .enable_all()
            .build()?;
        let (service, mut socket) = (Arc::new(self), FrameSocket::from(socket));
        loop {
            match socket.try_recv() {
                Ok(Some(frame)) => {
                    let service = service.clone();
                    runtime.spawn(async move { service.answer(frame).await });
                }
                Ok(None) => {
                    let until = Instant::now() + LONGEST_WAIT;
                    let waited = pageferry_protocol::control::socket::wait(
                        socket.as_fd(),
                        PollFlags::IN,
                        until,
                    );
                    waited.map_err(io::Error::from)?;
                }
                Err(SocketError::Closed) => break,
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        // Nobody waits for what still runs. What an upload has put is removed.
        let uploads: Vec<Upload> =
            lock(&service.uploads).drain().map(|(_, upload)| upload).collect();
        let abandon = async {
            for upload in uploads {
                upload.abandon().await;
            }
        };
        let _ = runtime.block_on(async { tokio::time::timeout(LAST, abandon).await });
        runtime.shutdown_timeout(LAST);
        Ok(())
    }

    async fn answer(self: Arc<Self>, frame: Frame) {
        let mut fds = frame.fds.into_iter();
        let Some(answer) = fds.next() else { return };
        let (file, progress) = (fds.next(), fds.next().map(FrameSocket::from));
        let malformed = |what: &dyn std::fmt::Display| {
            Err(StoreError::new(StoreErrorKind::Refused, format!("request: {what}")))
        };
        let done = match Ask::decode(frame.request, &frame.body) {
            Ok(Some(ask)) => {
                let name = ask.name().to_owned();
                let work = self.carry_out(ask, file, progress);
                // Ends what nobody waits for any more.
                tokio::select! {
                    done = work => done.map_err(|error| error.without(&name)),
                    () = closes(answer.as_fd()) => return,
                }
            }
            Ok(None) => malformed(&"its code is not known"),
            Err(error) => malformed(&error),
        };
        let (answered, fds) = match done {
            Ok((numbers, fds)) => (Ok(numbers), fds),
            Err(error) => (Err(error), Vec::new()),
        };
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let until = Instant::now() + LOOK;
        // There is room for it: it is the first frame of its socket.
        let sent = FrameSocket::from(answer).send_parts(
            frame.request,
            FLAG_REPLY,
            &encode_answer(&answered),
            &fds,
            until,
        );
        // Nobody will commit an upload that nobody has heard of.
        if let (Err(_), UPLOAD, Ok([low, high, ..])) = (sent, frame.request, answered) {
            let upload = lock(&self.uploads).remove(&join([low, high]));
            if let Some(upload) = upload {
                upload.abandon().await;
            }
        }
    }

    async fn carry_out(
        &self, ask: Ask, file: Option<OwnedFd>, progress: Option<FrameSocket>,
    ) -> Answer {
        let file = || {
            let none = || StoreError::new(StoreErrorKind::Refused, "request: it has no file");
            file.map(File::from).ok_or_else(none)
        };
        let nothing = ([0; 4], Vec::new());
        match ask {
            Ask::Open { name } => self.open(&name).await,
            Ask::Fetch { name, hash, first, count, speed } => {
                let image = self.image(&name, Some(hash)).await?;
                let range = first..first.saturating_add(count);
                match speed {
                    Speed::Later => image.fetch_ahead(range),
                    Speed::Soon => image.fetch(range, false).await?,
                    Speed::Now => image.fetch(range, true).await?,
                }
                Ok(nothing)
            }
            Ask::Create { name, replace, kind } => self.create(&name, replace, kind).await,
            Ask::Upload { name } => {
                let progress = |done, all| send_progress(progress.as_ref(), done, all);
                let upload = Upload::run(self.find(&name)?, file()?, &progress).await?;
                let (bytes, id) = (upload.bytes, upload.id());
                lock(&self.uploads).insert(id, upload);
                let [low, high] = split(id);
                Ok(([low, high, bytes, 0], Vec::new()))
            }
            Ask::Commit { upload, replace } => {
                let upload = lock(&self.uploads).remove(&upload);
                let gone = "the service that has uploaded it is gone";
                let upload =
                    upload.ok_or_else(|| StoreError::new(StoreErrorKind::Unreachable, gone))?;
                upload.commit(replace).await?;
                Ok(nothing)
            }
            Ask::Abandon { upload } => {
                let upload = lock(&self.uploads).remove(&upload);
                if let Some(upload) = upload {
                    upload.abandon().await;
                }
                Ok(nothing)
            }
            Ask::Put { name, replace, kind } => {
                put(&self.find(&name)?, replace, kind, &file()?).await?;
                Ok(nothing)
            }
            Ask::Get { name, limit } => {
                let file = get(&self.find(&name)?, limit.min(LARGEST_OBJECT)).await?;
                Ok(([0; 4], vec![file]))
            }
            Ask::Check { name } => self.find(&name).map(|_| nothing),
        }
    }

    /// The object of this name, if it may be used.
    fn find(&self, name: &str) -> Result<Object, StoreError> {
        let parsed = Name::parse(name)?;
        let is_allowed = |allowed: &Vec<Name>| allowed.iter().any(|one| one.contains(&parsed));
        if !self.allowed.as_ref().is_none_or(is_allowed) {
            let why = "nobody has named this store: start the agent with --store";
            return Err(StoreError::new(StoreErrorKind::Refused, format!("{name}: {why}")));
        }
        self.stores.find(&parsed)
    }

    async fn open(&self, name: &str) -> Answer {
        let image = self.image(name, None).await?;
        // Whoever opens an image reads its header first, and then what comes after the pages.
        let count = image.index.count();
        image.fetch_ahead(0..1);
        image.fetch_ahead(count.saturating_sub(TAIL)..count);
        let fds = image.cached.to_read();
        let fds = fds.map_err(|error| StoreError::cache("open the cache", error))?;
        let [low, high] = split(image.hash);
        Ok(([image.index.length, image.index.piece_size, low, high], fds.into()))
    }

    /// The image of this name. With a hash it is the one with this index, which may be open.
    async fn image(&self, name: &str, hash: Option<[u8; 16]>) -> Result<Arc<Stored>, StoreError> {
        if let Some(hash) = hash {
            let mut open = lock(&self.open);
            let is_it =
                |(known, image): &(String, Arc<Stored>)| known == name && image.hash == hash;
            if let Some(at) = open.iter().position(is_it) {
                let found = open.remove(at);
                let image = found.1.clone();
                open.push(found);
                return Ok(image);
            }
        }
        let object = self.find(name)?;
        let mut attempt = 1;
        let image = loop {
            let bytes = read(&object, MAX_SIZE).await?;
            match Stored::new(object.clone(), &bytes, self.limits.clone()) {
                // It may have been damaged on its way.
                Err(error) if error.kind == StoreErrorKind::Damaged && attempt < ATTEMPTS => {
                    log::warn!("{error}: it is read once more");
                    attempt += 1;
                }
                image => break Arc::new(image?),
            }
        };
        if hash.is_some_and(|hash| hash != image.hash) {
            let why = "it was replaced by another image";
            return Err(StoreError::new(StoreErrorKind::Missing, format!("{name}: {why}")));
        }
        let mut open = lock(&self.open);
        open.retain(|(known, other)| !(known == name && other.hash == image.hash));
        open.push((name.to_owned(), image.clone()));
        let more = open.len().saturating_sub(OPEN);
        open.drain(..more);
        Ok(image)
    }

    async fn create(&self, name: &str, replace: bool, kind: Kind) -> Answer {
        let object = self.find(name)?;
        if object.path.as_ref().is_empty() {
            let why = "the name of the object is missing";
            return Err(StoreError::new(StoreErrorKind::Refused, format!("{name}: {why}")));
        }
        check_free(&object, replace, magic_of(&kind), &kind.name).await?;
        Ok(([0; 4], vec![self.cache.spool()?]))
    }
}

/// What the object of this kind begins with: in a store, an image has its index at its name.
fn magic_of(kind: &Kind) -> &[u8] {
    if kind.magic == header::MAGIC {
        &pageferry_protocol::image::stored::MAGIC
    } else {
        &kind.magic
    }
}

/// Says how far an upload is, if somebody wants to know. It is not sent if it would have to wait:
/// the next one says more.
fn send_progress(to: Option<&FrameSocket>, done: u64, all: u64) {
    if let Some(to) = to {
        let _ = to.send_parts(UPLOAD, 0, &encode_progress(done, all), &[], Instant::now());
    }
}

/// Ends when the other end of `socket` closes.
async fn closes(socket: BorrowedFd<'_>) {
    let Ok(socket) = socket.try_clone_to_owned() else { return std::future::pending().await };
    loop {
        tokio::time::sleep(LOOK).await;
        let mut end = [PollFd::new(&socket, PollFlags::RDHUP)];
        if matches!(poll(&mut end, Some(&Timespec::default())), Ok(1..)) {
            return;
        }
    }
}

/// An object of at most `limit` bytes.
async fn read(object: &Object, limit: u64) -> Result<Bytes, StoreError> {
    let failed = |error: object_store::Error| object.failed(&error);
    let found = object.store.get(&object.path).await.map_err(failed)?;
    let size = found.meta.size;
    if size > limit {
        let sentence = format!("{object}: it has {size} bytes, and at most {limit} are read");
        return Err(StoreError::damaged(sentence));
    }
    let bytes = found.bytes().await.map_err(failed)?;
    if bytes.len() as u64 != size {
        let found = bytes.len();
        return Err(StoreError::damaged(format!("{object}: {found} bytes came of {size}")));
    }
    Ok(bytes)
}

async fn get(object: &Object, limit: u64) -> Result<OwnedFd, StoreError> {
    let bytes = read(object, limit).await?;
    let failed = |error: io::Error| StoreError::cache("keep an object in memory", error);
    let file = rustix::fs::memfd_create("pageferry-object", MemfdFlags::CLOEXEC);
    let file = File::from(file.map_err(|errno| failed(errno.into()))?);
    file.write_all_at(&bytes, 0).map_err(failed)?;
    Ok(file.into())
}

async fn put(object: &Object, replace: bool, kind: Kind, file: &File) -> Result<(), StoreError> {
    let failed = |error: io::Error| StoreError::cache("read the file", error);
    let length = file.metadata().map_err(failed)?.len();
    if length > LARGEST_OBJECT {
        let sentence = format!("{object}: it has {length} bytes, at most {LARGEST_OBJECT} are put");
        return Err(StoreError::new(StoreErrorKind::Refused, sentence));
    }
    check_free(object, replace, magic_of(&kind), &kind.name).await?;
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    put_named(object, Bytes::from(bytes), replace).await
}
