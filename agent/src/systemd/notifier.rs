// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages to the service manager, as described in `sd_notify(3)`: a datagram to the socket that
//! `NOTIFY_SOCKET` names.
//!
//! - `READY=1` once the agent listens;
//! - `STATUS=` with the job and its phase, when they change;
//! - `STOPPING=1` when the agent was asked to end;
//! - `WATCHDOG=1` twice in each time that `WATCHDOG_USEC` gives.
//!
//! The reactor's thread sends the last three and must not wait, so a message is dropped if the
//! manager's queue is full. A later one says the same.

use crate::opener;
use crate::waiting::may_wait;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Longest wait until the manager can receive `READY=1`. Without that message it would end the
/// agent.
const READY_TIMEOUT: Duration = Duration::from_secs(5);

/// The manager's socket cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("NOTIFY_SOCKET is {socket:?}, which cannot be used")]
pub struct NotifyError {
    socket: String,
    /// What the kernel said.
    #[source]
    source: Errno,
}

/// Tells the service manager what the agent does.
#[derive(Debug)]
pub struct Notifier {
    socket: OwnedFd,
    watchdog: Option<Watchdog>,
    /// The status that was sent last.
    status: String,
}

#[derive(Debug)]
struct Watchdog {
    /// Time between two messages.
    interval: Duration,
    /// When the next message is due.
    due: Instant,
}

impl Notifier {
    /// The notifier of this process. `None` if its service manager wants no messages.
    ///
    /// # Errors
    /// If the manager's socket cannot be used.
    pub fn from_environment() -> Result<Option<Self>, NotifyError> {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(None) };
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let is_mine = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let timeout = number("WATCHDOG_USEC").filter(|micros| *micros > 0 && is_mine);
        Self::new(&name, timeout.map(Duration::from_micros)).map(Some)
    }

    /// A notifier for the manager's socket `name`. The manager wants a sign of life within each
    /// `timeout`.
    fn new(name: &OsStr, timeout: Option<Duration>) -> Result<Self, NotifyError> {
        let failed = |source| NotifyError { socket: name.to_string_lossy().into_owned(), source };
        let socket = opener::connect_manager(name).map_err(failed)?;
        let watchdog = timeout.map(|timeout| Watchdog {
            interval: timeout / 2,
            // At once: the manager has waited since the start of this process.
            due: Instant::now(),
        });
        Ok(Self { socket, watchdog, status: String::new() })
    }

    /// The agent listens. Waits if the manager's queue is full.
    pub fn ready(&self) {
        may_wait("tell the service manager that this process is ready");
        let mut polled = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::OUT)];
        // If this fails, the send fails, too, and says why.
        let _ = poll(&mut polled, Timespec::try_from(READY_TIMEOUT).ok().as_ref());
        if let Err(errno) = self.send("READY=1") {
            log::warn!("the service manager is not told that this agent is ready: {errno}");
        }
    }

    /// The agent was asked to end.
    pub fn stopping(&self) {
        self.send_if_possible("STOPPING=1");
    }

    /// What the agent does, as one line. Sent only if it is new.
    pub fn status(&mut self, status: &str) {
        if self.status != status && self.send_if_possible(&format!("STATUS={status}")) {
            status.clone_into(&mut self.status);
        }
    }

    /// How long the caller may wait before it calls [`Notifier::sign_of_life`]; `None` if the
    /// manager wants none.
    pub fn sign_of_life_due(&self) -> Option<Duration> {
        let watchdog = self.watchdog.as_ref()?;
        Some(watchdog.due.saturating_duration_since(Instant::now()))
    }

    /// Tells the manager that the agent works, if that is due.
    pub fn sign_of_life(&mut self) {
        let now = Instant::now();
        let Some(watchdog) = self.watchdog.as_mut().filter(|watchdog| watchdog.due <= now) else {
            return;
        };
        watchdog.due = now + watchdog.interval;
        self.send_if_possible("WATCHDOG=1");
    }

    fn send_if_possible(&self, message: &str) -> bool {
        let sent = self.send(message);
        if let Err(errno) = sent {
            log::debug!("{message} is not sent to the service manager: {errno}");
        }
        sent.is_ok()
    }

    fn send(&self, message: &str) -> Result<(), Errno> {
        send(&self.socket, message.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    fn manager() -> (tempfile::TempDir, UnixDatagram, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_nonblocking(true).unwrap();
        (folder, manager, path)
    }

    fn received(manager: &UnixDatagram) -> Option<String> {
        let mut bytes = [0; 200];
        let count = manager.recv(&mut bytes).ok()?;
        Some(String::from_utf8(bytes[..count].to_vec()).unwrap())
    }

    #[test]
    fn a_status_is_sent_once_and_a_sign_of_life_twice_in_its_time() {
        let (_folder, manager, path) = manager();
        let timeout = Duration::from_secs(3600);
        let mut notifier = Notifier::new(path.as_os_str(), Some(timeout)).unwrap();
        notifier.ready();
        notifier.status("idle");
        notifier.status("idle");
        notifier.status("job 1");
        assert_eq!(notifier.sign_of_life_due(), Some(Duration::ZERO));
        notifier.sign_of_life();
        notifier.sign_of_life();
        notifier.stopping();
        let expected = ["READY=1", "STATUS=idle", "STATUS=job 1", "WATCHDOG=1", "STOPPING=1"];
        let messages: Vec<_> = std::iter::from_fn(|| received(&manager)).collect();
        assert_eq!(messages, expected);
        let due = notifier.sign_of_life_due().unwrap();
        assert!(due > timeout / 3 && due <= timeout / 2, "{due:?}");
    }

    #[test]
    fn a_manager_that_does_not_read_makes_nobody_wait() {
        let (_folder, manager, path) = manager();
        let mut notifier = Notifier::new(path.as_os_str(), None).unwrap();
        assert_eq!(notifier.sign_of_life_due(), None);
        notifier.sign_of_life();
        for number in 0..10_000 {
            notifier.status(&format!("job {number}"));
        }
        assert_eq!(received(&manager).unwrap(), "STATUS=job 0");
        while received(&manager).is_some() {}
        notifier.status("job 9999");
        assert_eq!(received(&manager).unwrap(), "STATUS=job 9999", "it had not been sent");
    }

    #[test]
    fn an_abstract_name_is_used_and_a_wrong_one_is_named() {
        let name = format!("pageferry-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        Notifier::new(format!("@{name}").as_ref(), None).unwrap().ready();
        assert_eq!(received(&manager).unwrap(), "READY=1");
        for wrong in ["", "x", "/nonexistent/notify"] {
            let error = Notifier::new(wrong.as_ref(), None).unwrap_err().to_string();
            assert!(error.contains(&format!("{wrong:?}")), "{error}");
        }
    }
}
