// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who is let in, and who has to leave for that.
//!
//! There are at most `MAX_CONNECTIONS` connections. When a new connection arrives and the limit is
//! reached, the server closes another connection, chosen in this order:
//!
//! 1. a connection that has not read an answer for `GRACE`: the one that waits for longest;
//! 2. a connection that has sent no request for `GRACE` and has all its answers: the one that is
//!    silent for longest;
//! 3. after the new connection has waited for `GRACE`, because all others keep sending requests:
//!    the oldest connection.
//!
//! Connections that have subscribed to events are the last choice in 2 and 3. The VMM's connection
//! is never closed. While the new connection waits, further ones stay in the listener's queue. So
//! idle connections, and connections that flood the agent, do not keep a VMM or an operator out for
//! long.

use super::connection::ConnectionState;
use super::{LISTENER, Server};
use crate::transport::backoff::{self, is_momentary};
use crate::transport::unix_socket::check_peer;
use rustix::process::{Resource, getrlimit};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most connections at once.
const MAX_CONNECTIONS: usize = 128;
/// A connection may be closed for a new one if it has been silent, or has not read its answer, for
/// this long. After a new connection has waited for this long, any connection may be closed.
const GRACE: Duration = Duration::from_millis(100);
/// Time between two attempts to find a connection that can be closed.
const ROOM_RETRY: Duration = Duration::from_millis(20);

impl Server {
    /// Accepts a connection. Only the user of this process and root may connect.
    pub(super) fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let accepted = match listener.accept() {
            Ok(socket) => socket,
            Err(error) if is_momentary(&error) => return,
            Err(error) => return self.pause_accepting(&error),
        };
        if let Err(error) = check_peer(&accepted) {
            log::warn!("{}", crate::error::chain(&error));
            return;
        }
        self.admit(accepted, Instant::now());
    }

    /// Serves a new connection that has waited for a place since `since`. If there is still no
    /// place, the connection waits on.
    fn admit(&mut self, socket: OwnedFd, since: Instant) {
        if !self.make_room(since.elapsed() >= GRACE) {
            self.waiting = Some((socket, since));
            return self.accept_after(ROOM_RETRY);
        }
        if let Err(error) = self.add_connection(socket) {
            self.pause_accepting(&error);
        }
    }

    /// Accepts no connection for [`backoff::PAUSE`], because the process has no descriptor or
    /// memory for one. That may end soon, or never.
    fn pause_accepting(&mut self, error: &io::Error) {
        self.backoff.failed(error, Instant::now());
        self.accept_after(backoff::PAUSE);
    }

    /// Leaves new connections in the listener's queue for the time `pause`.
    fn accept_after(&mut self, pause: Duration) {
        if let Some(listener) = &self.listener {
            if self.accept_again.is_none() {
                self.reactor.remove(listener.as_fd());
            }
            self.accept_again = Some(Instant::now() + pause);
        }
    }

    /// Accepts connections again once the pause is over. The connection that waits comes first.
    pub(super) fn resume_accepting(&mut self) {
        if self.accept_again.is_none_or(|due| due > Instant::now()) {
            return;
        }
        let due = self.accept_again;
        if let Some((socket, since)) = self.waiting.take() {
            self.admit(socket, since);
            // There is still no place, or the process has no resources for the connection.
            if self.accept_again != due {
                return;
            }
        }
        let Some(listener) = &self.listener else { return };
        match self.reactor.add(listener.as_fd(), LISTENER) {
            Ok(()) => self.accept_again = None,
            Err(error) => self.pause_accepting(&error),
        }
    }

    /// Makes sure that there is a place for one more connection. If necessary, closes one as the
    /// header of this file describes. Returns false if no connection may be closed now. With
    /// `close_any`, even a busy connection may be closed; the VMM's never is.
    fn make_room(&mut self, close_any: bool) -> bool {
        let open = || {
            self.connections
                .values()
                .map(|(connection, _)| connection)
                .filter(|connection| !connection.is_closed())
        };
        if open().count() < max_connections() {
            return true;
        }
        let may_close = |connection: &&Arc<ConnectionState>| {
            self.inherited != Some(connection.token) && !self.hub.session.is_owner(connection.token)
        };
        let now = Instant::now();
        let unread = |connection: &Arc<ConnectionState>| {
            connection.unread_for().filter(|unread| *unread >= GRACE)
        };
        let silent = |connection: &Arc<ConnectionState>| {
            !connection.is_busy() && now.saturating_duration_since(connection.last_heard()) >= GRACE
        };
        let unread_longest = open()
            .filter(may_close)
            .filter(|connection| unread(connection).is_some())
            .max_by_key(|connection| unread(connection));
        // A client that only watches a job may send nothing for a long time.
        let silent_longest = || {
            let silent = open().filter(may_close).filter(|connection| silent(connection));
            silent.min_by_key(|connection| (connection.is_subscribed(), connection.last_heard()))
        };
        let oldest = || {
            open()
                .filter(may_close)
                .filter(|_| close_any)
                .min_by_key(|connection| (connection.is_subscribed(), connection.opened()))
        };
        let (connection, why) = if let Some(connection) = unread_longest {
            (connection, "because it does not read its answers")
        } else if let Some(connection) = silent_longest() {
            (connection, "because it has been silent for longest")
        } else if let Some(connection) = oldest() {
            (connection, "because it is the oldest")
        } else {
            return false;
        };
        log::warn!(
            "more than {} connections: connection {} is closed {why}",
            max_connections(),
            connection.token
        );
        connection.close();
        true
    }
}

/// The limit of connections. They use at most a quarter of the descriptors of the process; the rest
/// is for the VMM's memory and for jobs.
fn max_connections() -> usize {
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(descriptors / 4).unwrap_or(MAX_CONNECTIONS).clamp(2, MAX_CONNECTIONS)
}
