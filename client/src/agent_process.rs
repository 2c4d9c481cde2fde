// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The process of an agent, and making sure that its program is gone.
//!
//! Shutting a connection down ends no process. An agent that hangs keeps its descriptors of the
//! guest memory and continues when it wakes up. So an agent hands over a pidfd of itself when it is
//! attached. The client kills it by that pidfd before another agent gets what it had.
//!
//! An agent that is upgraded executes another program in its process. The process stays, and serves
//! this VMM again. The kernel ends all threads and mappings of the old program, and closes its
//! descriptors. One of them is the writing end of a pipe whose reading end came with the pidfd: by
//! that the client sees that the old program is gone, and does not kill the new one. Until then an
//! agent counts as *gone* only when its process has exited.
//!
//! An agent may lie (`vmm-survives`), and the client must not kill whatever process a liar names.
//! The kernel tells which process sent the answer with the pidfd. The client kills only if that is
//! the process of the pidfd. Otherwise, and where it has no right to kill, it waits for the exit.
//!
//! An agent on threads of the VMM's own process cannot be killed. The code that runs it must end it
//! before the next agent is attached: it closes the connection, or lets the client do so, and joins
//! the threads.

use crate::deadline::deadline;
use pageferry_protocol::control::socket::wait;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, getpid, pidfd_open, pidfd_send_signal, waitid,
};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// `PID_FS_MAGIC` of the kernel's `linux/magic.h`. There each process has an inode of its own.
const PID_FS_MAGIC: u64 = 0x5049_4446;

/// Longest time from the end of the connection to the exit of a process that is exiting.
const EXIT_DELAY: Duration = Duration::from_millis(100);

/// To whom a process belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// To the agent, as the kernel confirms. It may be killed.
    Agent,
    /// To the VMM: it is the own process.
    Vmm,
    /// Not known: another process sent the answer, or one that is not visible here.
    Unknown,
}

/// A process that has, or had, the guest memory as an agent.
#[derive(Debug)]
pub(crate) struct AgentProcess {
    pidfd: OwnedFd,
    /// Hangs up when the program that sent it is gone. Older agents send none.
    program: Option<OwnedFd>,
    /// The process that sent the answer, if the kernel does not confirm that it is the same. It may
    /// have the guest memory, too.
    sender: Option<OwnedFd>,
    /// As the kernel says if it confirms the process, otherwise as the agent claims.
    pid: u32,
    owner: Owner,
    killed: AtomicBool,
    /// How it ended, in words, once that was asked for after its exit.
    end: OnceLock<String>,
}

impl AgentProcess {
    /// The process of `pidfd`. The process `sender` has sent it and claims to be number `claimed`.
    /// The pipe `program` hangs up when its program is gone.
    ///
    /// # Errors
    /// A sentence, if a descriptor is not of that kind. Most other descriptors are readable at
    /// once, which of a pidfd would mean that the process has exited.
    pub(crate) fn new(
        (pidfd, program): (OwnedFd, Option<OwnedFd>), sender: Option<i32>, claimed: u32,
    ) -> Result<Self, String> {
        if program.as_ref().is_some_and(|program| !is_pipe(program) || has_hung_up(program)) {
            return Err("its second file descriptor is no pipe that its program has open".into());
        }
        if pidfd_inode(&pidfd).is_none() && fdinfo_pid(&pidfd).is_none() {
            return Err("its file descriptor is no pidfd".to_owned());
        }
        // A pidfd stays bound to its process even if another process gets the number. So one
        // comparison is enough.
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
        // This process cannot wait for its own exit.
        let other = other.filter(|pid| *pid != getpid());
        let sender = other.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        // Another process than the agent's would say nothing about the agent.
        let program = program.filter(|_| owner == Owner::Agent);
        let (killed, end) = (AtomicBool::new(false), OnceLock::new());
        Ok(Self { pidfd, program, sender, pid, owner, killed, end })
    }

    /// The process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// True if the agent runs on threads of this process.
    pub(crate) fn is_own_process(&self) -> bool {
        self.owner == Owner::Vmm
    }

    /// True if both are one process. Decides this for two processes that live; one that has exited
    /// is the same as no other.
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

