// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Putting an image into a store: its pieces into packs, and at last its index.
//!
//! Each upload has a folder of its own beside the name of the image, so two of them never mix. The
//! image is there when its index is, which is one object. An upload that ends before that has left
//! packs at most, which [`super::maintain`] finds.
//!
//! While an upload runs, its *lease* says so: an object in its folder that is written before the
//! first pack, anew every minute, and removed after the index. An upload that could not renew it
//! for half an hour gives up. One whose lease was removed all the same takes its index back.

use super::error::{StoreError, StoreErrorKind};
use super::fetch::hash_of;
use super::names::Object;
use crate::lock::lock;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use pageferry_protocol::image::Header;
use pageferry_protocol::image::header::HEADER_SIZE;
use pageferry_protocol::image::stored::{Form, Index, MAGIC, Piece};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::{AbortHandle, JoinSet, spawn_blocking};

/// Size of a piece in bytes.
pub(super) const PIECE: u64 = 1 << 20;
/// A pack is put when it has so many bytes.
const PACK: usize = 8 << 20;
/// Number of packs that are put at a time.
const PACKS: usize = 4;
/// Number of pieces that are read and compressed at a time.
const PIECES: usize = 4;
/// The level of zstd. Higher ones take several times as long for some percent.
const LEVEL: i32 = 1;
/// How often the lease is written.
const REFRESH: Duration = Duration::from_secs(60);
/// An upload whose lease is older gives up: after an hour it counts as dead.
const STALE: Duration = Duration::from_secs(1800);
/// How often the name of an image is put whose answer does not come.
const ATTEMPTS: u32 = 4;
/// The pause between these attempts, and longer each time.
const PAUSE: Duration = Duration::from_millis(100);
/// The name of the lease in the folder of an upload.
pub(super) const LEASE: &str = "lease";

/// An upload whose packs are in the store, and whose index is not.
#[derive(Debug)]
pub(super) struct Upload {
    object: Object,
    folder: Path,
    index: Index,
    /// Bytes of all packs.
    pub(super) bytes: u64,
    refresh: AbortHandle,
    /// When its lease was written last.
    renewed: Arc<Mutex<Duration>>,
    /// Its index may be there, or nothing of it is left.
    is_over: bool,
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.refresh.abort();
        if !self.is_over {
            tokio::spawn(remove_folder(self.object.clone(), self.folder.clone()));
        }
    }
}

/// Is called with the progress of an upload: bytes of the file's data that are in the store, and
/// bytes of all its data.
pub(super) type Progress<'a> = &'a (dyn Fn(u64, u64) + Send + Sync);

/// A pack that is being filled.
#[derive(Debug, Default)]
struct Pack {
    bytes: Vec<u8>,
    /// Bytes of the file's data that are in it. Pieces of zeroes count, too.
    data: u64,
}

/// The packs that are being put.
struct Puts<'a> {
    /// Each returns the data in its pack.
    tasks: JoinSet<Result<u64, StoreError>>,
    /// Bytes of data whose packs are in the store.
    done: u64,
    /// Bytes of all data.
    all: u64,
    progress: Progress<'a>,
}

impl<'a> Puts<'a> {
    /// None so far, of a file with `all` bytes of data.
    fn new(all: u64, progress: Progress<'a>) -> Self {
        progress(0, all);
        Self { tasks: JoinSet::new(), done: 0, all, progress }
    }

    /// Waits until at most `count` are under way.
    async fn wait_for_all_but(&mut self, count: usize) -> Result<(), StoreError> {
        loop {
            let put = match self.tasks.len() > count {
                true => self.tasks.join_next().await,
                false => self.tasks.try_join_next(),
            };
            let Some(put) = put else { return Ok(()) };
            self.done += put.map_err(|error| StoreError::cache("put a pack", error))??;
            (self.progress)(self.done, self.all);
        }
    }
}

/// Removes what an upload has put. What cannot be removed is left for `prune`.
async fn remove_folder(object: Object, folder: Path) {
    let found = object.store.list(Some(&folder));
    let found: Vec<Path> = found.filter_map(async |meta| Some(meta.ok()?.location)).collect().await;
    for path in found {
        if let Err(error) = object.store.delete(&path).await {
            log::warn!("{}", object.at(path).failed(&error));
        }
    }
}

