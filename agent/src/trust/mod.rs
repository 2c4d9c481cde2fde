// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whom this agent trusts on a network, and by what it is known itself.
//!
//! An address `tls:HOST:PORT` needs a folder of certificates ([`Folder`]). Both sides show a
//! certificate and check that of the other one, before a byte of the stream is sent or read. The
//! source checks also that the certificate is for the host of the address. Both can be told the
//! names of the peers that they serve.
//!
//! Only TLS 1.3 is spoken. The record layer and the checks of certificates are rustls'.

mod folder;

pub use folder::{Folder, TrustError};

use rustls::pki_types::ServerName;
use rustls::server::ParsedCertificate;
use rustls::{ClientConnection, Connection, ServerConnection};
use std::path::Path;
use std::sync::Arc;

/// Whom this agent trusts. Clones are cheap.
#[derive(Debug, Clone, Default)]
pub struct Trust(Option<Arc<Folder>>);

/// A connection that has not begun its handshake, and the peers that may be at its other end.
#[derive(Debug)]
pub struct Secured {
    /// The connection.
    pub connection: Connection,
    /// The names of which the peer's certificate must have one. Empty if all that the authority has
    /// signed may be there.
    pub allowed: Vec<ServerName<'static>>,
}

impl Trust {
    /// Trusts whom the certificate authority of this folder has signed, and of these only peers
    /// with one of the names `allowed`, if there are any.
    ///
    /// # Errors
    /// If a name can be none of a certificate.
    pub fn in_folder(path: &Path, allowed: &[String]) -> Result<Self, TrustError> {
        Ok(Self(Some(Arc::new(Folder::new(path, allowed)?))))
    }

    /// Checks that the folder can be used now, if there is one.
    ///
    /// # Errors
    /// If a file is missing, malformed, or readable by others.
    pub fn check(&self) -> Result<(), TrustError> {
        self.0.as_ref().map_or(Ok(()), |folder| folder.check())
    }

    fn folder(&self) -> Result<&Folder, TrustError> {
        self.0.as_deref().ok_or(TrustError::NoFolder)
    }

    /// Checks that this agent can connect to `host`.
    ///
    /// # Errors
    /// If it has no certificates, they cannot be used, or `host` can be no name of one.
    pub fn check_target(&self, host: &str) -> Result<(), TrustError> {
        folder::name(host)?;
        self.folder()?.client().map(drop)
    }

    /// Checks that this agent can listen.
    ///
    /// # Errors
    /// If it has no certificates, or they cannot be used.
    pub fn check_listen(&self) -> Result<(), TrustError> {
        self.folder()?.server().map(drop)
    }

    /// The side of the source, whose peer must be `host`.
    ///
    /// # Errors
    /// As [`Trust::check_target`].
    pub fn connect(&self, host: &str) -> Result<Secured, TrustError> {
        let folder = self.folder()?;
        let name = folder::name(host)?;
        let connection = ClientConnection::new(folder.client()?, name)?.into();
        Ok(Secured { connection, allowed: folder.allowed().to_vec() })
    }

    /// The side of the destination.
    ///
    /// # Errors
    /// As [`Trust::check_listen`].
    pub fn accept(&self) -> Result<Secured, TrustError> {
        let folder = self.folder()?;
        let connection = ServerConnection::new(folder.server()?)?.into();
        Ok(Secured { connection, allowed: folder.allowed().to_vec() })
    }
}

impl Secured {
    /// Checks the name of the peer, whose certificate the handshake has checked.
    ///
    /// # Errors
    /// If it has none of the names that are allowed.
    pub fn check_peer(&self) -> Result<(), TrustError> {
        if self.allowed.is_empty() {
            return Ok(());
        }
        let certificate = self.connection.peer_certificates().and_then(<[_]>::first);
        let certificate = certificate.ok_or(TrustError::NotAllowed)?;
        let parsed = ParsedCertificate::try_from(certificate)?;
        let has = |name| rustls::client::verify_server_name(&parsed, name).is_ok();
        if self.allowed.iter().any(has) { Ok(()) } else { Err(TrustError::NotAllowed) }
    }
}
