// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Addresses that a user writes.

use super::heap::{fair, within};
use pageferry_agent::transport::Address;

/// An address prints the text that it was parsed from, and a refusal repeats the text.
pub fn address(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    match within(fair(data), || Address::parse(text)) {
        Ok(Address::Tcp(rest) | Address::Tls(rest)) => {
            let (host, port) = rest.rsplit_once(':').unwrap_or_default();
            assert!(!host.is_empty() && port.parse::<u16>().is_ok(), "{text:?}");
            let prefix = &text[..3];
            super::same(format!("{prefix}:{rest}"), text.to_owned());
            true
        }
        Ok(Address::Unix(path)) => {
            super::same(format!("unix:{}", path.display()), text.to_owned());
            true
        }
        Err(error) => {
            assert!(error.to_string().contains(text), "{error}");
            false
        }
    }
}

/// One address of each kind.
pub fn address_seeds() -> Vec<Vec<u8>> {
    [
        "tcp:[::1]:70",
        "tcp:host.example:65535",
        "tcp:10.0.0.2:0",
        "unix:/run/vm 1/peer.sock",
        "unix:x",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