    /// Kills the process, unless it is the VMM itself or may not be the agent. Does not wait.
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
        if self.is_gone() {
            return Ok(());
        }
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) => {
                if !self.killed.swap(true, Ordering::AcqRel) {
                    log::warn!("agent process {} was given up and is killed", self.pid);
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

    /// Waits until `deadline` for the agent to be gone. Then all its descriptors are closed. True
    /// at once for the own process.
    pub(crate) fn wait_until_gone(&self, deadline: Instant) -> bool {
        self.is_own_process() || self.is_gone_before(deadline)
    }

    /// True if the process has exited, or executes another program.
    pub(crate) fn is_gone(&self) -> bool {
        self.is_gone_before(Instant::now())
    }

    /// What became of the agent whose connection has ended, in words. Waits for a moment: the
    /// kernel closes the connection of a process shortly before the process counts as exited.
    pub(crate) fn how_it_ended(&self) -> String {
        if self.is_own_process() {
            return "it closed the connection".to_owned();
        }
        let exits_before = |deadline| wait(self.pidfd.as_fd(), PollFlags::IN, deadline) == Ok(true);
        let is_gone = self.is_gone_before(deadline(EXIT_DELAY));
        if is_gone && !exits_before(Instant::now()) {
            return format!("its process {} executed another program", self.pid);
        }
        if !is_gone {
            return format!("its process {} closed the connection", self.pid);
        }
        self.end.get_or_init(|| self.exit_in_words()).clone()
    }

    /// True if the process executes no program any more: it is exiting.
    fn has_no_program(&self) -> bool {
        // An agent hides itself from other processes of its user, but not this: the pages of its
        // memory, none of which are left.
        let size = std::fs::read_to_string(format!("/proc/{}/statm", self.pid));
        size.is_ok_and(|size| size.starts_with("0 "))
    }

    /// How the process has exited. The kernel says that only of a child of the VMM that was not
    /// reaped yet. Leaves the status for the VMM to reap.
    fn exit_in_words(&self) -> String {
        let flags = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), flags).ok().flatten();
        let signal = status.as_ref().and_then(|status| status.terminating_signal());
        let code = status.as_ref().and_then(|status| status.exit_status());
        let pid = self.pid;
        match (signal, code) {
            (Some(signal), _) => format!("its process {pid} was killed by signal {signal}"),
            (_, Some(code)) => format!("its process {pid} exited with status {code}"),
            (None, None) => format!("its process {pid} exited"),
        }
    }

    fn is_gone_before(&self, deadline: Instant) -> bool {
        let mut processes = std::iter::once(&self.pidfd).chain(&self.sender);
        processes.all(|process| {
            // Readable when all threads are gone, also before the process is reaped.
            let mut polled = vec![PollFd::new(process, PollFlags::IN)];
            // Without flags, poll reports only that the pipe hangs up.
            polled.extend(self.program.iter().map(|pipe| PollFd::new(pipe, PollFlags::empty())));
            if !poll_until(&mut polled, deadline) {
                return false;
            }
            // The pipe of a process that exits hangs up a moment before the process has exited.
            !polled[0].revents().is_empty()
                || !self.has_no_program()
                || poll_until(&mut polled[..1], deadline)
        })
    }

    /// Kills the process and waits until it is gone. Waits also if the process cannot be killed.
    ///
    /// # Errors
    /// Why it still lives after `timeout`, and what to do, in words.
    pub(crate) fn kill_and_wait(&self, timeout: Duration) -> Result<(), String> {
        if self.is_own_process() || self.is_gone() {
            return Ok(());
        }
        let killed = self.kill();
        if self.wait_until_gone(deadline(timeout)) {
            return Ok(());
        }
        Err(match killed {
            Ok(()) => "it was killed, and the kernel has not ended it yet: try again".to_owned(),
            Err(why) => format!("{why}; end it (kill -KILL {}) and try again", self.pid),
        })
    }
}

fn is_pipe(fd: &OwnedFd) -> bool {
    let stat = rustix::fs::fstat(fd);
    stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo)
}

/// True if nobody has the other end of a pipe any more.
fn has_hung_up(pipe: &OwnedFd) -> bool {
    poll_until(&mut [PollFd::new(pipe, PollFlags::empty())], Instant::now())
}

