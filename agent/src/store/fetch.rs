// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An image in a store: its pieces come into the cache when somebody needs them.
//!
//! - A piece is fetched once: by one task of this process, and by one process of this machine.
//! - Pieces that somebody waits for, because a guest does, are *urgent*: each has a request of its
//!   own, none waits for those of others, and one that is slow is asked for once more
//!   ([`Limits::hedge`]). All others are fetched in long ranges, a bounded number at a time.
//! - What comes is compared with its hash before it is in the cache. What does not fit is fetched
//!   again: it may have been damaged on its way.

use super::cache::{Cache, CachedImage, State};
use super::error::StoreError;
use super::latency::Latency;
use super::names::Object;
use crate::lock::lock;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use pageferry_protocol::image::stored::{Form, Index, Piece};
use ring::digest::{SHA256, digest};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::sleep;

/// Longest range that is fetched at once, in bytes of the pack.
const RANGE: u64 = 4 << 20;
/// Number of such ranges at a time, of all images.
const RANGES: usize = 8;
/// Number of urgent requests at a time.
const URGENT: usize = 32;
/// How often a range is fetched before it counts as damaged, or the store as unreachable. The
/// library repeats requests that fail; this is for bytes that are wrong or missing.
const ATTEMPTS: u32 = 4;
/// After this time a range that failed is not fetched once more: whoever needs it asks again.
const LONGEST: Duration = Duration::from_secs(8);
/// The pause after the first failure. Each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a piece is left to another process. A guest waits less.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether another process has fetched a piece.
const LOOK: Duration = Duration::from_millis(3);

/// What all images of a service share.
#[derive(Debug)]
pub(super) struct Limits {
    ranges: Semaphore,
    urgent: Semaphore,
    latency: Mutex<Latency>,
    cache: Arc<Cache>,
}

impl Limits {
    pub(super) fn new(cache: Arc<Cache>) -> Self {
        let (ranges, urgent) = (Semaphore::new(RANGES), Semaphore::new(URGENT));
        Self { ranges, urgent, latency: Mutex::default(), cache }
    }

    /// After this time an urgent request is sent once more.
    fn hedge(&self) -> Duration {
        lock(&self.latency).hedge()
    }
}

/// An image in a store that is open.
#[derive(Debug)]
pub(super) struct Stored {
    object: Object,
    pub(super) index: Index,
    pub(super) hash: [u8; 16],
    pub(super) cached: CachedImage,
    packs: Vec<Path>,
    limits: Arc<Limits>,
    /// The pieces that a task of this process fetches. Their senders say when that has ended.
    fetching: Mutex<HashMap<u64, watch::Receiver<()>>>,
}

/// The first half of the SHA-256.
pub(super) fn hash_of(bytes: &[u8]) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&digest(&SHA256, bytes).as_ref()[..16]);
    half
}

/// Pieces that this process has locked among those of this machine, until it is dropped.
struct Locked<'a>(&'a Stored, Vec<u64>);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.1.iter().for_each(|piece| self.0.cached.locks.unlock(*piece));
    }
}

/// Pieces that this task fetches, until it is dropped.
struct Claim<'a> {
    image: &'a Stored,
    pieces: Vec<u64>,
    _ended: watch::Sender<()>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut fetching = lock(&self.image.fetching);
        for piece in &self.pieces {
            fetching.remove(piece);
        }
    }
}

impl Stored {
    /// The image with this index at `object`.
    ///
    /// # Errors
    /// If it is no index, or the cache cannot be used.
    pub(super) fn new(
        object: Object, bytes: &[u8], limits: Arc<Limits>,
    ) -> Result<Self, StoreError> {
        let damaged = |error: &dyn std::error::Error| {
            StoreError::damaged(format!("{object}: {}", crate::error::chain(error)))
        };
        let index = Index::decode(bytes).map_err(|error| damaged(&error))?;
        // In the folder of this image, and nowhere else.
        let parts = object.parts();
        let packs = index.packs.iter().map(|name| Path::parse(format!("{parts}/{name}")));
        let packs = packs.collect::<Result<_, _>>();
        let (hash, packs) = (hash_of(bytes), packs.map_err(|error| damaged(&error))?);
        limits.cache.make_room(0);
        let cached = limits.cache.open(&index, &hash)?;
        Ok(Self { object, index, hash, cached, packs, limits, fetching: Mutex::default() })
    }

