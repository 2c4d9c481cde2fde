//! A file that is there whole, or not at all.
//!
//! It has no name while it is written, where the file system knows such files, so that nothing is
//! left of it whatever kills this process. Elsewhere it has a temporary name in the same folder,
//! which is taken away if it is not finished. When it is finished and safe on the disk, it gets its
//! name in one step.

use super::bytes::write_at;
use super::{Fault, ImageError, kernel};
use pageferry_protocol::image::header::MAGIC;
use pageferry_protocol::image::working_set;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Attempts to find a temporary name that is free.
const ATTEMPTS: u32 = 100;

/// Who may read and write it.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// What a file holds, as its first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileKind {
    /// Its name, with an article.
    name: &'static str,
    magic: &'static [u8],
}

impl FileKind {
    /// An image of a guest.
    pub const IMAGE: Self = Self { name: "an image", magic: &MAGIC };
    /// A picture of one.
    pub const PNG: Self = Self { name: "a PNG picture", magic: b"\x89PNG\r\n\x1a\n" };
    /// The working set of a restore.
    pub const WORKING_SET: Self = Self { name: "a working set", magic: &working_set::MAGIC };

    /// Refuses to replace what is at `path` if it is of another kind: it is somebody's.
    fn check(self, path: &Path) -> Result<(), Fault> {
        let failed =
            |source| Fault::Kernel { what: "read what is there, which is to be replaced", source };
        // Not a link, and nothing that a reader would wait for.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(()),
            file => file.map_err(failed)?,
        };
        let mut found = vec![0; self.magic.len()];
        let length = rustix::io::pread(&file, &mut found, 0).map_err(failed)?;
        if found[..length] == *self.magic {
            return Ok(());
        }
        found.truncate(length);
        Err(Fault::OtherKind { kind: self.name, expected: self.magic, found })
    }
}

/// A file that is being written.
#[derive(Debug)]
pub struct NewFile {
    file: OwnedFd,
    /// The name that it will have.
    path: PathBuf,
    folder: PathBuf,
    /// The name that it has meanwhile.
    temporary: Mutex<Option<PathBuf>>,
    /// It may take the place of a file of this kind.
    replace: Option<FileKind>,
}

impl NewFile {
    /// A file that will be at `path`. With `replace` it takes the place of a file of the same kind
    /// that is there; never of anything else, such as another file, a folder, a device or a link.
    ///
    /// # Errors
    /// If something is there and is not to be replaced, the name is none of a file, or the folder
    /// cannot be written to: as far as that can be told before anything is written.
    pub fn create(path: &Path, kind: FileKind, replace: bool) -> Result<Self, Fault> {
        let replace = replace.then_some(kind);
        let (Some(folder), Some(name), true) =
            (path.parent(), path.file_name(), path.is_absolute())
        else {
            return Err(Fault::Path);
        };
        // Not if it ends in `/` or `/.`, which is a folder's name.
        if !path.as_os_str().as_bytes().ends_with(name.as_bytes()) {
            return Err(Fault::Path);
        }
        match rustix::fs::lstat(path) {
            Ok(stat) if !FileType::from_raw_mode(stat.st_mode).is_file() => {
                return Err(Fault::Kind);
            }
            Ok(_) => replace.ok_or(Fault::Exists)?.check(path)?,
            Err(Errno::NOENT) => {}
            Err(source) => {
                return Err(Fault::Kernel { what: "create a file in its folder", source });
            }
        }
        if let Some(file) = Self::unnamed(path, folder, replace)? {
            return Ok(file);
        }
        Self::named(path, folder, replace)
    }

    /// One without a name meanwhile; `None` where the file system knows no such files.
    fn unnamed(
        path: &Path, folder: &Path, replace: Option<FileKind>,
    ) -> Result<Option<Self>, Fault> {
        match rustix::fs::open(folder, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, MODE) {
            Ok(file) => Ok(Some(Self::of(file, path, folder, None, replace))),
            // The file system has no such files, or the kernel takes the folder for what is to be
            // opened.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => Ok(None),
            Err(source) => Err(Fault::Kernel { what: "create a file in its folder", source }),
        }
    }

    /// One with a temporary name.
    fn named(path: &Path, folder: &Path, replace: Option<FileKind>) -> Result<Self, Fault> {
        let mut attempts = names(path);
        loop {
            let name = attempts.next().ok_or_else(|| no_name(path))?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
            match rustix::fs::open(&name, flags, MODE) {
                Ok(file) => return Ok(Self::of(file, path, folder, Some(name), replace)),
                Err(Errno::EXIST) => {}
                Err(source) => {
                    return Err(Fault::Kernel { what: "create a file in its folder", source });
                }
            }
        }
    }

