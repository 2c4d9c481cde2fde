// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whom this agent trusts on a network, and how it proves who it is itself.
//!
//! An address `tls:HOST:PORT` needs a [`Credential`]. Both sides prove themselves with it before a
//! byte of the stream is sent or read:
//!
//! - With a [`Folder`] of certificates, both show a certificate and check that of the other one.
//!   The source checks also that the certificate is for the host of the address. Both can be told
//!   the names of the peers that they serve.
//! - With a [`Token`], both prove that they have the same one.
//!
//! Only TLS 1.3 is spoken. The record layer, the handshake, and the checks of certificates and
//! signatures are rustls'.
//!
//! - `folder`, `token`: the two kinds of credentials;
//! - `cached`: reads files again when they have changed;
//! - `one_key`: accepts the public key of a token;
//! - `secured`: a connection, and how its peer proves itself;
//! - `peer`: who has proved itself there;
//! - `error`, `words`: why a peer is not trusted.

mod cached;
mod error;
mod folder;
mod one_key;
mod peer;
mod secured;
mod token;
mod words;

pub use error::TrustError;
pub use folder::Folder;
pub use peer::Peer;
pub use secured::{Connection, Proof, Secured};
pub use token::Token;

use rustls::client::UnbufferedClientConnection;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::{CipherSuite, ClientConfig, ServerConfig};
use std::path::Path;
use std::sync::Arc;

/// The algorithms of ring. AES with keys of 128 bits comes first: it is as sound here as with 256,
/// and takes less time.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    let first = CipherSuite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != first);
    Arc::new(provider)
}

/// What an agent proves itself with, and whom it trusts by that.
#[derive(Debug)]
pub enum Credential {
    /// Certificates.
    Folder(Folder),
    /// A token.
    Token(Token),
}

impl Credential {
    fn client(&self) -> Result<Arc<ClientConfig>, TrustError> {
        match self {
            Self::Folder(folder) => folder.client(),
            Self::Token(token) => token.client(),
        }
    }

    fn server(&self) -> Result<Arc<ServerConfig>, TrustError> {
        match self {
            Self::Folder(folder) => folder.server(),
            Self::Token(token) => token.server(),
        }
    }

    fn proof(&self) -> Proof {
        match self {
            Self::Folder(folder) => Proof::Certificate(folder.allowed().to_vec()),
            Self::Token(_) => Proof::Token,
        }
    }

    fn check(&self) -> Result<(), TrustError> {
        match self {
            Self::Folder(folder) => folder.check(),
            Self::Token(token) => token.client().map(drop),
        }
    }
}

/// Whom this agent trusts. Clones are cheap.
#[derive(Debug, Clone, Default)]
pub struct Trust(Option<Arc<Credential>>);

impl Trust {
    /// Trusts whom the certificate authority of this folder has signed, and of these only peers
    /// with one of the names `allowed`, if there are any.
    ///
    /// # Errors
    /// If a name can be none of a certificate.
    pub fn in_folder(path: &Path, allowed: &[String]) -> Result<Self, TrustError> {
        Ok(Self(Some(Arc::new(Credential::Folder(Folder::new(path, allowed)?)))))
    }

    /// Trusts whoever has the same token as this file.
    pub fn by_token(path: &Path) -> Self {
        Self(Some(Arc::new(Credential::Token(Token::new(path)))))
    }

    /// Checks that the credential can be used now, if there is one.
    ///
    /// # Errors
    /// If a file is missing, malformed, or readable by others.
    pub fn check(&self) -> Result<(), TrustError> {
        self.0.as_ref().map_or(Ok(()), |credential| credential.check())
    }

    /// What this side finds wrong with its own certificates, of which a peer may think otherwise.
    pub fn doubts(&self) -> Vec<TrustError> {
        match self.0.as_deref() {
            Some(Credential::Folder(folder)) => folder.doubts(),
            Some(Credential::Token(_)) | None => Vec::new(),
        }
    }

    fn credential(&self) -> Result<&Credential, TrustError> {
        self.0.as_deref().ok_or(TrustError::NoCredential)
    }

    /// Checks that this agent can connect to `host`.
    ///
    /// # Errors
    /// If it has no credential, it cannot be used, or `host` can be no name of a host.
    pub fn check_target(&self, host: &str) -> Result<(), TrustError> {
        host_name(host)?;
        self.credential()?.client().map(drop)
    }

    /// Checks that this agent can listen.
    ///
    /// # Errors
    /// If it has no credential, or it cannot be used.
    pub fn check_listen(&self) -> Result<(), TrustError> {
        self.credential()?.server().map(drop)
    }

    /// The side of the source. With certificates, the peer must be `host`.
    ///
    /// # Errors
    /// As [`Trust::check_target`].
    pub fn connect(&self, host: &str) -> Result<Secured, TrustError> {
        let credential = self.credential()?;
        let name = host_name(host)?;
        let connection = UnbufferedClientConnection::new(credential.client()?, name)?;
        Ok(Secured { connection: Connection::Client(connection), proof: credential.proof() })
    }

    /// The side of the destination.
    ///
    /// # Errors
    /// As [`Trust::check_listen`].
    pub fn accept(&self) -> Result<Secured, TrustError> {
        let credential = self.credential()?;
        let connection = UnbufferedServerConnection::new(credential.server()?)?;
        Ok(Secured { connection: Connection::Server(connection), proof: credential.proof() })
    }
}

/// The name of a host, or an address.
///
/// # Errors
/// If it can be none.
pub fn host_name(text: &str) -> Result<ServerName<'static>, TrustError> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    ServerName::try_from(bare.to_owned()).map_err(|_| TrustError::Name(text.to_owned()))
}