/// Waits until poll reports something. False at the deadline, or if the kernel refuses.
fn poll_until(polled: &mut [PollFd<'_>], deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Fails only above 292 billion years, which is as good as no deadline.
        let left = Timespec::try_from(left).ok();
        match poll(polled, left.as_ref()) {
            Ok(count) => return count > 0,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// The inode of a pidfd, which no other process ever has; `None` on kernels before 6.9.
fn pidfd_inode(pidfd: &OwnedFd) -> Option<(u64, u64)> {
    let statfs = rustix::fs::fstatfs(pidfd).ok()?;
    if statfs.f_type as u64 & 0xffff_ffff != PID_FS_MAGIC {
        return None;
    }
    let stat = rustix::fs::fstat(pidfd).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// True if `pidfd` belongs to the process that has this number now.
fn is_pidfd_of(pidfd: &OwnedFd, pid: Pid) -> bool {
    if let Some(own) = pidfd_inode(pidfd) {
        let other = pidfd_open(pid, PidfdFlags::empty());
        return other.is_ok_and(|other| pidfd_inode(&other) == Some(own));
    }
    fdinfo_pid(pidfd).is_some_and(|number| number > 0 && number == pid.as_raw_pid())
}

/// The number that older kernels show for a pidfd in /proc, if /proc is mounted. It is no number of
/// a process if the process has exited. `None` for any other descriptor.
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
        AgentProcess::new((pidfd(child), None), Some(sender.id() as i32), 1).unwrap()
    }

    #[test]
    fn a_process_that_hangs_is_killed_and_its_end_waited_for() {
        let mut child = sleeper();
        rustix::process::kill_process(Pid::from_child(&child), Signal::STOP).unwrap();
        let process = sent_by(&child, &child);
        assert_eq!((process.pid(), process.is_gone()), (child.id(), false));
        // Nobody has waited for the child: it is gone for us all the same.
        process.kill_and_wait(Duration::from_secs(60)).unwrap();
        assert!(process.is_gone());
        assert!(!child.wait().unwrap().success());
        process.kill_and_wait(Duration::ZERO).unwrap();
    }

    #[test]
    fn a_process_that_did_not_send_the_answer_is_not_killed_but_waited_for() {
        let (mut victim, mut liar) = (sleeper(), sleeper());
        for sender in [Some(liar.id() as i32), Some(0), None] {
            let process = AgentProcess::new((pidfd(&victim), None), sender, 7).unwrap();
            assert_eq!(process.pid(), 7);
            let error = process.kill_and_wait(Duration::ZERO).unwrap_err();
            assert!(error.contains("does not confirm"), "{error}");
            assert!(victim.try_wait().unwrap().is_none());
        }
        let process = sent_by(&victim, &liar);
        victim.kill().unwrap();
        victim.wait().unwrap();
        assert!(!process.is_gone(), "whoever sent the answer lives, and may have the memory");
        liar.kill().unwrap();
        process.kill_and_wait(Duration::from_secs(60)).unwrap();
        liar.wait().unwrap();
    }

    #[test]
    fn the_end_of_a_process_is_told_as_far_as_it_is_known() {
        let mut child = sleeper();
        let process = sent_by(&child, &child);
        let pid = child.id();
        assert_eq!(process.how_it_ended(), format!("its process {pid} closed the connection"));
        child.kill().unwrap();
        let killed = format!("its process {pid} was killed by signal 9");
        assert_eq!(process.how_it_ended(), killed);
        assert_eq!(process.how_it_ended(), killed, "the status is still there for the VMM");
        let late = sent_by(&child, &child);
        child.wait().unwrap();
        assert_eq!(process.how_it_ended(), killed, "it was asked for before");
        assert_eq!(late.how_it_ended(), format!("its process {pid} exited"));

        let mut child = Command::new("false").spawn().unwrap();
        let process = sent_by(&child, &child);
        let exited = format!("its process {} exited with status 1", child.id());
        assert_eq!(process.how_it_ended(), exited);
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_executes_another_program_is_gone_and_is_not_killed() {
        let mut child = sleeper();
        let (reader, writer) = std::io::pipe().unwrap();
        let fds = (pidfd(&child), Some(reader.into()));
        let process = AgentProcess::new(fds, Some(child.id() as i32), 1).unwrap();
        assert!(!process.is_gone());
        // As the kernel does it when the process executes the next program.
        drop(writer);
        assert!(process.is_gone());
        process.kill().unwrap();
        process.kill_and_wait(Duration::from_secs(60)).unwrap();
        let ended = format!("its process {} executed another program", child.id());
        assert_eq!(process.how_it_ended(), ended);
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_pipe_that_tells_nothing_is_refused() {
        let mut child = sleeper();
        let closed = OwnedFd::from(std::io::pipe().unwrap().0);
        for fd in [closed, std::fs::File::open("/dev/null").unwrap().into()] {
            let fds = (pidfd(&child), Some(fd));
            let error = AgentProcess::new(fds, Some(child.id() as i32), 1).unwrap_err();
            assert!(error.contains("no pipe that its program has open"), "{error}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_is_no_pidfd_is_refused() {
        let files = [
            std::fs::File::open("/dev/null").unwrap(),
            std::fs::File::open("/proc/self/stat").unwrap(),
        ];
        let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
        for fd in files.map(OwnedFd::from).into_iter().chain([pipe]) {
            let error = AgentProcess::new((fd, None), Some(getpid().as_raw_pid()), 1).unwrap_err();
            assert_eq!(error, "its file descriptor is no pidfd");
        }
    }

    #[test]
    fn the_own_process_is_never_killed_and_needs_no_waiting() {
        let own = || pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        let this = || AgentProcess::new((own(), None), Some(getpid().as_raw_pid()), 1).unwrap();
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
