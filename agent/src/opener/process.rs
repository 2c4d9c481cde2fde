// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The process of an opener: `pageferry agent` with a hidden option, which an agent starts.
//!
//! Its standard input is the socket to the agent. One thread takes requests, and each is carried
//! out on a thread of its own. The process ends with the agent: when the socket closes.
//!
//! An agent that was taken over may rename files in the folders that were named, and so put a link
//! to another folder where there was a folder before. So what was checked is opened without
//! following any link.

use super::channel::Channel;
use super::named::Named;
use super::wire::{Op, Reply};
use crate::inherited::close_inherited;
use crate::lock::lock;
use pageferry_protocol::control::frame::FLAG_REPLY;
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use rustix::event::PollFlags;
use rustix::fs::{CWD, FileType, Mode, OFlags, RenameFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Most requests at once. The agent's threads wait for their answers, so there are few.
const MAX_REQUESTS: usize = 256;
/// Longest time until the agent takes an answer.
const SEND: Duration = Duration::from_secs(10);
/// The mode of a file that the agent may choose.
const ANY_MODE: Mode = Mode::RWXU.union(Mode::RWXG).union(Mode::RWXO);
/// Longest single wait for a request.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// The hidden argument of an agent that is to be an opener.
const ARGUMENT: &str = "--opener";

/// Starts an opener for this process. With `check` it refuses what was not granted; otherwise it
/// only logs that. `stores` are those that its service of stores may use.
///
/// # Errors
/// If the program cannot be executed.
pub fn start(check: bool, stores: &[String]) -> io::Result<Channel> {
    let (ours, openers) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let mut command = Command::new("/proc/self/exe");
    // The program may be another one that runs the agent's command line as a part of its own.
    let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.iter().position(|argument| argument == "agent") {
        Some(at) => arguments.truncate(at + 1),
        None => arguments = vec!["agent".into()],
    }
    command.arg0("pageferry").args(arguments).arg(ARGUMENT).arg(if check { "on" } else { "log" });
    stores.iter().for_each(|store| {
        command.args(["--store", store]);
    });
    // Nobody waits for it: it ends with this process.
    command.stdin(Stdio::from(openers)).stdout(Stdio::null()).spawn()?;
    Ok(Channel::new(ours))
}

/// Serves the agent that has started this process as its opener.
///
/// # Errors
/// If standard input is no socket of an agent.
pub fn run(check: bool, stores: Vec<String>) -> io::Result<()> {
    // The agent may have more than this process needs: sockets of its service manager, a key.
    close_inherited()?;
    // These are sent to all processes of a terminal or of a service. The agent may still need files
    // while it ends.
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::default())?;
    }
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let opener = Opener::new(check, stores);
    // Threads that hang in the kernel end with the process: nobody needs what they do any more.
    let served = Arc::new(opener).serve(socket).map_err(io::Error::other);
    // Those of the agent's guest, if it was the last clone.
    crate::base::files::remove_unused();
    served
}

/// What an opener works with.
#[derive(Debug)]
struct Opener {
    named: Mutex<Named>,
    /// Refuse what was not named. Otherwise it is only logged.
    check: bool,
    /// The stores that the agent's options name.
    stores: Vec<String>,
    /// The services of stores that were started, and have not ended.
    services: Mutex<Vec<Child>>,
    /// Number of requests that are being carried out.
    running: AtomicUsize,
}

/// Where something is that may be opened.
#[derive(Debug)]
enum Found {
    /// In a folder that was named. The path had no links.
    Named(PathBuf),
    /// Elsewhere, and that is only logged.
    Unnamed(PathBuf),
}

impl Found {
    fn open(&self, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC;
        match self {
            Self::Named(path) => openat2(CWD, path, flags, mode, ResolveFlags::NO_SYMLINKS),
            Self::Unnamed(path) => rustix::fs::open(path, flags, mode),
        }
    }
}

/// A name in a folder that is open, which so stays the one that was checked.
#[derive(Debug)]
struct Name {
    folder: OwnedFd,
    name: OsString,
}

impl Name {
    /// A path to the name. Its last part is not followed by what takes it.
    fn path(&self) -> PathBuf {
        Path::new(&super::by_descriptor(self.folder.as_fd())).join(&self.name)
    }
}

impl Opener {
    fn new(check: bool, stores: Vec<String>) -> Self {
        let (named, services, running) = (Mutex::default(), Mutex::default(), AtomicUsize::new(0));
        Self { named, check, stores, services, running }
    }

