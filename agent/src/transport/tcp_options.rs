// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The options of TCP sockets.

use rustix::net::{AddressFamily, sockopt};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

/// Sets the options of a TCP socket; other sockets are left alone.
///
/// - Small records are sent at once (`TCP_NODELAY`).
/// - A peer whose host is gone is noticed within about twice `timeout`, also while this side has
///   nothing to send or waits for its bandwidth limit (keep-alive probes, `TCP_USER_TIMEOUT`).
///
/// # Errors
/// If the kernel refuses an option.
pub fn tune(fd: BorrowedFd<'_>, timeout: Duration) -> rustix::io::Result<()> {
    let domain = sockopt::socket_domain(fd)?;
    if domain == AddressFamily::INET || domain == AddressFamily::INET6 {
        sockopt::set_tcp_nodelay(fd, true)?;
        sockopt::set_socket_keepalive(fd, true)?;
        // The first probe after half of the timeout, and three in the other half. The kernel takes
        // whole seconds.
        let seconds = |part: Duration| Duration::from_secs(part.as_secs().clamp(1, 3600));
        sockopt::set_tcp_keepidle(fd, seconds(timeout / 2))?;
        sockopt::set_tcp_keepintvl(fd, seconds(timeout / 6))?;
        sockopt::set_tcp_keepcnt(fd, 3)?;
        // While sent bytes are not acknowledged, the kernel sends no probes. Then this option ends
        // the connection.
        let unacknowledged = u32::try_from(2 * timeout.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(fd, unacknowledged.max(1000))?;
    }
    Ok(())
}

/// Selects a congestion control without pacing, for a connection over loopback.
///
/// Pacing, as in BBR, is made for network links. Between two processes of one host, as when a VMM
/// is replaced under its guest, it only costs timers. This must be called before the socket is
/// connected: on a connected socket the pacing would stay.
pub fn disable_pacing(socket: &OwnedFd) {
    // If the kernel does not offer "reno", the default stays.
    let _ = sockopt::set_tcp_congestion(socket, "reno");
}
