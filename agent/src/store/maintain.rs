// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an operator does with a store: list its images, and remove what belongs to none.
//!
//! # What may be removed
//!
//! The folder of an upload may go if the image of its name belongs to another upload, or is gone,
//! and the upload does not run. The order of the looks decides:
//!
//! 1. The lease. If there is none, the upload has ended, or has put nothing yet. If it is fresh,
//!    the upload runs. If it is old, the upload counts as dead, and the lease is removed.
//! 2. The image of the name. An upload puts its index before it removes its lease: if the lease was
//!    gone in step 1, an index that it has put is found now. An upload that was taken for dead and
//!    puts its index later looks for its lease then, and takes the index back.
//!
//! What is younger than a given age stays in any case: a guest may still be restored from an image
//! that was replaced.

use super::error::StoreError;
use super::names::{Name, Object, Stores};
use super::upload::{LEASE, new_id, upload_of};
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStoreExt};
use pageferry_protocol::image::id_text;
use pageferry_protocol::image::stored::{Index, MAX_SIZE};
use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

/// An upload whose lease is older than this has ended: it writes it every minute.
const DEAD: Duration = Duration::from_secs(3600);
/// Number of images that are looked at, and of objects that are removed, at a time.
const AT_ONCE: usize = 16;

/// An image in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedImage {
    /// Its name.
    pub name: String,
    /// Its index, or why that cannot be read.
    pub index: Result<ListedIndex, StoreError>,
    /// When it was put there, in seconds since 1970.
    pub put: i64,
}

/// What the index of an image says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedIndex {
    /// The id of the image.
    pub id: String,
    /// Length of the image file in bytes.
    pub length: u64,
    /// Bytes of its content in that file, in whole pieces.
    pub content: u64,
    /// Bytes that it takes in the store.
    pub stored: u64,
}

/// What was removed, or would be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    /// The folders of uploads.
    pub folders: Vec<String>,
    /// Objects in them.
    pub objects: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Uploads that run.
    pub running: u64,
    /// Folders that belong to no image, and are younger than the given age.
    pub young: u64,
}

/// Runs this on a runtime of its own.
fn block_on<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| StoreError::cache("start a runtime", error))?.block_on(work)
}

/// All objects below the name of `object`.
async fn objects(object: &Object) -> Result<Vec<ObjectMeta>, StoreError> {
    let prefix = Some(&object.path).filter(|path| !path.as_ref().is_empty());
    object.store.list(prefix).try_collect().await.map_err(|error| object.failed(&error))
}

/// The image and the folder of the upload to which an object belongs; `None` for other objects.
fn upload_folder(path: &Path) -> Option<(Path, Path)> {
    let parts: Vec<_> = path.parts().collect();
    let at = parts.iter().position(|part| part.as_ref().ends_with(".parts"))?;
    let id = parts.get(at + 1)?;
    // Something is in the folder.
    parts.get(at + 2)?;
    let is_id = id.as_ref().len() == 32 && id.as_ref().bytes().all(|byte| byte.is_ascii_hexdigit());
    let name = parts[at].as_ref().strip_suffix(".parts")?.to_owned();
    let image = parts[..at].iter().cloned().chain([name.into()]).collect();
    is_id.then(|| (image, parts[..at + 2].iter().cloned().collect()))
}

/// The image `name`, and the images below it, in the order of their names.
///
/// # Errors
/// If `name` is no name of a store, or the store does not answer.
pub fn list(name: &str) -> Result<Vec<ListedImage>, StoreError> {
    let name = Name::parse(name)?;
    block_on(async {
        let object = Stores::default().find(&name)?;
        let objects = objects(&object).await?;
        let uploaded: std::collections::BTreeSet<Path> = objects
            .iter()
            .filter_map(|meta| upload_folder(&meta.location))
            .map(|(image, _)| image)
            .collect();
        let mut images = objects;
        images.retain(|meta| uploaded.contains(&meta.location));
        // The list has only what is below the name.
        if !object.path.as_ref().is_empty() && upload_of(&object).await?.is_some() {
            let meta = object.store.head(&object.path).await;
            images.push(meta.map_err(|error| object.failed(&error))?);
        }
        let look = |meta: ObjectMeta| {
            let object = object.at(meta.location.clone());
            async move {
                let index = read_index(&object, meta.size).await;
                let put = meta.last_modified.timestamp();
                ListedImage { name: object.to_string(), index, put }
            }
        };
        let mut images: Vec<ListedImage> =
            stream::iter(images).map(look).buffered(AT_ONCE).collect().await;
        images.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(images)
    })
}