/// A new id.
///
/// # Errors
/// If the kernel gives no random bytes.
pub(super) fn new_id() -> Result<[u8; 16], StoreError> {
    let mut id = [0; 16];
    let random = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut id);
    random.map_err(|_| StoreError::cache("get random bytes", "the kernel gives none"))?;
    Ok(id)
}

impl Upload {
    /// Puts the pieces of the image in `file`, which is complete, into packs.
    ///
    /// # Errors
    /// If the file cannot be read, or the store refuses. Then nothing is left of it.
    pub(super) async fn run(
        object: Object, file: File, progress: Progress<'_>,
    ) -> Result<Self, StoreError> {
        let file = Arc::new(file);
        let failed = |error| StoreError::cache("read the image", error);
        let length = file.metadata().map_err(failed)?.len();
        let mut header = [0; HEADER_SIZE];
        file.read_exact_at(&mut header, 0).map_err(failed)?;
        let header = Header::from_bytes(&header)
            .map_err(|error| StoreError::damaged(crate::error::chain(&error)))?;
        let upload = new_id()?;
        let folder = object.parts().join(pageferry_protocol::image::id_text(&upload));
        let renewed = Arc::new(Mutex::new(now()));
        put_lease(&object, &folder).await?;
        let refresh = refresh(object.clone(), folder.clone(), renewed.clone());
        let refresh = tokio::spawn(refresh).abort_handle();
        let index = Index {
            image: header.id,
            upload,
            length,
            piece_size: PIECE,
            packs: Vec::new(),
            pieces: Vec::new(),
        };
        let mut upload = Self { object, folder, index, bytes: 0, refresh, renewed, is_over: false };
        upload.put_pieces(file, progress).await?;
        Ok(upload)
    }

    /// Its id.
    pub(super) fn id(&self) -> [u8; 16] {
        self.index.upload
    }

    async fn put_pieces(
        &mut self, file: Arc<File>, progress: Progress<'_>,
    ) -> Result<(), StoreError> {
        let (length, count) = (self.index.length, self.index.count());
        let whole = file.clone();
        let all = spawn_blocking(move || data_bytes(&whole, 0..length)).await;
        let all = all.map_err(|error| StoreError::cache("look for holes", error))?;
        let mut puts = Puts::new(all, progress);
        let read = |number: u64| {
            let file = file.clone();
            async move {
                let (offset, length) = (number * PIECE, (length - number * PIECE).min(PIECE));
                let packed = spawn_blocking(move || pack(&file, offset, length as usize)).await;
                let packed = packed.map_err(|error| StoreError::cache("pack a piece", error))?;
                let packed = packed.map_err(|error| StoreError::cache("read the image", error))?;
                Ok::<_, StoreError>((number, packed))
            }
        };
        let mut pieces = stream::iter(0..count).map(read).buffered(PIECES);
        let mut pack = Pack::default();
        while let Some(piece) = pieces.next().await {
            let (number, (data, packed)) = piece?;
            pack.data += data;
            let Some((form, hash, packed)) = packed else { continue };
            let (at, offset) = (self.index.packs.len() as u32, pack.bytes.len() as u64);
            let length = packed.len() as u32;
            self.index.pieces.push(Piece { number, pack: at, form, offset, length, hash });
            pack.bytes.extend_from_slice(&packed);
            if pack.bytes.len() >= PACK {
                self.put_pack(std::mem::take(&mut pack), &mut puts).await?;
            }
        }
        if !pack.bytes.is_empty() {
            self.put_pack(pack, &mut puts).await?;
        }
        puts.wait_for_all_but(0).await
    }

    /// Begins to put a pack, when there are not too many under way.
    async fn put_pack(&mut self, pack: Pack, puts: &mut Puts<'_>) -> Result<(), StoreError> {
        puts.wait_for_all_but(PACKS - 1).await?;
        let name = format!("{:08}", self.index.packs.len());
        let path = self.folder.clone().join(name.as_str());
        self.bytes += pack.bytes.len() as u64;
        let folder = pageferry_protocol::image::id_text(&self.index.upload);
        self.index.packs.push(format!("{folder}/{name}"));
        let object = self.object.at(path);
        puts.tasks.spawn(async move {
            let put = object.store.put(&object.path, Bytes::from(pack.bytes).into()).await;
            put.map(|_| pack.data).map_err(|error| object.failed(&error))
        });
        Ok(())
    }

