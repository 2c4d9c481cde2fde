// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The socket of a device: serves one front-end after another, on a thread of its own.

use super::back_end::Connection;
use super::buffer::Mapped;
use super::port::DevicePort;
use super::queues::Memory;
use super::relay;
use crate::event::Event;
use crate::transport::unix_path::UnixPathListener;
use crate::transport::unix_socket::check_peer;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
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

/// The socket of a device. Dropping it ends the connection.
#[derive(Debug)]
pub struct DeviceSocket {
    port: Arc<DevicePort>,
    stop: Event,
    thread: Option<JoinHandle<()>>,
}

impl DeviceSocket {
    /// Waits for front-ends at `path`, which gets mode 0600.
    ///
    /// # Errors
    /// If the path cannot be bound, or the kernel refuses a thread.
    pub fn listen(path: &Path, port: Arc<DevicePort>) -> io::Result<Self> {
        let listener = UnixPathListener::bind(path)?;
        let stop = Event::new()?;
        let (served, end, path) = (port.clone(), stop.try_clone()?, path.to_owned());
        let serve = move || serve(&listener, &path, &served, end.as_fd());
        let thread = Builder::new().name(port.device().name().to_owned()).spawn(serve)?;
        Ok(Self { port, stop, thread: Some(thread) })
    }

    /// The device.
    pub fn port(&self) -> &Arc<DevicePort> {
        &self.port
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

fn serve(listener: &UnixPathListener, path: &Path, port: &Arc<DevicePort>, stop: BorrowedFd<'_>) {
    let name = port.device().name();
    while wait(listener.as_fd(), stop) {
        let front_end = match accept_with(listener.as_fd(), SocketFlags::CLOEXEC) {
            Ok(front_end) => front_end,
            Err(errno) => {
                log::warn!("{name}: a front-end cannot be accepted: {errno}");
                pause(stop);
                continue;
            }
        };
        if let Err(error) = check_peer(&front_end) {
            log::warn!("{name}: {}", crate::error::chain(&error));
            continue;
        }
        log::info!("{name}: a front-end has connected");
        if let Err(error) = serve_one(front_end, path, port, stop) {
            log::warn!("{name}: {}", crate::error::chain(&*error));
            pause(stop);
        }
        log::info!("{name}: the front-end is gone");
    }
}

/// Waits until `fd` is readable. False if `stop` is.
fn wait(fd: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> bool {
    loop {
        let mut polled = [
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
        ];
        match poll(&mut polled, None) {
            Ok(_) => return polled[0].revents().is_empty(),
            Err(Errno::INTR) => {}
            Err(errno) => {
                log::error!("the socket of a device is not served any more: {errno}");
                return false;
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
    front_end: OwnedFd, path: &Path, port: &Arc<DevicePort>, stop: BorrowedFd<'_>,
) -> Result<(), Box<dyn std::error::Error>> {
    let name = port.device().name();
    let (connection, ended) = Connection::new(port.clone());
    let served = serve_connection(front_end, path, port, stop, connection);
    port.set_front_end(None);
    wait_for_threads(name, &ended);
    port.device().disconnected();
    served
}

/// Returns when the library's threads have been told to end. The last one of them drops the last
/// copy of `connection`.
fn serve_connection(
    front_end: OwnedFd, path: &Path, port: &Arc<DevicePort>, stop: BorrowedFd<'_>,
    connection: Connection,
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
    let library = connect_to_library(&mut daemon, path)?;
    let relayed = relay::run(front_end.into(), library.into(), port, stop);
    connection.end();
    // The library reads the end of the connection, and its thread ends.
    let waited = daemon.wait();
    queues.iter().for_each(|handler| handler.send_exit_event());
    relayed?;
    // The library calls the end of a connection an error, too.
    if let Err(error) = waited {
        log::debug!("{name}: {error}");
    }
    Ok(())
}

/// Waits for the threads of a connection. The next front-end may have the same driver, so two of
/// them must not be served at once.
fn wait_for_threads(name: &str, ended: &Receiver<()>) {
    while ended.recv_timeout(END_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
        log::warn!("{name}: a buffer of the last front-end is still being handled");
    }
}

/// A socket to the library, which accepts connections and takes none that are made.
fn connect_to_library(
    daemon: &mut VhostUserDaemon<Connection>, path: &Path,
) -> Result<OwnedFd, Box<dyn std::error::Error>> {
    let mut inner = path.as_os_str().to_owned();
    inner.push(".inner");
    let inner = PathBuf::from(inner);
    // Only this user can connect. The path is gone as soon as the library has accepted.
    let listening = UnixPathListener::bind(&inner)?;
    let mut listener = Listener::from(UnixListener::from(listening.as_fd().try_clone_to_owned()?));
    let connected = UnixStream::connect(&inner)?;
    daemon.start(&mut listener).map_err(|error| error.to_string())?;
    Ok(connected.into())
}