    fn state(&self, piece: u64) -> Result<State, StoreError> {
        self.cached.state(piece).map_err(|error| StoreError::cache("read the cache", error))
    }

    /// Has the pieces `range` in the cache.
    ///
    /// # Errors
    /// If the store has not got them as they were put there, or does not answer.
    pub(super) async fn fetch(
        self: &Arc<Self>, range: Range<u64>, urgent: bool,
    ) -> Result<(), StoreError> {
        let mut tasks = JoinSet::new();
        for run in self.runs(range, urgent)? {
            let image = self.clone();
            tasks.spawn(async move { image.fetch_run(run, urgent, true).await });
        }
        while let Some(done) = tasks.join_next().await {
            done.map_err(|error| StoreError::cache("fetch a piece", error))??;
        }
        Ok(())
    }

    /// Begins to fetch these pieces, as far as nobody else does, and does not wait.
    pub(super) fn fetch_ahead(self: &Arc<Self>, range: Range<u64>) {
        for run in self.runs(range, false).unwrap_or_default() {
            let image = self.clone();
            tokio::spawn(async move {
                // Whoever needs it asks again, and gets the error.
                let _ = image.fetch_run(run, false, false).await;
            });
        }
    }

    /// The pieces of `range` that are to be fetched, as ranges of packs.
    fn runs(&self, range: Range<u64>, urgent: bool) -> Result<Vec<Vec<u64>>, StoreError> {
        let mut runs: Vec<Vec<u64>> = Vec::new();
        let mut last: Option<&Piece> = None;
        for number in range.start..range.end.min(self.index.count()) {
            if self.state(number)? == State::Present {
                continue;
            }
            let Some(piece) = self.index.find(number) else { continue };
            let begins = runs.last().and_then(|run| self.index.find(*run.first()?));
            match (last, begins, runs.last_mut()) {
                (Some(last), Some(first), Some(run))
                    if !urgent
                        && piece.pack == last.pack
                        && piece.offset == last.offset + u64::from(last.length)
                        && piece.offset + u64::from(piece.length) - first.offset <= RANGE =>
                {
                    run.push(number);
                }
                _ => runs.push(vec![number]),
            }
            last = Some(piece);
        }
        Ok(runs)
    }

    /// Fetches the pieces of a run that nobody else fetches. With `waits` it returns when all are
    /// there, whoever has fetched them.
    async fn fetch_run(&self, run: Vec<u64>, urgent: bool, waits: bool) -> Result<(), StoreError> {
        let permits = if urgent { &self.limits.urgent } else { &self.limits.ranges };
        loop {
            let absent = self.absent(&run)?;
            if absent.is_empty() {
                return Ok(());
            }
            if let Some(mut other) = self.other(&absent) {
                if !waits {
                    return Ok(());
                }
                // Ends when its sender is dropped. Nobody who waits has a permit.
                let ended = other.changed();
                if !urgent {
                    let _ = ended.await;
                    continue;
                }
                // A guest does not wait for a long range.
                tokio::select! {
                    _ = ended => continue,
                    () = sleep(self.limits.hedge()) => {}
                }
                for part in self.contiguous(&self.absent(&run)?) {
                    self.fetch_part(part, urgent).await?;
                }
                continue;
            }
            let permit = permits.acquire().await;
            let _permit = permit.map_err(|error| StoreError::cache("wait", error))?;
            let claim = self.claim(&run)?;
            for part in self.contiguous(&claim.pieces) {
                self.fetch_part(part, urgent).await?;
            }
        }
    }