    /// Removes what it has put.
    pub(super) async fn abandon(mut self) {
        self.is_over = true;
        self.refresh.abort();
        remove_folder(self.object.clone(), self.folder.clone()).await;
    }

    /// Refuses an upload that may have been pruned.
    async fn check_lease(&self) -> Result<(), StoreError> {
        let lease = self.object.at(self.folder.clone().join(LEASE));
        let since = now().saturating_sub(*lock(&self.renewed));
        match lease.store.head(&lease.path).await {
            Ok(_) if since < STALE => Ok(()),
            Ok(_) | Err(object_store::Error::NotFound { .. }) => {
                let why = "the upload took too long without a sign of life: it may be pruned";
                Err(StoreError::new(StoreErrorKind::Refused, format!("{}: {why}", self.object)))
            }
            Err(error) => Err(lease.failed(&error)),
        }
    }

    /// Puts the index: from now on the image is there. With `replace` it takes the place of another
    /// image.
    ///
    /// # Errors
    /// If there is an object of this name that may not be replaced, or the store refuses. Then
    /// nothing is left of it, and what has this name is unchanged. If the store does not answer, it
    /// is not known whether the image is there; its packs stay.
    pub(super) async fn commit(mut self, replace: bool) -> Result<u64, StoreError> {
        let object = self.object.clone();
        check_free(&object, replace, &MAGIC, "an image").await?;
        self.check_lease().await?;
        let (bytes, upload) = (Bytes::from(self.index.encode()), self.index.upload);
        // The store may carry the request out although nobody hears of it: its answer is lost, or
        // this is dropped while it waits. So from now on its packs stay, and `prune` decides.
        self.is_over = true;
        if let Err(error) = put_named(&object, bytes, replace).await {
            self.is_over = error.is_unreachable();
            return Err(error);
        }
        let lease = object.at(self.folder.clone().join(LEASE));
        match lease.store.head(&lease.path).await {
            Err(error @ object_store::Error::NotFound { .. }) => {
                if upload_of(&object).await? == Some(upload) {
                    let _ = object.store.delete(&object.path).await;
                }
                self.is_over = false;
                let why = "the upload was taken for dead, and pruned: it took too long";
                log::debug!("{error}");
                return Err(StoreError::new(StoreErrorKind::Refused, format!("{object}: {why}")));
            }
            // The store cannot say it now. The image is complete, and somebody may use it.
            Err(error) => log::warn!("{}", lease.failed(&error)),
            Ok(_) => {}
        }
        if let Err(error) = lease.store.delete(&lease.path).await {
            log::warn!("{}", lease.failed(&error));
        }
        Ok(self.bytes)
    }
}

/// The upload to which the image at `object` belongs; `None` if it is no image.
pub(super) async fn upload_of(object: &Object) -> Result<Option<[u8; 16]>, StoreError> {
    let bytes = match object.store.get_range(&object.path, 0..64).await {
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Ok(found) => found,
        // It has less.
        Err(error) => match object.store.head(&object.path).await {
            Ok(meta) if meta.size < 64 => return Ok(None),
            _ => return Err(object.failed(&error)),
        },
    };
    let upload = bytes.get(40..56).and_then(|upload| upload.try_into().ok());
    Ok(upload.filter(|_| bytes.starts_with(&MAGIC)))
}

/// The time since this machine was started, also while it was suspended.
fn now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

