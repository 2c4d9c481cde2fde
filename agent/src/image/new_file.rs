// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Creating a file atomically: at its path there is the whole file, or none.
//!
//! While the file is written it has no name (`O_TMPFILE`), so nothing is left of it if this process
//! is killed. If the file system does not support that, the file has a temporary name in the same
//! folder, which is removed if the file is dropped before it is finished. When all bytes are
//! written, the file is synced to the disk, and then gets its name in one step.
//!
//! An object of a store is written to a file of the cache, and put into the store when it has all
//! bytes.
//!
//! An existing file is replaced only if the caller allows it, and only if its first bytes say that
//! it is of the same kind. Whatever fails, the existing file is unchanged.

use super::bytes::write_at;
use super::error::{ImageError, ImageFault, kernel};
use crate::lock::lock;
use crate::opener;
use crate::store::{self, NewObject};
use pageferry_protocol::image::header::MAGIC;
use pageferry_protocol::image::working_set;
use rustix::fs::{FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Number of temporary names.
const ATTEMPTS: u32 = 100;

/// Bytes of the longest magic.
const LONGEST_MAGIC: usize = 8;

/// Mode of the new file: its owner may read and write it.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// The kind of a file, recognized by its first bytes. Files that anybody may have written have no
/// such bytes: they are recognized by their length, or by not being of another kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileKind {
    /// Its name, with an article.
    name: &'static str,
    /// The first bytes of every file of this kind. If there are none, no file of a kind that has
    /// them is of this kind.
    magic: &'static [u8],
    /// The length of every file of this kind; `None` if they differ.
    length: Option<u64>,
}

impl FileKind {
    /// An image of a guest.
    pub const IMAGE: Self = Self { name: "an image", magic: &MAGIC, length: None };
    /// A picture of an image.
    pub const PNG: Self = Self { name: "a PNG picture", magic: b"\x89PNG\r\n\x1a\n", length: None };
    /// The working set of a restore.
    pub const WORKING_SET: Self =
        Self { name: "a working set", magic: &working_set::MAGIC, length: None };
    /// State of a VMM, of any format and length.
    pub const STATE: Self = Self { name: "state of a VMM", magic: b"", length: None };

    /// A raw file of a guest's memory, of this length in bytes.
    pub const fn memory(length: u64) -> Self {
        Self { name: "a memory file of the same length", magic: b"", length: Some(length) }
    }

    /// True if a file of `length` bytes that begins with `start` can be of this kind.
    fn fits(self, start: &[u8], length: u64) -> bool {
        let is_other = || {
            let mut others = [Self::IMAGE, Self::PNG, Self::WORKING_SET].into_iter();
            others.any(|other| start.starts_with(other.magic))
        };
        start.starts_with(self.magic)
            && self.length.is_none_or(|expected| expected == length)
            && !(self.magic.is_empty() && is_other())
    }

    /// Refuses to replace a file of another kind at `path`: it holds something else, which nobody
    /// asked to delete.
    fn check(self, path: &Path) -> Result<(), ImageFault> {
        let failed =
            |source| ImageFault::Kernel { what: "read the file that would be replaced", source };
        // Does not follow a link, and does not wait if the path is a pipe or a device.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
        let file = match opener::open(path, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(()),
            file => file.map_err(failed)?,
        };
        let mut start = [0; LONGEST_MAGIC];
        let found = rustix::io::pread(&file, &mut start, 0).map_err(failed)?;
        let stat = rustix::fs::fstat(&file).map_err(failed)?;
        if self.fits(&start[..found], u64::try_from(stat.st_size).unwrap_or(0)) {
            return Ok(());
        }
        // Its content may be a secret, and is not said.
        Err(ImageFault::OtherKind { kind: self.name })
    }
}

/// A file that is being written.
#[derive(Debug)]
pub struct NewFile {
    file: Spool,
    /// The path that it will have.
    path: PathBuf,
    folder: PathBuf,
    /// The temporary name that it has now; `None` if it has no name.
    temporary: Mutex<Option<PathBuf>>,
    /// The kind of file that it may replace; `None` if it may replace none.
    replace: Option<FileKind>,
}

