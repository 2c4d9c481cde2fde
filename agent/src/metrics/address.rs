// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The address that `--metrics` takes: as any other ([`Address`]), or a bare `HOST:PORT`.

use crate::transport::unix_path::MODE_GROUP;
use crate::transport::{Address, Listener, TransportError};

/// Reads the address.
///
/// # Errors
/// If the text is no address. The error says what is allowed.
pub fn parse(text: &str) -> Result<Address, String> {
    let parsed = match Address::parse(text) {
        Err(_) if !text.starts_with("tcp:") && !text.starts_with("unix:") => {
            Address::parse(&format!("tcp:{text}"))
        }
        parsed => parsed,
    };
    let plain = |address: &Address| address.secured_host().is_none();
    parsed.ok().filter(plain).ok_or_else(|| {
        format!("\"{text}\": write unix:PATH, with a path of at most 107 bytes, or HOST:PORT")
    })
}

/// Listens. A UNIX socket gets mode 0660, so its group can be let in.
///
/// # Errors
/// If the address is in use, or does not belong to this host.
pub fn listen(address: &Address) -> Result<Listener, TransportError> {
    address.listen_with_mode(MODE_GROUP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_bare_host_and_port_is_read_and_other_text_refused() {
        let tcp = Address::Tcp("[::1]:9091".to_owned());
        assert_eq!(parse("[::1]:9091"), Ok(tcp.clone()));
        assert_eq!(parse("tcp:[::1]:9091"), Ok(tcp));
        assert_eq!(parse("unix:/run/a"), Ok(Address::Unix("/run/a".into())));
        for wrong in ["", "9091", ":9091", "localhost", "localhost:x", "unix:", "/run/a", "a:b:"] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(&format!("\"{wrong}\"")) && error.contains("HOST:PORT"));
        }
    }

    #[test]
    fn a_socket_lets_its_group_in() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics");
        let _listener = listen(&Address::Unix(path.clone())).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    }
}