async fn read_index(object: &Object, size: u64) -> Result<ListedIndex, StoreError> {
    if size > MAX_SIZE {
        return Err(StoreError::damaged(format!("{object}: an index has no {size} bytes")));
    }
    let failed = |error: object_store::Error| object.failed(&error);
    let found = object.store.get(&object.path).await.map_err(failed)?;
    let bytes = found.bytes().await.map_err(failed)?;
    let index = Index::decode(&bytes).map_err(|error| {
        StoreError::damaged(format!("{object}: {}", crate::error::chain(&error)))
    })?;
    let stored: u64 = index.pieces.iter().map(|piece| u64::from(piece.length)).sum();
    let content = index.pieces.iter().map(|piece| index.content_length(piece.number)).sum();
    let (id, length) = (id_text(&index.image), index.length);
    Ok(ListedIndex { id, length, content, stored: stored + bytes.len() as u64 })
}

/// Removes the folders of uploads below `name` that belong to no image and are older than `age`.
/// With `dry_run` it only says which.
///
/// # Errors
/// If `name` is no name of a store, or the store does not answer.
pub fn prune(name: &str, age: Duration, dry_run: bool) -> Result<Pruned, StoreError> {
    let name = Name::parse(name)?;
    block_on(async {
        let object = Stores::default().find(&name)?;
        // Whoever only looks may have no right to write.
        let now = if dry_run { Utc::now() } else { time_of_store(&object).await? };
        let old = |then: DateTime<Utc>, age: Duration| {
            now.signed_duration_since(then).to_std().is_ok_and(|since| since >= age)
        };
        let mut folders: BTreeMap<(Path, Path), Vec<ObjectMeta>> = BTreeMap::new();
        for meta in objects(&object).await? {
            if let Some(folder) = upload_folder(&meta.location) {
                folders.entry(folder).or_default().push(meta);
            }
        }
        let mut pruned = Pruned::default();
        for ((image, folder), objects) in folders {
            let image = object.at(image);
            let lease = object.at(folder.clone().join(LEASE));
            match lease.store.head(&lease.path).await {
                Ok(meta) if !old(meta.last_modified, DEAD) => {
                    pruned.running += 1;
                    continue;
                }
                Ok(_) if !dry_run => {
                    lease.store.delete(&lease.path).await.map_err(|error| lease.failed(&error))?;
                }
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(lease.failed(&error)),
            }
            let id = folder.filename().unwrap_or_default().to_owned();
            let owner = upload_of(&image).await?.map(|upload| id_text(&upload));
            if owner.as_ref() == Some(&id) {
                continue;
            }
            let mut newest = objects.iter().map(|meta| meta.last_modified).max();
            if owner.is_some() {
                // Since then nobody has begun to read the one that was replaced.
                let replaced = image.store.head(&image.path).await;
                newest = newest.max(replaced.ok().map(|meta| meta.last_modified));
            }
            if !newest.is_some_and(|newest| old(newest, age)) {
                pruned.young += 1;
                continue;
            }
            pruned.folders.push(object.at(folder.clone()).to_string());
            pruned.objects += objects.len() as u64;
            pruned.bytes += objects.iter().map(|meta| meta.size).sum::<u64>();
            if !dry_run {
                remove(&object, objects).await?;
            }
        }
        Ok(pruned)
    })
}

async fn remove(object: &Object, objects: Vec<ObjectMeta>) -> Result<(), StoreError> {
    let remove = |meta: ObjectMeta| {
        let object = object.at(meta.location);
        async move {
            match object.store.delete(&object.path).await {
                // Somebody else was faster.
                Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(object.failed(&error)),
            }
        }
    };
    stream::iter(objects).map(remove).buffered(AT_ONCE).try_collect::<Vec<()>>().await.map(drop)
}

/// The time by the clock of the store: that of this machine may be another.
async fn time_of_store(object: &Object) -> Result<DateTime<Utc>, StoreError> {
    let name = format!(".prune-{}", id_text(&new_id()?));
    let mark = object.at(object.path.clone().join(name));
    let failed = |error: object_store::Error| mark.failed(&error);
    let bytes = bytes::Bytes::from_static(b"the time\n");
    mark.store.put(&mark.path, bytes.into()).await.map_err(failed)?;
    let found = mark.store.head(&mark.path).await.map_err(failed);
    let _ = mark.store.delete(&mark.path).await;
    Ok(found?.last_modified)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_of_an_upload_is_told_from_others() {
        let id = "0123456789abcdef0123456789abcdef";
        let of = |path: &str| upload_folder(&Path::from(path));
        let found = of(&format!("vm/a.parts/{id}/00000000")).unwrap();
        assert_eq!(found, (Path::from("vm/a"), Path::from(format!("vm/a.parts/{id}"))));
        assert_eq!(of(&format!("a.parts/{id}/lease")).unwrap().0, Path::from("a"));
        for other in ["vm/a", "vm/a.parts/x/0", &format!("vm/a.parts/{id}"), &format!("a/{id}/0")] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