/// Where its bytes are written.
#[derive(Debug)]
enum Spool {
    /// Into the file itself.
    Local(OwnedFd),
    /// Into a file from which a store gets them.
    Stored(NewObject),
}

impl AsFd for Spool {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Local(file) => file.as_fd(),
            Self::Stored(object) => object.as_fd(),
        }
    }
}

impl NewFile {
    /// A file that will be at `path`. With `replace` it replaces an existing file of the same kind.
    /// It never replaces anything else: a file of another kind, a folder, a device or a link.
    ///
    /// # Errors
    /// If a file exists and may not be replaced, `path` is not an absolute path of a file, or the
    /// folder cannot be written. [`NewFile::finish`] checks again, because that can change.
    pub fn create(path: &Path, kind: FileKind, replace: bool) -> Result<Self, ImageFault> {
        if store::is_stored(path) {
            let object = NewObject::create(path, replace, kind.magic, kind.name)?;
            let file = Spool::Stored(object);
            return Ok(Self::of(file, path, Path::new(""), None, replace.then_some(kind)));
        }
        let replace = replace.then_some(kind);
        let (Some(folder), Some(name), true) =
            (path.parent(), path.file_name(), path.is_absolute())
        else {
            return Err(ImageFault::NotAFilePath);
        };
        // A path that ends in `/` or `/.` is the path of a folder.
        if !path.as_os_str().as_bytes().ends_with(name.as_bytes()) {
            return Err(ImageFault::NotAFilePath);
        }
        match rustix::fs::lstat(path) {
            Ok(stat) if !FileType::from_raw_mode(stat.st_mode).is_file() => {
                return Err(ImageFault::NotARegularFile);
            }
            Ok(_) => replace.ok_or(ImageFault::Exists)?.check(path)?,
            Err(Errno::NOENT) => {}
            Err(source) => {
                return Err(ImageFault::Kernel { what: "create a file in its folder", source });
            }
        }
        if let Some(file) = Self::unnamed(path, folder, replace)? {
            return Ok(file);
        }
        Self::named(path, folder, replace)
    }

    /// A file without a name; `None` if the file system does not support such files.
    fn unnamed(
        path: &Path, folder: &Path, replace: Option<FileKind>,
    ) -> Result<Option<Self>, ImageFault> {
        match opener::open(folder, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, MODE) {
            Ok(file) => Ok(Some(Self::of(Spool::Local(file), path, folder, None, replace))),
            // The file system or the kernel does not support `O_TMPFILE`. An old kernel ignores the
            // flag and tries to open the folder itself.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => Ok(None),
            Err(source) => Err(ImageFault::Kernel { what: "create a file in its folder", source }),
        }
    }

    /// A file with a temporary name.
    fn named(path: &Path, folder: &Path, replace: Option<FileKind>) -> Result<Self, ImageFault> {
        let mut attempts = temporary_names(path);
        loop {
            let name = attempts.next().ok_or_else(|| no_name(path))?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
            match opener::open(&name, flags, MODE) {
                Ok(file) => {
                    let file = Spool::Local(file);
                    return Ok(Self::of(file, path, folder, Some(name), replace));
                }
                Err(Errno::EXIST) => {}
                Err(source) => {
                    return Err(ImageFault::Kernel { what: "create a file in its folder", source });
                }
            }
        }
    }

    fn of(
        file: Spool, path: &Path, folder: &Path, temporary: Option<PathBuf>,
        replace: Option<FileKind>,
    ) -> Self {
        let (path, folder) = (path.to_owned(), folder.to_owned());
        Self { file, path, folder, temporary: Mutex::new(temporary), replace }
    }