    fn of(
        file: OwnedFd, path: &Path, folder: &Path, temporary: Option<PathBuf>,
        replace: Option<FileKind>,
    ) -> Self {
        let (path, folder) = (path.to_owned(), folder.to_owned());
        Self { file, path, folder, temporary: Mutex::new(temporary), replace }
    }

    /// The name that it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file once more, past the page cache; `None` where the file system cannot.
    pub fn direct(&self) -> Option<OwnedFd> {
        rustix::fs::open(
            self.by_descriptor(),
            OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .ok()
    }

    fn by_descriptor(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }

    /// Makes it safe, and gives it its name.
    ///
    /// # Errors
    /// If the file system refuses, or something has come to be there meanwhile and is not to be
    /// replaced. What is there is as it was then.
    pub fn finish(&self) -> Result<(), Fault> {
        self.make_safe()?;
        self.name()
    }

    /// Waits until all that was written is on the disk.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn make_safe(&self) -> Result<(), Fault> {
        rustix::fs::fsync(&self.file).map_err(kernel("make the file safe"))
    }

    /// Gives it its name.
    ///
    /// # Errors
    /// As [`NewFile::finish`].
    pub fn name(&self) -> Result<(), Fault> {
        let mut named = self.temporary.lock().unwrap_or_else(PoisonError::into_inner);
        let temporary = match &*named {
            Some(name) => name.clone(),
            // One that takes nobody's place needs no other name first, which would stay behind if
            // this process were killed between the two.
            None if self.link_as(&self.path)? => return self.make_name_safe(),
            None if self.replace.is_some() => named.insert(self.link()?).clone(),
            None => return Err(Fault::Exists),
        };
        let flags = match self.replace {
            // Once more: something else may have come to be there.
            Some(kind) => kind.check(&self.path).map(|()| RenameFlags::empty())?,
            None => RenameFlags::NOREPLACE,
        };
        match rustix::fs::renameat_with(CWD, &temporary, CWD, &self.path, flags) {
            Ok(()) => {}
            // The file system does not know the flag: the look at the start must do.
            Err(Errno::INVAL | Errno::NOSYS)
                if self.replace.is_none() && self.path.symlink_metadata().is_err() =>
            {
                rustix::fs::rename(&temporary, &self.path).map_err(kernel("name the file"))?;
            }
            Err(Errno::EXIST) => return Err(Fault::Exists),
            Err(source) => return Err(Fault::Kernel { what: "name the file", source }),
        }
        *named = None;
        self.make_name_safe()
    }