    /// The task that fetches the first of these pieces, if others fetch all of them.
    fn other(&self, pieces: &[u64]) -> Option<watch::Receiver<()>> {
        let fetching = lock(&self.fetching);
        let mut first = None;
        for piece in pieces {
            first = first.or(Some(fetching.get(piece)?.clone()));
        }
        first
    }

    fn absent(&self, run: &[u64]) -> Result<Vec<u64>, StoreError> {
        let mut absent = Vec::new();
        for piece in run {
            if self.state(*piece)? != State::Present {
                absent.push(*piece);
            }
        }
        Ok(absent)
    }

    /// Claims those of the pieces that are absent and that no other task has claimed.
    fn claim(&self, run: &[u64]) -> Result<Claim<'_>, StoreError> {
        let (sender, receiver) = watch::channel(());
        let mut pieces = Vec::new();
        let absent = self.absent(run)?;
        let mut fetching = lock(&self.fetching);
        for piece in absent {
            fetching.entry(piece).or_insert_with(|| {
                pieces.push(piece);
                receiver.clone()
            });
        }
        drop(fetching);
        Ok(Claim { image: self, pieces, _ended: sender })
    }

    /// Splits pieces where they do not lie one after another in one pack.
    fn contiguous(&self, pieces: &[u64]) -> Vec<Vec<Piece>> {
        let mut parts: Vec<Vec<Piece>> = Vec::new();
        for piece in pieces.iter().filter_map(|number| self.index.find(*number)) {
            match parts.last_mut() {
                Some(part)
                    if part.last().is_some_and(|last| {
                        last.pack == piece.pack
                            && last.offset + u64::from(last.length) == piece.offset
                    }) =>
                {
                    part.push(*piece);
                }
                _ => parts.push(vec![*piece]),
            }
        }
        parts
    }

    /// Fetches pieces that lie one after another, unless another process does.
    async fn fetch_part(&self, part: Vec<Piece>, urgent: bool) -> Result<(), StoreError> {
        let (asked, mut ours) = (Instant::now(), Locked(self, Vec::new()));
        // The other process may be stopped.
        let patience = if urgent { self.limits.hedge() } else { PATIENCE };
        for piece in &part {
            loop {
                let locked = self.cached.locks.try_lock(piece.number);
                if locked.map_err(|error| StoreError::cache("lock a piece", error))? {
                    ours.1.push(piece.number);
                    break;
                }
                if asked.elapsed() >= patience || self.state(piece.number)? == State::Present {
                    break;
                }
                sleep(LOOK).await;
            }
        }
        let mut wanted = Vec::new();
        for piece in part {
            match self.state(piece.number)? {
                State::Present => {}
                State::Doubtful if self.is_right(piece).await? => {}
                State::Absent | State::Doubtful => wanted.push(piece),
            }
        }
        let numbers: Vec<u64> = wanted.iter().map(|piece| piece.number).collect();
        for part in self.contiguous(&numbers) {
            self.get_and_put(&part, urgent).await?;
        }
        Ok(())
    }

    /// True if the cache has the content of a piece that is doubtful. Otherwise it has none.
    async fn is_right(&self, piece: Piece) -> Result<bool, StoreError> {
        let failed = |error| StoreError::cache("read the cache", error);
        let (offset, length) = self.place(piece.number);
        let content = self.cached.read(offset, length as usize).map_err(failed)?;
        if hash_of(&content) == piece.hash {
            self.cached.confirm(piece.number).map_err(failed)?;
            return Ok(true);
        }
        self.cached.punch(offset, length).map_err(failed)?;
        Ok(false)
    }

    /// Where the content of a piece is in the image file: offset and length.
    fn place(&self, number: u64) -> (u64, u64) {
        (number * self.index.piece_size, self.index.content_length(number))
    }

    async fn get_and_put(&self, part: &[Piece], urgent: bool) -> Result<(), StoreError> {
        let (Some(first), Some(last)) = (part.first(), part.last()) else { return Ok(()) };
        let range = first.offset..last.offset + u64::from(last.length);
        let pack = self.object.at(self.packs[first.pack as usize].clone());
        let (mut pause, began) = (PAUSE, Instant::now());
        for attempt in 1.. {
            let error = match self.get(&pack, range.clone(), urgent).await {
                Ok(bytes) => match self.put(&pack, part, bytes).await {
                    Ok(()) => return Ok(()),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            use super::error::StoreErrorKind::{Damaged, Unreachable};
            let is_over = attempt == ATTEMPTS || began.elapsed() >= LONGEST;
            if !matches!(error.kind, Damaged | Unreachable) || is_over {
                return Err(error);
            }
            log::warn!("{error}: it is fetched once more");
            sleep(pause).await;
            pause *= 2;
        }
        Ok(())
    }

    /// Gets a range of a pack. An urgent one that takes long is asked for twice.
    async fn get(
        &self, pack: &Object, range: Range<u64>, urgent: bool,
    ) -> Result<bytes::Bytes, StoreError> {
        let began = Instant::now();
        let get = || pack.store.get_range(&pack.path, range.clone());
        let first = get();
        let found = if urgent {
            tokio::pin!(first);
            tokio::select! {
                found = &mut first => found,
                () = sleep(self.limits.hedge()) => {
                    let second = get();
                    tokio::pin!(second);
                    tokio::select! {
                        found = &mut first => match found {
                            Ok(found) => Ok(found),
                            Err(_) => second.await,
                        },
                        found = &mut second => match found {
                            Ok(found) => Ok(found),
                            Err(_) => first.await,
                        },
                    }
                }
            }
        } else {
            first.await
        };
        let bytes = found.map_err(|error| pack.failed(&error))?;
        if urgent {
            lock(&self.limits.latency).took(began.elapsed());
        }
        let expected = range.end - range.start;
        if bytes.len() as u64 != expected {
            let found = bytes.len();
            return Err(StoreError::damaged(format!(
                "{pack}: {found} bytes at {}, expected {expected}",
                range.start
            )));
        }
        Ok(bytes)
    }

    /// Checks the pieces `part` in `bytes`, and puts them into the cache.
    async fn put(
        &self, pack: &Object, part: &[Piece], bytes: bytes::Bytes,
    ) -> Result<(), StoreError> {
        let mut at = 0;
        for piece in part {
            let packed = bytes.slice(at..at + piece.length as usize);
            at += piece.length as usize;
            let (piece, (offset, length)) = (*piece, self.place(piece.number));
            let content = spawn_blocking(move || unpack(piece, &packed, length as usize)).await;
            let content = content.map_err(|error| StoreError::cache("unpack a piece", error))?;
            let content = content.ok_or_else(|| {
                let (number, offset) = (piece.number, piece.offset);
                StoreError::damaged(format!("{pack}: piece {number} at {offset} is damaged"))
            })?;
            let mut written = self.cached.put(piece.number, offset, &content);
            if written.as_ref().is_err_and(is_full) {
                self.limits.cache.make_room(self.index.piece_size);
                written = self.cached.put(piece.number, offset, &content);
            }
            written.map_err(|error| StoreError::cache("write to the cache", error))?;
        }
        Ok(())
    }
}

fn is_full(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::StorageFull
}

/// The content of a piece; `None` if it is damaged.
fn unpack(piece: Piece, packed: &[u8], length: usize) -> Option<Vec<u8>> {
    let content = match piece.form {
        Form::Plain => packed.to_vec(),
        Form::Zstd => zstd::bulk::decompress(packed, length).ok()?,
    };
    (content.len() == length && hash_of(&content) == piece.hash).then_some(content)
}