    /// The path that it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the file a second time, for direct I/O; `None` if the file system does not support it.
    pub fn direct(&self) -> Option<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
        opener::reopen(self.file.as_fd(), flags).ok()
    }

    /// Syncs the file to the disk and gives it its name.
    ///
    /// # Errors
    /// If the file system refuses, or another file has appeared at the path and may not be
    /// replaced. Then the file at the path is unchanged.
    pub fn finish(&self) -> Result<(), ImageFault> {
        self.sync()?;
        self.persist()
    }

    /// Waits until all written bytes are on the disk.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn sync(&self) -> Result<(), ImageFault> {
        match &self.file {
            Spool::Local(file) => {
                rustix::fs::fsync(file).map_err(kernel("sync the file to the disk"))
            }
            // It is of no use after a crash.
            Spool::Stored(_) => Ok(()),
        }
    }

    /// Puts all of an image into its store but what makes it one, which is left to
    /// [`NewFile::persist`]. Calls `progress` with the bytes of data that are there, and the bytes
    /// of all data. Does nothing for a file of this machine.
    ///
    /// # Errors
    /// If it is cancelled, or the store refuses.
    pub fn upload(&self, progress: &dyn Fn(u64, u64)) -> Result<(), ImageFault> {
        match &self.file {
            Spool::Local(_) => Ok(()),
            Spool::Stored(object) => Ok(object.upload(progress)?),
        }
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// As [`NewFile::finish`].
    pub fn persist(&self) -> Result<(), ImageFault> {
        if let Spool::Stored(object) = &self.file {
            return Ok(object.finish()?);
        }
        let mut named = lock(&self.temporary);
        let temporary = match &*named {
            Some(name) => name.clone(),
            // If no file exists at the path, the file gets its name at once. A temporary name would
            // be left behind if this process were killed before the rename.
            None if self.link_as(&self.path)? => return self.sync_folder(),
            None if self.replace.is_some() => named.insert(self.link()?).clone(),
            None => return Err(ImageFault::Exists),
        };
        let flags = match self.replace {
            // Checked again: another file may have appeared at the path since the start.
            Some(kind) => kind.check(&self.path).map(|()| RenameFlags::empty())?,
            None => RenameFlags::NOREPLACE,
        };
        match opener::rename(&temporary, &self.path, flags) {
            Ok(()) => {}
            // The file system does not support the flag. Then a check before the rename must do.
            Err(Errno::INVAL | Errno::NOSYS)
                if self.replace.is_none() && self.path.symlink_metadata().is_err() =>
            {
                opener::rename(&temporary, &self.path, RenameFlags::empty())
                    .map_err(kernel("name the file"))?;
            }
            Err(Errno::EXIST) => return Err(ImageFault::Exists),
            Err(source) => return Err(ImageFault::Kernel { what: "name the file", source }),
        }
        *named = None;
        self.sync_folder()
    }

    /// Syncs the folder, so that the file has its name also after a power failure. If the sync
    /// fails, the file has its name now, so this is not an error.
    fn sync_folder(&self) -> Result<(), ImageFault> {
        let folder = opener::open(&self.folder, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        if let Err(errno) = folder.and_then(rustix::fs::fsync) {
            log::warn!(
                "{} is complete, but its folder cannot be synced: \
                 a power failure may lose the file: {errno}",
                self.path.display()
            );
        }
        Ok(())
    }

    /// Gives a file without a name a temporary name.
    fn link(&self) -> Result<PathBuf, ImageFault> {
        for name in temporary_names(&self.path) {
            if self.link_as(&name)? {
                return Ok(name);
            }
        }
        Err(no_name(&self.path))
    }

    /// Gives a file without a name the name `name`. Returns false if another file has that name.
    fn link_as(&self, name: &Path) -> Result<bool, ImageFault> {
        match opener::link(self.file.as_fd(), name) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(source) => Err(ImageFault::Kernel { what: "name the file", source }),
        }
    }
}

/// Writes `bytes` to a new file at `path`. With `replace` it replaces a file of the same kind.
///
/// # Errors
/// If a file exists and may not be replaced, or the file system refuses. Then the file at `path` is
/// unchanged.
pub fn write_new(
    path: &Path, bytes: &[u8], kind: FileKind, replace: bool,
) -> Result<(), ImageError> {
    let write = || {
        let file = NewFile::create(path, kind, replace)?;
        write_at(file.as_fd(), bytes, 0)?;
        file.finish()
    };
    write().map_err(|fault: ImageFault| fault.of(path))
}