    /// The file is there, whatever comes of this: what is not certain otherwise is that it is after
    /// the machine loses power.
    fn make_name_safe(&self) -> Result<(), Fault> {
        let folder =
            rustix::fs::open(&self.folder, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        if let Err(errno) = folder.and_then(rustix::fs::fsync) {
            log::warn!(
                "{} is there, and may be gone if the machine loses power: {errno}",
                self.path.display()
            );
        }
        Ok(())
    }

    /// A temporary name for a file that has none.
    fn link(&self) -> Result<PathBuf, Fault> {
        for name in names(&self.path) {
            if self.link_as(&name)? {
                return Ok(name);
            }
        }
        Err(no_name(&self.path))
    }

    /// Gives a file that has no name this one; false if something else has it.
    fn link_as(&self, name: &Path) -> Result<bool, Fault> {
        match rustix::fs::linkat(CWD, self.by_descriptor(), CWD, name, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(source) => Err(Fault::Kernel { what: "name the file", source }),
        }
    }
}

/// A file of these bytes at `path`. With `replace` it takes the place of one of the same kind.
///
/// # Errors
/// If something is there and is not to be replaced, or the file system refuses. What is there is as
/// it was then.
pub fn write_new(
    path: &Path, bytes: &[u8], kind: FileKind, replace: bool,
) -> Result<(), ImageError> {
    let write = || {
        let file = NewFile::create(path, kind, replace)?;
        write_at(file.as_fd(), bytes, 0)?;
        file.finish()
    };
    write().map_err(|fault: Fault| fault.of(path))
}

/// Temporary names beside `path`. They are no longer than the longest name of a file, whatever that
/// of `path` is.
fn names(path: &Path) -> impl Iterator<Item = PathBuf> {
    let folder = path.parent().map(Path::to_owned).unwrap_or_default();
    let process = std::process::id();
    (0..ATTEMPTS).map(move |attempt| folder.join(format!(".pageferry-{process}-{attempt}.part")))
}

/// All of them are taken.
fn no_name(path: &Path) -> Fault {
    Fault::Temporary { first: names(path).next().unwrap_or_default(), others: ATTEMPTS - 1 }
}

impl AsFd for NewFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(name) = self.temporary.get_mut().unwrap_or_else(PoisonError::into_inner)
            && let Err(errno) = rustix::fs::unlink(&*name)
        {
            log::warn!("{} is left behind: {errno}", name.display());
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

    /// A file that has a temporary name, or none where the file system knows such files.
    fn create(path: &Path, replace: bool, named: bool) -> NewFile {
        let replace = replace.then_some(KIND);
        let folder = path.parent().unwrap();
        let unnamed = if named { None } else { NewFile::unnamed(path, folder, replace).unwrap() };
        unnamed.unwrap_or_else(|| NewFile::named(path, folder, replace).unwrap())
    }

    const KIND: FileKind = FileKind { name: "a poem", magic: b"o" };

    fn has_name(file: &NewFile) -> bool {
        file.temporary.lock().unwrap().is_some()
    }

    #[test]
    fn it_is_there_whole_or_not_at_all() {
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
    fn what_is_there_is_replaced_only_if_that_is_wanted() {
        for named in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("image");
            let only = |content: &[u8]| {
                assert_eq!(files(folder.path()), ["image"]);
                assert_eq!(std::fs::read(&path).unwrap(), content);
            };
            let late = create(&path, false, named);
            std::fs::write(&path, "old").unwrap();
            assert!(matches!(NewFile::create(&path, KIND, false), Err(Fault::Exists)));
            assert!(matches!(late.finish(), Err(Fault::Exists)));
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
    fn a_temporary_name_that_is_taken_is_left_to_who_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let names: Vec<PathBuf> = names(&path).collect();
        names[1..].iter().for_each(|name| std::fs::write(name, "other").unwrap());
        let first = create(&path, true, true);
        // One without a name needs one to take the place of another.
        std::fs::write(&path, "old").unwrap();
        assert!(matches!(
            NewFile::named(&path, folder.path(), Some(KIND)),
            Err(Fault::Temporary { .. })
        ));
        if let Some(file) = NewFile::unnamed(&path, folder.path(), Some(KIND)).unwrap() {
            assert!(matches!(file.finish(), Err(Fault::Temporary { .. })));
        }
        rustix::io::write(&first, b"o").unwrap();
        first.finish().unwrap();
        create(&path, true, false).finish().unwrap();
        assert!(names[1..].iter().all(|name| std::fs::read(name).unwrap() == b"other"));
        assert!(!names[0].exists() && std::fs::read(&path).unwrap().is_empty());
    }

    #[test]
    fn a_file_of_another_kind_is_never_replaced_and_that_is_told_at_once() {
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
                // It comes to be there while the new one is written.
                std::fs::write(&path, kind.magic).unwrap();
                drop(NewFile::create(&path, kind, true).unwrap());
                let late = match named {
                    true => NewFile::named(&path, folder.path(), Some(kind)).unwrap(),
                    false => NewFile::create(&path, kind, true).unwrap(),
                };
                std::fs::write(&path, "precious").unwrap();
                assert!(matches!(late.finish(), Err(Fault::OtherKind { .. })));
                drop(late);
                assert_eq!(
                    (files(folder.path()).len(), std::fs::read(&path).unwrap()),
                    (1, b"precious".to_vec())
                );
            }
        }
    }

    #[test]
    fn what_is_no_file_is_never_replaced_and_that_is_told_at_once() {
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
                    matches!(NewFile::create(path, KIND, replace), Err(Fault::Kind)),
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
                matches!(refused, Fault::Kernel { source, .. } if source == errno),
                "{refused}"
            );
        }
        assert_eq!(files(folder.path()), ["image", "inner", "link", "nowhere", "socket"]);
    }

    #[test]
    fn what_others_left_behind_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, "old").unwrap();
        let file = NewFile::create(&path, KIND, true).unwrap();
        names(&path).for_each(|name| std::fs::write(name, "left over").unwrap());
        let error = file.finish().unwrap_err().to_string();
        let first = names(&path).next().unwrap();
        assert!(error.starts_with(&format!("{} and 99 more", first.display())), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn a_path_that_is_no_file_from_the_root_is_refused() {
        for path in ["image", "/", "/tmp/..", "/tmp/image/", "/tmp/image/."] {
            assert!(
                matches!(NewFile::create(Path::new(path), KIND, true), Err(Fault::Path)),
                "{path}"
            );
        }
        assert!(matches!(
            NewFile::create(Path::new("/no/such/folder"), KIND, true),
            Err(Fault::Kernel { .. })
        ));
    }
}
