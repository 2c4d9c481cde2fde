//! The process of an agent, and seeing to its end.
//!
//! A connection that is shut down ends nothing: an agent that hangs keeps its descriptors of the
//! guest's memory and goes on when it wakes up. So an agent hands over a pidfd of itself when it
//! is attached, and the client kills it by that before anybody else gets what it had.
//!
//! An agent may lie (`vmm-survives`), and the client must not kill whatever process a liar names.
//! The kernel tells which process sent the answer with the pidfd; only if that is the process of
//! the pidfd the client kills it. Otherwise, and where the client has no right to, it waits for the
//! end of the process.
//!
//! An agent on threads of the VMM's own process cannot be killed. Whoever runs one ends it before
//! the next is attached: closes its connection, or has the client do so, and joins its threads.

use crate::deadline::deadline;
use pageferry_protocol::control::socket::wait;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// `PID_FS_MAGIC` of the kernel's `linux/magic.h`. There each process has an inode of its own.
const PID_FS_MAGIC: u64 = 0x5049_4446;

/// The owner of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// The agent's, says the kernel: it may be killed.
    Agent,
    /// The VMM's own.
    Vmm,
    /// It is not known: the answer came from another process, or from one that is not visible.
    Unknown,
}

/// A process that has, or had, the guest's memory as an agent.
#[derive(Debug)]
pub(crate) struct AgentProcess {
    pidfd: OwnedFd,
    /// The process that sent the answer, if the kernel does not say that both are one. It has the
    /// guest's memory, too, as far as is known.
    sender: Option<OwnedFd>,
    /// As the agent says; as the kernel does, if it vouches for it.
    pid: u32,
    owner: Owner,
    killed: AtomicBool,
}

impl AgentProcess {
    /// The process of `pidfd`, which came with an answer that the process `sender` sent and that
    /// says that its number is `claimed`.
    ///
    /// # Errors
    /// In words, if the descriptor is no pidfd: most others can be read at once, which of a pidfd
    /// would say that its process has ended.
    pub(crate) fn new(pidfd: OwnedFd, sender: Option<i32>, claimed: u32) -> Result<Self, String> {
        if pidfd_inode(&pidfd).is_none() && fdinfo_pid(&pidfd).is_none() {
            return Err("its file descriptor is no pidfd".to_owned());
        }
        // A pidfd is bound to one process, also when that is gone and another has its number: so
        // one look at the number is enough.
        let is = |pid: Pid| is_pidfd_of(&pidfd, pid);
        let vouched = sender
            .filter(|sender| *sender > 0)
            .and_then(Pid::from_raw)
            .filter(|sender| is(*sender));
        let owner = match vouched {
            Some(pid) if pid == getpid() => Owner::Vmm,
            Some(_) => Owner::Agent,
            None => Owner::Unknown,
        };
        let pid = vouched.map_or(claimed, |pid| pid.as_raw_pid().unsigned_abs());
        let other =
            sender.filter(|sender| owner == Owner::Unknown && *sender > 0).and_then(Pid::from_raw);
        // The VMM's own end cannot be waited for.
        let other = other.filter(|pid| *pid != getpid());
        let sender = other.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Ok(Self { pidfd, sender, pid, owner, killed: AtomicBool::new(false) })
    }

    /// Its number.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// True if the agent runs on threads of this process.
    pub(crate) fn is_own_process(&self) -> bool {
        self.owner == Owner::Vmm
    }

    /// True if both are one process. Of two that are alive, that is; one that has ended is the same
    /// as no other.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (pidfd_inode(&self.pidfd), pidfd_inode(&other.pidfd)) {
            (Some(one), Some(other)) => one == other,
            _ => {
                self.owner != Owner::Unknown
                    && other.owner != Owner::Unknown
                    && self.pid == other.pid
            }
        }
    }

    /// Kills it, unless it is the VMM's own, or perhaps not the agent's. Does not wait.
    ///
    /// # Errors
    /// Why it cannot be killed, in words.
    pub(crate) fn kill(&self) -> Result<(), String> {
        match self.owner {
            Owner::Vmm => return Ok(()),
            Owner::Unknown => {
                return Err("the kernel does not confirm that it is the agent's".to_owned());
            }
            Owner::Agent => {}
        }
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) => {
                if !self.killed.swap(true, Ordering::AcqRel) {
                    log::warn!("agent process {} is killed: it was given up", self.pid);
                }
                Ok(())
            }
            // It is gone.
            Err(Errno::SRCH) => Ok(()),
            Err(Errno::PERM) => {
                Err("it belongs to another user, and cannot be killed from here".to_owned())
            }
            Err(errno) => Err(format!("it cannot be killed: {errno}")),
        }
    }

    /// Waits until it has ended, for as long as this: then none of its descriptors is open any
    /// more. True also at once if it is the VMM's own.
    pub(crate) fn wait_for_exit(&self, deadline: Instant) -> bool {
        self.is_own_process() || self.exits_before(deadline)
    }

    /// True if it has ended.
    pub(crate) fn has_exited(&self) -> bool {
        self.exits_before(Instant::now())
    }

    fn exits_before(&self, deadline: Instant) -> bool {
        // Readable when all its threads are gone, also before anybody has waited for it.
        let mut processes = std::iter::once(&self.pidfd).chain(&self.sender);
        processes.all(|process| wait(process.as_fd(), PollFlags::IN, deadline) == Ok(true))
    }

    /// Sees to it that it has ended: kills it, and waits for its end. One that cannot be killed is
    /// waited for, too.
    ///
    /// # Errors
    /// Why it lives after `timeout`, and what to do, in words.
    pub(crate) fn kill_and_wait(&self, timeout: Duration) -> Result<(), String> {
        if self.is_own_process() || self.has_exited() {
            return Ok(());
        }
        let killed = self.kill();
        if self.wait_for_exit(deadline(timeout)) {
            return Ok(());
        }
        Err(match killed {
            Ok(()) => "it was killed, and the kernel has not ended it yet: try again".to_owned(),
            Err(why) => format!("{why}; end it (kill -KILL {}) and try again", self.pid),
        })
    }
}

