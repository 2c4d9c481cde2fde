// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The front-ends of a device: serves one after another, on a thread of its own.

use super::back_end::Connection;
use super::buffer::Mapped;
use super::port::DevicePort;
use super::queues::Memory;
use super::relay;
use crate::event::Event;
use crate::opener;
use crate::sandbox::{ThreadKind, enter_thread};
use crate::transport::unix_path::UnixPathListener;
use crate::transport::unix_socket::check_peer;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vmm_sys_util::epoll::EventSet;

/// Pause after a connection that could not be served.
const PAUSE: Duration = Duration::from_millis(100);
/// How long the threads of a connection may take to end before this says that it waits for them.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves the front-ends of a device. Dropping it ends the connection.
#[derive(Debug)]
pub struct DeviceSocket {
    port: Arc<DevicePort>,
    stop: Event,
    thread: Option<JoinHandle<()>>,
}

/// Where front-ends come from: the VMM hands them over, and there may be a path.
struct Arrivals {
    port: Arc<DevicePort>,
    listener: Option<UnixPathListener>,
    stop: Event,
}

impl DeviceSocket {
    /// Serves front-ends that connect to `path`, which gets mode 0600, and those that are handed
    /// over. Without a path, only the latter.
    ///
    /// # Errors
    /// If the path cannot be bound, or the kernel refuses a thread.
    pub fn start(path: Option<&Path>, port: Arc<DevicePort>) -> io::Result<Self> {
        let listener = path.map(UnixPathListener::bind).transpose()?;
        let stop = Event::new()?;
        let arrivals = Arrivals { port: port.clone(), listener, stop: stop.try_clone()? };
        let name = port.device().name().to_owned();
        let thread = Builder::new().name(name).spawn(move || serve(&arrivals))?;
        Ok(Self { port, stop, thread: Some(thread) })
    }
}

impl Drop for DeviceSocket {
    fn drop(&mut self) {
        self.stop.signal();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("{}: the thread of its socket panicked", self.port.device().name());
        }
    }
}

fn serve(arrivals: &Arrivals) {
    enter_thread(ThreadKind::Device);
    let (port, stop) = (&arrivals.port, arrivals.stop.as_fd());
    let name = port.device().name();
    while arrivals.wait() {
        let front_end = match arrivals.next() {
            Ok(Some(front_end)) => front_end,
            Ok(None) => continue,
            Err(error) => {
                log::warn!("{name}: {}", crate::error::chain(&error));
                pause(stop);
                continue;
            }
        };
        log::info!("{name}: a front-end has connected");
        if let Err(error) = serve_one(front_end, port, stop) {
            log::warn!("{name}: {}", crate::error::chain(&*error));
            pause(stop);
        }
        log::info!("{name}: the front-end is gone");
    }
}

impl Arrivals {
    /// The next front-end. `None` if there is none yet.
    fn next(&self) -> io::Result<Option<OwnedFd>> {
        if let Some(front_end) = self.port.take_handed_over() {
            return Ok(Some(front_end));
        }
        let Some(listener) = &self.listener else { return Ok(None) };
        match accept_with(listener.as_fd(), SocketFlags::CLOEXEC) {
            Ok(front_end) => {
                check_peer(&front_end).map_err(io::Error::other)?;
                Ok(Some(front_end))
            }
            Err(Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for a front-end. False if the device is to stop.
    fn wait(&self) -> bool {
        let handed_over = self.port.handed_over_event().as_fd();
        let listener = self.listener.as_ref().map_or(handed_over, AsFd::as_fd);
        loop {
            let mut polled = [self.stop.as_fd(), handed_over, listener]
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            match poll(&mut polled, None) {
                Ok(_) => return polled[0].revents().is_empty(),
                Err(Errno::INTR) => {}
                Err(errno) => {
                    let name = self.port.device().name();
                    log::error!("{name}: its front-ends are not served any more: {errno}");
                    return false;
                }
            }
        }
    }
}

/// Pauses, unless `stop` is readable.
fn pause(stop: BorrowedFd<'_>) {
    let mut polled = [PollFd::from_borrowed_fd(stop, PollFlags::IN)];
    let pause = Timespec { tv_sec: 0, tv_nsec: PAUSE.subsec_nanos().into() };
    // An interrupted pause is a short one.
    let _ = poll(&mut polled, Some(&pause));
}

/// Serves a front-end until it or this agent ends the connection.
fn serve_one(
    front_end: OwnedFd, port: &Arc<DevicePort>, stop: BorrowedFd<'_>,
) -> Result<(), Box<dyn std::error::Error>> {
    let name = port.device().name();
    let (connection, ended) = Connection::new(port.clone());
    let served = serve_connection(front_end, port, stop, connection);
    port.set_front_end(None);
    wait_for_threads(name, &ended, stop);
    port.device().disconnected();
    served
}

/// Returns when the library's threads have been told to end. The last one of them drops the last
/// copy of `connection`.
fn serve_connection(
    front_end: OwnedFd, port: &Arc<DevicePort>, stop: BorrowedFd<'_>, connection: Connection,
) -> Result<(), Box<dyn std::error::Error>> {
    let name = port.device().name();
    let wake_token = connection.wake_token();
    let memory = Memory::new(Mapped::new());
    let mut daemon = VhostUserDaemon::new(name.to_owned(), connection.clone(), memory)
        .map_err(|error| error.to_string())?;
    let queues = daemon.get_epoll_handlers();
    for handler in &queues {
        handler.register_listener(
            port.wake_event().as_fd().as_raw_fd(),
            EventSet::IN,
            wake_token,
        )?;
    }
    let library = connect_to_library(&mut daemon)?;
    let relayed = relay::run(front_end.into(), library.into(), port, stop);
    connection.end();
    // This waits for the library's threads, one of which may be in the middle of a buffer.
    let close = move || {
        // The library reads the end of the connection, and its thread ends. It calls that an error,
        // too.
        if let Err(error) = daemon.wait() {
            log::debug!("{name}: {error}");
        }
        queues.iter().for_each(|handler| handler.send_exit_event());
        drop((daemon, queues));
    };
    Builder::new().name(format!("{name}-end")).spawn(close)?;
    Ok(relayed?)
}

/// Waits for the threads of a connection. The next front-end may have the same driver, so two of
/// them must not be served at once. An agent that ends does not wait for ever.
fn wait_for_threads(name: &str, ended: &Receiver<()>, stop: BorrowedFd<'_>) {
    while ended.recv_timeout(END_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
        log::warn!("{name}: a buffer of the last front-end is still being handled");
        if is_readable(stop) {
            return;
        }
    }
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

/// A socket to the library, which accepts connections and takes none that are made.
fn connect_to_library(
    daemon: &mut VhostUserDaemon<Connection>,
) -> Result<OwnedFd, Box<dyn std::error::Error>> {
    let (listener, connected) = opener::listening_pair()?;
    let mut listener = Listener::from(UnixListener::from(listener));
    daemon.start(&mut listener).map_err(|error| error.to_string())?;
    Ok(connected)
}