    /// Serves the agent at the other end of `socket` until it closes.
    ///
    /// # Errors
    /// If the agent sends what is no frame, or the kernel refuses.
    fn serve(self: Arc<Self>, socket: OwnedFd) -> Result<(), SocketError> {
        let mut socket = FrameSocket::from(socket);
        loop {
            let frame = match socket.try_recv() {
                Ok(Some(frame)) => frame,
                Ok(None) => {
                    let until = Instant::now() + LONGEST_WAIT;
                    let fd = socket.as_fd();
                    pageferry_protocol::control::socket::wait(fd, PollFlags::IN, until)?;
                    continue;
                }
                Err(SocketError::Closed) => return Ok(()),
                Err(error) => return Err(error),
            };
            if self.running.fetch_add(1, Ordering::Relaxed) >= MAX_REQUESTS {
                self.answer(frame, |_, _| Err(Errno::AGAIN.into()));
                self.running.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let opener = self.clone();
            let run = move || {
                opener.answer(frame, |op, fds| opener.carry_out(op, fds));
                opener.running.fetch_sub(1, Ordering::Relaxed);
            };
            // If there is no thread for it, its answer's socket closes.
            if let Err(error) = std::thread::Builder::new().spawn(run) {
                self.running.fetch_sub(1, Ordering::Relaxed);
                log::warn!("the opener cannot start a thread: {error}");
            }
        }
    }

    fn answer(&self, frame: Frame, carry_out: impl FnOnce(Op, &[OwnedFd]) -> io::Result<Done>) {
        let mut fds = frame.fds.into_iter();
        let Some(answer) = fds.next() else { return };
        let fds: Vec<OwnedFd> = fds.collect();
        let done = match Op::decode(frame.request, &frame.body) {
            Ok(Some(op)) => carry_out(op, &fds),
            Ok(None) => Err(Errno::NOSYS.into()),
            Err(_) => Err(Errno::PROTO.into()),
        };
        let mut descriptors = Vec::new();
        let reply = match done {
            Ok(Done::Nothing) => Reply::default(),
            Ok(Done::Descriptor(fd)) => {
                descriptors.push(fd);
                Reply::default()
            }
            Ok(Done::Pair(fds)) => {
                descriptors.extend(fds);
                Reply::default()
            }
            Ok(Done::Addresses(addresses)) => Reply { addresses, ..Reply::default() },
            Err(error) => Reply {
                errno: error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()),
                sentence: if error.raw_os_error().is_some() {
                    String::new()
                } else {
                    error.to_string()
                },
                ..Reply::default()
            },
        };
        let frame = Frame::reply(frame.request, reply.encode());
        let fds: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let until = Instant::now() + SEND;
        // Fails if the agent does not wait any more.
        let _ = FrameSocket::from(answer).send_parts(
            frame.request,
            FLAG_REPLY,
            &frame.body,
            &fds,
            until,
        );
    }

    /// Where `path` leads, if that may be opened.
    fn find(&self, path: &Path, write: bool) -> Result<Found, Errno> {
        match lock(&self.named).check(path, write) {
            Err(Errno::ACCESS) if !self.check => {
                log::warn!("the sandbox would refuse {}: nobody has named it", path.display());
                Ok(Found::Unnamed(path.to_owned()))
            }
            checked => checked.map(Found::Named),
        }
    }

    /// The name `path`, which may be made, replaced or removed with `write`. Its last part is not
    /// followed.
    fn name(&self, path: &Path, write: bool) -> Result<Name, Errno> {
        let path = std::path::absolute(path).map_err(|_| Errno::INVAL)?;
        let (folder, name) = path.parent().zip(path.file_name()).ok_or(Errno::INVAL)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let folder = self.find(folder, write)?.open(flags, Mode::empty())?;
        Ok(Name { folder, name: name.to_owned() })
    }

    fn open(&self, path: &Path, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let changes = OFlags::WRONLY | OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC;
        if flags.contains(OFlags::PATH) {
            return Err(Errno::ACCESS);
        }
        let write = flags.intersects(changes | OFlags::TMPFILE);
        // A program with the rights of this user, for others to run, would be a way out.
        let mode = mode & ANY_MODE;
        let file = if flags.contains(OFlags::NOFOLLOW) {
            let name = self.name(path, write)?;
            rustix::fs::open(name.path(), flags | OFlags::CLOEXEC, mode)?
        } else {
            self.find(path, write)?.open(flags, mode)?
        };
        // The descriptor of a folder names it for writing. It is looked at itself: by its path
        // there may be another one by now.
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
        if kind == FileType::Directory && self.check {
            let path = std::fs::read_link(super::by_descriptor(file.as_fd()));
            let path = path.map_err(|_| Errno::ISDIR)?;
            lock(&self.named).check(&path, true).map_err(|_| Errno::ISDIR)?;
        }
        Ok(file)
    }