/// What tells the process of a pidfd from all others, for good; `None` on kernels before 6.9.
fn pidfd_inode(pidfd: &OwnedFd) -> Option<(u64, u64)> {
    let statfs = rustix::fs::fstatfs(pidfd).ok()?;
    if statfs.f_type as u64 & 0xffff_ffff != PID_FS_MAGIC {
        return None;
    }
    let stat = rustix::fs::fstat(pidfd).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// True if `pidfd` is of the process that has this number now.
fn is_pidfd_of(pidfd: &OwnedFd, pid: Pid) -> bool {
    if let Some(own) = pidfd_inode(pidfd) {
        let other = pidfd_open(pid, PidfdFlags::empty());
        return other.is_ok_and(|other| pidfd_inode(&other) == Some(own));
    }
    fdinfo_pid(pidfd).is_some_and(|number| number > 0 && number == pid.as_raw_pid())
}

/// What older kernels say of a pidfd in /proc, if that is mounted here: the number of its process,
/// or one that is no number of a process if that has ended; `None` of any other descriptor.
fn fdinfo_pid(pidfd: &OwnedFd) -> Option<i32> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let text = std::fs::read_to_string(path).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("Pid:"))
        .and_then(|rest| rest.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn sleeper() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    fn pidfd(child: &Child) -> OwnedFd {
        pidfd_open(Pid::from_child(child), PidfdFlags::empty()).unwrap()
    }

    fn sent_by(child: &Child, sender: &Child) -> AgentProcess {
        AgentProcess::new(pidfd(child), Some(sender.id() as i32), 1).unwrap()
    }

    #[test]
    fn a_process_that_hangs_is_killed_and_its_end_waited_for() {
        let mut child = sleeper();
        rustix::process::kill_process(Pid::from_child(&child), Signal::STOP).unwrap();
        let process = sent_by(&child, &child);
        assert_eq!((process.pid(), process.has_exited()), (child.id(), false));
        // Nobody has waited for the child: it is gone for us all the same.
        process.kill_and_wait(Duration::from_secs(60)).unwrap();
        assert!(process.has_exited());
        assert!(!child.wait().unwrap().success());
        process.kill_and_wait(Duration::ZERO).unwrap();
    }

    #[test]
    fn a_process_that_did_not_send_the_answer_is_not_killed_but_waited_for() {
        let (mut victim, mut liar) = (sleeper(), sleeper());
        for sender in [Some(liar.id() as i32), Some(0), None] {
            let process = AgentProcess::new(pidfd(&victim), sender, 7).unwrap();
            assert_eq!(process.pid(), 7);
            let error = process.kill_and_wait(Duration::ZERO).unwrap_err();
            assert!(error.contains("does not confirm"), "{error}");
            assert!(victim.try_wait().unwrap().is_none());
        }
        let process = sent_by(&victim, &liar);
        victim.kill().unwrap();
        victim.wait().unwrap();
        assert!(!process.has_exited(), "whoever sent the answer lives, and may have the memory");
        liar.kill().unwrap();
        process.kill_and_wait(Duration::from_secs(60)).unwrap();
        liar.wait().unwrap();
    }

    #[test]
    fn what_is_no_pidfd_is_refused() {
        let files = [
            std::fs::File::open("/dev/null").unwrap(),
            std::fs::File::open("/proc/self/stat").unwrap(),
        ];
        let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
        for fd in files.map(OwnedFd::from).into_iter().chain([pipe]) {
            let error = AgentProcess::new(fd, Some(getpid().as_raw_pid()), 1).unwrap_err();
            assert_eq!(error, "its file descriptor is no pidfd");
        }
    }

    #[test]
    fn the_own_process_is_never_killed_and_needs_no_waiting() {
        let own = || pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        let this = || AgentProcess::new(own(), Some(getpid().as_raw_pid()), 1).unwrap();
        let process = this();
        assert!(process.is_own_process());
        process.kill().unwrap();
        process.kill_and_wait(Duration::ZERO).unwrap();
        assert!(process.is_same(&this()));
        let mut child = sleeper();
        assert!(!process.is_same(&sent_by(&child, &child)));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
