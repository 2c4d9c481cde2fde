// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Consent to plain TCP on a network.
//!
//! Over `tcp:` everybody on the way can read and change a guest's memory, and everybody who reaches
//! the port can send a guest. So the agent connects and listens there only on loopback addresses,
//! unless whoever has started it allows more (`pageferry agent --insecure`). What counts are the
//! addresses that a name has at that moment.

use super::error::TransportError;
use std::net::SocketAddr;

/// Whether guest memory may cross a network in the clear.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PlainNetworks {
    /// Plain TCP stays on this host.
    #[default]
    Refused,
    /// Plain TCP may go anywhere. The log says where it does.
    Allowed,
}

impl PlainNetworks {
    /// Checks that plain TCP may be used for all of `found`, the socket addresses of `address`.
    ///
    /// # Errors
    /// If one of them is no loopback address, and those are the only ones that are allowed.
    pub fn check(self, address: &str, found: &[SocketAddr]) -> Result<(), TransportError> {
        let is_remote = |found: &&SocketAddr| !found.ip().to_canonical().is_loopback();
        let Some(remote) = found.iter().find(is_remote) else { return Ok(()) };
        match self {
            Self::Refused => {
                Err(TransportError::PlainNetwork { address: address.to_owned(), ip: remote.ip() })
            }
            Self::Allowed => {
                log::warn!(
                    "{address}: {} is not a loopback address, so guest memory crosses the network \
                     in the clear (--insecure)",
                    remote.ip()
                );
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_tcp_stays_on_this_host_unless_more_is_allowed() {
        let addresses = |list: &[&str]| -> Vec<SocketAddr> {
            list.iter().map(|one| one.parse().unwrap()).collect()
        };
        for local in [
            &["127.0.0.1:1", "127.9.9.9:2"][..],
            &["[::1]:3", "[::ffff:127.0.0.1]:4", "127.0.0.1:5"],
        ] {
            PlainNetworks::Refused.check("tcp:localhost:1", &addresses(local)).unwrap();
        }
        for remote in [
            &["0.0.0.0:1"][..],
            &["[::]:1"],
            &["127.0.0.1:1", "10.0.0.2:1"],
            &["[fe80::1]:1"],
            &["[::ffff:10.0.0.2]:1"],
        ] {
            let found = addresses(remote);
            let error = PlainNetworks::Refused.check("tcp:name:1", &found).unwrap_err();
            let (error, last) = (error.to_string(), found.last().unwrap().ip().to_string());
            assert!(error.contains("tcp:name:1") && error.contains(&last), "{error}");
            assert!(error.contains("in the clear") && error.contains("--insecure"), "{error}");
            PlainNetworks::Allowed.check("tcp:name:1", &found).unwrap();
        }
    }
}