    fn carry_out(&self, op: Op, fds: &[OwnedFd]) -> io::Result<Done> {
        let file = || fds.first().ok_or(Errno::BADF);
        Ok(match op {
            Op::Grant | Op::GrantForGood => {
                for fd in fds {
                    lock(&self.named).add(fd, op == Op::GrantForGood)?;
                }
                Done::Nothing
            }
            Op::IsNamed { path, write } => {
                self.find(&path, write)?;
                Done::Nothing
            }
            Op::Open { path, flags, mode } => {
                let (flags, mode) = (OFlags::from_bits_retain(flags), Mode::from_raw_mode(mode));
                Done::Descriptor(self.open(&path, flags, mode)?)
            }
            Op::Reopen { flags } => {
                let flags = OFlags::from_bits_retain(flags);
                Done::Descriptor(super::reopen(check_may_write(file()?)?, flags)?)
            }
            Op::Link { path } => {
                super::link(check_may_write(file()?)?, &self.name(&path, true)?.path())?;
                Done::Nothing
            }
            Op::Rename { from, to, flags } => {
                let (from, to) = (self.name(&from, true)?, self.name(&to, true)?);
                let flags = RenameFlags::from_bits_retain(flags);
                super::rename(&from.path(), &to.path(), flags)?;
                Done::Nothing
            }
            Op::Unlink { path } => {
                super::unlink(&self.name(&path, true)?.path())?;
                Done::Nothing
            }
            // The path is bound as it is, because whoever lists sockets sees it. A link that takes
            // the place of a folder just now gets a new socket and no more: all else is done by
            // the name.
            Op::BindUnix { path, mode } => {
                let (name, mode) = (self.name(&path, true)?, Mode::from_raw_mode(mode));
                Done::Descriptor(super::bind_unix_at(&path, &name.path(), mode & ANY_MODE)?)
            }
            // To connect to a program is more than to read a file.
            Op::ConnectUnix { path } => {
                let socket = self.find(&path, true)?.open(OFlags::PATH, Mode::empty())?;
                let path = super::by_descriptor(socket.as_fd());
                Done::Descriptor(super::connect_unix(Path::new(&path))?)
            }
            Op::ConnectTcp { address } => {
                let named = lock(&self.named).check_address(address);
                match named {
                    Err(errno) if self.check => return Err(errno.into()),
                    Err(_) => log::warn!("the sandbox would refuse {address}: nobody named it"),
                    Ok(()) => {}
                }
                Done::Descriptor(super::connect_tcp(address)?)
            }
            Op::ListenTcp { addresses } => Done::Descriptor(super::listen_tcp(&addresses)?.into()),
            Op::ConnectManager { name } => {
                let own = std::env::var_os("NOTIFY_SOCKET");
                if own.as_deref() != Some(name.as_os_str()) {
                    return Err(Errno::ACCESS.into());
                }
                Done::Descriptor(super::connect_manager(name.as_os_str())?)
            }
            Op::ListeningPair => {
                let (listener, connected) = super::listening_pair()?;
                Done::Pair([listener, connected])
            }
            Op::StoreService => {
                let (service, socket) = crate::store::process::start(&self.stores)?;
                let mut services = lock(&self.services);
                services.retain_mut(|service| matches!(service.try_wait(), Ok(None)));
                services.push(service);
                Done::Descriptor(socket)
            }
            Op::Base { name, length, reserved } => {
                let base = crate::base::open(&name, length, reserved)?;
                Done::Pair([base.agents, base.vmms])
            }
            Op::BaseAgain => Done::Descriptor(crate::base::open_again(file()?.as_fd())?),
            Op::LookUp { name } => Done::Addresses(super::look_up(&name)?),
        })
    }
}

/// What was done.
enum Done {
    Nothing,
    Descriptor(OwnedFd),
    Pair([OwnedFd; 2]),
    Addresses(Vec<SocketAddr>),
}