/// Temporary names in the folder of `path`. They do not contain the name of `path`, so they are
/// never too long.
fn temporary_names(path: &Path) -> impl Iterator<Item = PathBuf> {
    let folder = path.parent().map(Path::to_owned).unwrap_or_default();
    let process = std::process::id();
    (0..ATTEMPTS).map(move |attempt| folder.join(format!(".pageferry-{process}-{attempt}.part")))
}

/// The fault that all temporary names are in use.
fn no_name(path: &Path) -> ImageFault {
    let first = temporary_names(path).next().unwrap_or_default();
    ImageFault::NoTemporaryName { first, others: ATTEMPTS - 1 }
}

impl AsFd for NewFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(name) = self.temporary.get_mut().unwrap_or_else(PoisonError::into_inner)
            && let Err(errno) = opener::unlink(name)
        {
            log::warn!("cannot remove the unfinished file {}: {errno}", name.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &Path) -> Vec<String> {
        let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A new file. With `named` it has a temporary name; otherwise it has none if the file system
    /// supports that.
    fn create(path: &Path, replace: bool, named: bool) -> NewFile {
        let replace = replace.then_some(KIND);
        let folder = path.parent().unwrap();
        let unnamed = if named { None } else { NewFile::unnamed(path, folder, replace).unwrap() };
        unnamed.unwrap_or_else(|| NewFile::named(path, folder, replace).unwrap())
    }

    const KIND: FileKind = FileKind { name: "a poem", magic: b"o", length: None };

    fn has_name(file: &NewFile) -> bool {
        file.temporary.lock().unwrap().is_some()
    }

    #[test]
    fn at_the_path_is_the_whole_file_or_none() {
        for named in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("image");
            let file = create(&path, false, named);
            rustix::io::write(&file, b"half").unwrap();
            drop(file);
            assert_eq!(files(folder.path()), Vec::<String>::new());
            let file = create(&path, false, named);
            rustix::io::write(&file, b"whole").unwrap();
            let meanwhile = files(folder.path());
            let temporary =
                |name: &String| name.starts_with(".pageferry-") && name.ends_with(".part");
            assert!(
                meanwhile.len() == usize::from(has_name(&file)) && meanwhile.iter().all(temporary),
                "{meanwhile:?}"
            );
            file.finish().unwrap();
            drop(file);
            assert_eq!(
                (files(folder.path()), std::fs::read(&path).unwrap()),
                (vec!["image".to_owned()], b"whole".to_vec())
            );
        }
    }

    #[test]
    fn an_existing_file_is_replaced_only_if_allowed() {
        for named in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("image");
            let only = |content: &[u8]| {
                assert_eq!(files(folder.path()), ["image"]);
                assert_eq!(std::fs::read(&path).unwrap(), content);
            };
            let late = create(&path, false, named);
            std::fs::write(&path, "old").unwrap();
            assert!(matches!(NewFile::create(&path, KIND, false), Err(ImageFault::Exists)));
            assert!(matches!(late.finish(), Err(ImageFault::Exists)));
            drop(late);
            only(b"old");
            let file = create(&path, true, named);
            rustix::io::write(&file, b"new").unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"old");
            file.finish().unwrap();
            drop(file);
            only(b"new");
        }
    }

    #[test]
    fn a_temporary_name_in_use_is_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let names: Vec<PathBuf> = temporary_names(&path).collect();
        names[1..].iter().for_each(|name| std::fs::write(name, "other").unwrap());
        let first = create(&path, true, true);
        // A file without a name needs a temporary name to replace another file.
        std::fs::write(&path, "old").unwrap();
        assert!(matches!(
            NewFile::named(&path, folder.path(), Some(KIND)),
            Err(ImageFault::NoTemporaryName { .. })
        ));
        if let Some(file) = NewFile::unnamed(&path, folder.path(), Some(KIND)).unwrap() {
            assert!(matches!(file.finish(), Err(ImageFault::NoTemporaryName { .. })));
        }
        rustix::io::write(&first, b"o").unwrap();
        first.finish().unwrap();
        create(&path, true, false).finish().unwrap();
        assert!(names[1..].iter().all(|name| std::fs::read(name).unwrap() == b"other"));
        assert!(!names[0].exists() && std::fs::read(&path).unwrap().is_empty());
    }

    #[test]
    fn a_file_of_another_kind_is_refused_at_the_start() {
        for named in [false, true] {
            for kind in [FileKind::IMAGE, FileKind::PNG, FileKind::WORKING_SET] {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().join("file");
                for other in [&b"precious"[..], b"", &kind.magic[..3]] {
                    std::fs::write(&path, other).unwrap();
                    let error = NewFile::create(&path, kind, true).unwrap_err().to_string();
                    assert!(
                        error.starts_with(&format!("the file is not {}", kind.name)),
                        "{error}"
                    );
                    assert_eq!(std::fs::read(&path).unwrap(), other);
                }
                // A file of another kind appears while the new one is written.
                std::fs::write(&path, kind.magic).unwrap();
                drop(NewFile::create(&path, kind, true).unwrap());
                let late = match named {
                    true => NewFile::named(&path, folder.path(), Some(kind)).unwrap(),
                    false => NewFile::create(&path, kind, true).unwrap(),
                };
                std::fs::write(&path, "precious").unwrap();
                assert!(matches!(late.finish(), Err(ImageFault::OtherKind { .. })));
                drop(late);
                assert_eq!(
                    (files(folder.path()).len(), std::fs::read(&path).unwrap()),
                    (1, b"precious".to_vec())
                );
            }
        }
    }

    #[test]
    fn a_path_that_is_not_a_regular_file_is_refused_at_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let [image, link, nowhere, inner, socket] =
            ["image", "link", "nowhere", "inner", "socket"].map(|name| folder.path().join(name));
        std::fs::write(&image, "old").unwrap();
        std::os::unix::fs::symlink(&image, &link).unwrap();
        std::os::unix::fs::symlink("none", &nowhere).unwrap();
        std::fs::create_dir(&inner).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [&link, &nowhere, &inner, &socket, Path::new("/dev/null")] {
            for replace in [false, true] {
                assert!(
                    matches!(
                        NewFile::create(path, KIND, replace),
                        Err(ImageFault::NotARegularFile)
                    ),
                    "{}",
                    path.display()
                );
            }
        }
        for (path, errno) in [
            (folder.path().join("n".repeat(256)), Errno::NAMETOOLONG),
            (image.join("x"), Errno::NOTDIR),
        ] {
            let refused = NewFile::create(&path, KIND, true).unwrap_err();
            assert!(
                matches!(refused, ImageFault::Kernel { source, .. } if source == errno),
                "{refused}"
            );
        }
        assert_eq!(files(folder.path()), ["image", "inner", "link", "nowhere", "socket"]);
    }

    #[test]
    fn left_over_temporary_files_are_named_in_the_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, "old").unwrap();
        let file = NewFile::create(&path, KIND, true).unwrap();
        temporary_names(&path).for_each(|name| std::fs::write(name, "left over").unwrap());
        let error = file.finish().unwrap_err().to_string();
        let first = temporary_names(&path).next().unwrap();
        assert!(error.starts_with(&format!("{} and 99 more", first.display())), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn a_relative_path_and_the_path_of_a_folder_are_refused() {
        for path in ["image", "/", "/tmp/..", "/tmp/image/", "/tmp/image/."] {
            assert!(
                matches!(
                    NewFile::create(Path::new(path), KIND, true),
                    Err(ImageFault::NotAFilePath)
                ),
                "{path}"
            );
        }
        assert!(matches!(
            NewFile::create(Path::new("/no/such/folder"), KIND, true),
            Err(ImageFault::Kernel { .. })
        ));
    }
}