/// Refuses the name of `object` if there is one that may not be replaced: any, or with `replace`
/// one that does not begin with `magic`.
///
/// # Errors
/// If so, or the store cannot say it.
pub(super) async fn check_free(
    object: &Object, replace: bool, magic: &[u8], kind: &str,
) -> Result<(), StoreError> {
    let exists =
        |what: &str| Err(StoreError::new(StoreErrorKind::Exists, format!("{object}: {what}")));
    let found = object.store.get_range(&object.path, 0..magic.len() as u64).await;
    match found {
        Err(object_store::Error::NotFound { .. }) => Ok(()),
        Ok(_) if !replace => exists("it exists already: use --replace"),
        Ok(found) if found == magic => Ok(()),
        Ok(_) => exists(&format!("the object is not {kind}, and is not replaced")),
        // Shorter than the magic: the range is refused.
        Err(error) => match object.store.head(&object.path).await {
            Ok(meta) if meta.size < magic.len() as u64 => {
                exists(&format!("the object is not {kind}, and is not replaced"))
            }
            _ => Err(object.failed(&error)),
        },
    }
}

/// Puts an object. Without `replace` there must be none of this name. The answer to a request may
/// be lost, so an object that is there and has these bytes is the one that was put.
///
/// # Errors
/// If there is another one, or the store refuses or does not answer.
pub(super) async fn put_named(
    object: &Object, bytes: Bytes, replace: bool,
) -> Result<(), StoreError> {
    let mode = if replace { PutMode::Overwrite } else { PutMode::Create };
    let mut attempt = 1;
    loop {
        let (payload, options) = (bytes.clone().into(), PutOptions::from(mode.clone()));
        let put = object.store.put_opts(&object.path, payload, options).await;
        let Err(error) = put.map_err(|error| object.failed(&error)) else { return Ok(()) };
        if !matches!(error.kind, StoreErrorKind::Exists | StoreErrorKind::Unreachable) {
            return Err(error);
        }
        match object.store.get(&object.path).await {
            Ok(found) => {
                let found = found.bytes().await.map_err(|error| object.failed(&error))?;
                return if found == bytes { Ok(()) } else { Err(error) };
            }
            Err(_) if attempt == ATTEMPTS => return Err(error),
            Err(_) => attempt += 1,
        }
        tokio::time::sleep(PAUSE * attempt).await;
    }
}

async fn put_lease(object: &Object, folder: &Path) -> Result<(), StoreError> {
    let lease = object.at(folder.clone().join(LEASE));
    let put = lease.store.put(&lease.path, Bytes::from_static(b"an upload runs\n").into()).await;
    put.map(drop).map_err(|error| lease.failed(&error))
}

/// Writes the lease anew from time to time, but not one that somebody has removed.
async fn refresh(object: Object, folder: Path, renewed: Arc<Mutex<Duration>>) {
    loop {
        tokio::time::sleep(REFRESH).await;
        let before = now();
        // It may be pruned already, and must not come back to life.
        if before.saturating_sub(*lock(&renewed)) >= STALE {
            return;
        }
        let path = folder.clone().join(LEASE);
        match object.store.head(&path).await {
            Err(object_store::Error::NotFound { .. }) => return,
            _ => match put_lease(&object, &folder).await {
                Ok(()) => *lock(&renewed) = before,
                Err(error) => log::warn!("{error}"),
            },
        }
    }
}

/// A piece as it lies in a pack: its form, the hash of its content, and its bytes.
type Packed = (Form, [u8; 16], Vec<u8>);

/// Bytes in this part of the file that are not in a hole.
fn data_bytes(file: &File, part: Range<u64>) -> u64 {
    let data = crate::image::bytes::data_in(file.as_fd(), part);
    data.map(|data| data.end - data.start).sum()
}

/// Packs a piece of the file; `None` if it has no content. Returns the bytes of its data, too.
fn pack(file: &File, offset: u64, length: usize) -> std::io::Result<(u64, Option<Packed>)> {
    let data = data_bytes(file, offset..offset + length as u64);
    if data == 0 {
        return Ok((0, None));
    }
    let mut content = vec![0; length];
    file.read_exact_at(&mut content, offset)?;
    if content.iter().fold(0, |sum, byte| sum | byte) == 0 {
        return Ok((data, None));
    }
    let hash = hash_of(&content);
    let packed = zstd::bulk::compress(&content, LEVEL)?;
    let is_shorter = packed.len() < content.len();
    let (form, packed) = if is_shorter { (Form::Zstd, packed) } else { (Form::Plain, content) };
    Ok((data, Some((form, hash, packed))))
}