/// Refuses a file that the agent may only read: by another descriptor or another name it could
/// write to it.
fn check_may_write(file: &OwnedFd) -> Result<BorrowedFd<'_>, Errno> {
    let is_file =
        FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode) == FileType::RegularFile;
    let flags = rustix::fs::fcntl_getfl(file)?;
    if is_file && flags.contains(OFlags::RDWR) && !flags.contains(OFlags::PATH) {
        Ok(file.as_fd())
    } else {
        Err(Errno::ACCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A folder `mine`, which is named, beside a folder `other`, which is not.
    fn opener(check: bool) -> (tempfile::TempDir, Opener) {
        let home = tempfile::tempdir().unwrap();
        for name in ["mine", "other"] {
            std::fs::create_dir(home.path().join(name)).unwrap();
        }
        std::fs::write(home.path().join("other/file"), "secret").unwrap();
        let opener = Opener::new(check, Vec::new());
        let mine = std::fs::File::open(home.path().join("mine")).unwrap();
        lock(&opener.named).add(&mine.into(), false).unwrap();
        (home, opener)
    }

    #[test]
    fn a_link_that_was_put_there_after_the_check_is_not_followed() {
        let (home, opener) = opener(true);
        let at = |name: &str| home.path().join(name);
        std::fs::create_dir(at("mine/folder")).unwrap();
        std::fs::write(at("mine/folder/file"), "").unwrap();
        let found = opener.find(&at("mine/folder/file"), true).unwrap();
        let name = opener.name(&at("mine/folder/new"), true).unwrap();
        // The agent exchanges the folder and a link.
        std::fs::rename(at("mine/folder"), at("mine/away")).unwrap();
        symlink(at("other"), at("mine/folder")).unwrap();
        let opened = found.open(OFlags::RDWR, Mode::empty());
        assert_eq!(opened.map(drop), Err(Errno::LOOP));
        std::fs::write(name.path(), "").unwrap();
        assert!(at("mine/away/new").exists() && !at("other/new").exists());
    }

    #[test]
    fn a_folder_that_may_only_be_read_is_never_handed_out() {
        let (home, opener) = opener(true);
        let read = home.path().join("read");
        std::fs::create_dir(&read).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd = rustix::fs::open(&read, flags, Mode::empty()).unwrap();
        lock(&opener.named).add(&fd, false).unwrap();
        let opened = |path: &Path| opener.open(path, OFlags::RDONLY, Mode::empty()).map(drop);
        assert_eq!(opened(&read), Err(Errno::ISDIR));
        // Not by a link from a folder that may be written.
        let link = home.path().join("mine/link");
        symlink(&read, &link).unwrap();
        assert_eq!(opened(&link), Err(Errno::ISDIR));
        opened(&home.path().join("mine")).unwrap();
    }

    #[test]
    fn what_an_agent_makes_gives_nobody_its_rights_and_follows_no_link() {
        let (home, opener) = opener(true);
        let at = |name: &str| home.path().join(name);
        let flags = OFlags::WRONLY | OFlags::CREATE;
        let made = opener.open(&at("mine/program"), flags, Mode::from_raw_mode(0o6755)).unwrap();
        assert_eq!(rustix::fs::fstat(&made).unwrap().st_mode & 0o7777, 0o755);
        // Where a socket was bound, a link to a file was put: the file stays.
        std::fs::write(at("mine/file"), "").unwrap();
        symlink(at("mine/file"), at("mine/link")).unwrap();
        let changed = super::super::set_mode(&at("mine/link"), Mode::RWXU);
        assert_eq!(changed, Err(Errno::ADDRINUSE));
        let nofollow = OFlags::RDONLY | OFlags::NOFOLLOW;
        let opened = opener.open(&at("mine/link"), nofollow, Mode::empty()).map(drop);
        assert_eq!(opened, Err(Errno::LOOP));
    }

    #[test]
    fn what_is_only_logged_is_opened_as_without_a_sandbox() {
        let (home, opener) = opener(false);
        let link = home.path().join("mine/link");
        symlink(home.path().join("other/file"), &link).unwrap();
        let file = opener.open(&link, OFlags::RDONLY, Mode::empty()).unwrap();
        assert_eq!(io::read_to_string(std::fs::File::from(file)).unwrap(), "secret");
        let named = Opener { check: true, ..opener };
        assert_eq!(named.open(&link, OFlags::RDONLY, Mode::empty()).map(drop), Err(Errno::ACCESS));
    }
}
