// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A folder of certificates, as QEMU and Cloud Hypervisor have it.
//!
//! | file | what | who needs it |
//! | --- | --- | --- |
//! | `ca-cert.pem` | the certificates of the authorities that are trusted | both sides |
//! | `ca-crl.pem` | what they have revoked, if this file exists | both sides |
//! | `server-cert.pem`, `server-key.pem` | the certificate and its key | a destination |
//! | `client-cert.pem`, `client-key.pem` | the same | a source |
//!
//! The files are read again when they have changed, so a certificate can be renewed while the agent
//! runs. A key that others than its owner may read is refused.

use crate::lock::lock;
use crate::opener;
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fs::Metadata;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Longest file in bytes.
const LONGEST_FILE: usize = 16 << 20;
const AUTHORITIES: &str = "ca-cert.pem";
const REVOKED: &str = "ca-crl.pem";

/// The files of one side.
#[derive(Debug, Clone, Copy)]
struct Identity {
    certificate: &'static str,
    key: &'static str,
}

const SERVER: Identity = Identity { certificate: "server-cert.pem", key: "server-key.pem" };
const CLIENT: Identity = Identity { certificate: "client-cert.pem", key: "client-key.pem" };

/// Why a peer cannot be trusted, or this side cannot show who it is.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The agent has no folder.
    #[error("tls: needs certificates: start the agent with --tls FOLDER")]
    NoFolder,
    /// A file cannot be read.
    #[error("cannot read {0:?}")]
    Read(PathBuf, #[source] std::io::Error),
    /// A file has no such thing, or it is malformed.
    #[error("{path:?} has no {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it should have.
        what: &'static str,
        /// What is wrong.
        #[source]
        source: pem::Error,
    },
    /// Others may read the key.
    #[error("{path:?} has mode {mode:03o}, but nobody except its owner may read a key (chmod 600)")]
    KeyIsOpen {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// rustls does not take the authorities or what they revoked.
    #[error("{0:?}")]
    Authorities(PathBuf, #[source] VerifierBuilderError),
    /// rustls does not take a certificate or its key.
    #[error("{0:?}")]
    Certificate(PathBuf, #[source] rustls::Error),
    /// A name cannot be in a certificate.
    #[error("{0:?} is no name of a host and no IP address")]
    Name(String),
    /// The peer's certificate is for somebody else.
    #[error("the peer's certificate has none of the names that --tls-peer allows")]
    NotAllowed,
    /// Nothing is said to a peer before it has proved who it is.
    #[error("the peer has not proved who it is")]
    NotProved,
    /// The handshake or a record failed.
    #[error("TLS")]
    Tls(#[from] rustls::Error),
}

impl TrustError {
    /// True if this says something about a certificate, of the peer or of this side. False for what
    /// anybody can cause who sends some bytes.
    pub fn is_about_certificates(&self) -> bool {
        use rustls::Error::{
            AlertReceived, InvalidCertificate, NoCertificatesPresented, PeerIncompatible,
        };
        match self {
            Self::NotProved => false,
            Self::Tls(error) => matches!(
                error,
                AlertReceived(_)
                    | InvalidCertificate(_)
                    | NoCertificatesPresented
                    | PeerIncompatible(_)
            ),
            _ => true,
        }
    }
}

/// Identifies the content of files, by what the kernel says of each: device, inode, size, change.
type Stamp = Vec<Option<(u64, u64, u64, i64, i64)>>;

/// What was read, while the files are still the same.
type Cache<T> = Mutex<Option<(Stamp, Arc<T>)>>;

/// A folder of certificates.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    allowed: Vec<ServerName<'static>>,
    client: Cache<ClientConfig>,
    server: Cache<ServerConfig>,
}

/// The name of a host, or an address.
pub(super) fn name(text: &str) -> Result<ServerName<'static>, TrustError> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    ServerName::try_from(bare.to_owned()).map_err(|_| TrustError::Name(text.to_owned()))
}

impl Folder {
    /// A folder that is read when it is needed.
    ///
    /// # Errors
    /// If one of the names can be none of a certificate.
    pub fn new(path: &Path, allowed: &[String]) -> Result<Self, TrustError> {
        let allowed = allowed.iter().map(|text| name(text)).collect::<Result<_, _>>()?;
        let (client, server) = Default::default();
        Ok(Self { path: path.to_owned(), allowed, client, server })
    }

    /// The files that a folder may have.
    pub fn files(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
        let of = |identity: Identity| [identity.certificate, identity.key];
        let names = [[AUTHORITIES, REVOKED], of(SERVER), of(CLIENT)];
        let folder = folder.to_owned();
        names.into_iter().flatten().map(move |name| folder.join(name))
    }

    /// Reads the folder, to find out whether it can be used.
    ///
    /// # Errors
    /// If it cannot.
    pub fn check(&self) -> Result<(), TrustError> {
        // An agent may only ever be one of the two sides.
        if self.has(CLIENT) || !self.has(SERVER) {
            self.client()?;
        }
        if self.has(SERVER) {
            self.server()?;
        }
        Ok(())
    }

    /// The names of the peers that are allowed; empty for all.
    pub fn allowed(&self) -> &[ServerName<'static>] {
        &self.allowed
    }

    fn has(&self, identity: Identity) -> bool {
        self.path.join(identity.certificate).exists()
    }

    /// What a source needs.
    ///
    /// # Errors
    /// If a file is missing or malformed.
    pub fn client(&self) -> Result<Arc<ClientConfig>, TrustError> {
        self.cached(&self.client, CLIENT, |roots, revoked, provider| {
            let builder = WebPkiServerVerifier::builder_with_provider(roots, provider.clone());
            let verifier = builder
                .with_crls(revoked)
                .build()
                .map_err(|error| TrustError::Authorities(self.path.join(AUTHORITIES), error))?;
            let (certificates, key) = self.identity(CLIENT)?;
            let mut config = ClientConfig::builder_with_provider(provider)
                .with_protocol_versions(&[&TLS13])?
                .with_webpki_verifier(verifier)
                .with_client_auth_cert(certificates, key)
                .map_err(|error| self.of_certificate(CLIENT, error))?;
            // Every connection shows who it is.
            config.resumption = rustls::client::Resumption::disabled();
            Ok(config)
        })
    }

    /// What a destination needs.
    ///
    /// # Errors
    /// If a file is missing or malformed.
    pub fn server(&self) -> Result<Arc<ServerConfig>, TrustError> {
        self.cached(&self.server, SERVER, |roots, revoked, provider| {
            let builder = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
            let verifier = builder
                .with_crls(revoked)
                .build()
                .map_err(|error| TrustError::Authorities(self.path.join(AUTHORITIES), error))?;
            let (certificates, key) = self.identity(SERVER)?;
            let mut config = ServerConfig::builder_with_provider(provider)
                .with_protocol_versions(&[&TLS13])?
                .with_client_cert_verifier(verifier)
                .with_single_cert(certificates, key)
                .map_err(|error| self.of_certificate(SERVER, error))?;
            config.send_tls13_tickets = 0;
            Ok(config)
        })
    }

    fn cached<T>(
        &self, cache: &Cache<T>, identity: Identity,
        read: impl FnOnce(
            Arc<RootCertStore>,
            Vec<CertificateRevocationListDer<'static>>,
            Arc<CryptoProvider>,
        ) -> Result<T, TrustError>,
    ) -> Result<Arc<T>, TrustError> {
        let mut cache = lock(cache);
        // Before the files are read: if one changes meanwhile, it is read again the next time.
        let stamp = self.stamp(identity);
        if let Some((read, config)) = &*cache
            && *read == stamp
        {
            return Ok(config.clone());
        }
        let provider = Arc::new(ring::default_provider());
        let config = Arc::new(read(Arc::new(self.authorities()?), self.revoked()?, provider)?);
        *cache = Some((stamp, config.clone()));
        Ok(config)
    }

    fn stamp(&self, identity: Identity) -> Stamp {
        let of =
            |file: Metadata| (file.dev(), file.ino(), file.size(), file.ctime(), file.ctime_nsec());
        let files = [AUTHORITIES, REVOKED, identity.certificate, identity.key];
        files.iter().map(|name| self.path.join(name).metadata().ok().map(of)).collect()
    }

    fn authorities(&self) -> Result<RootCertStore, TrustError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates(AUTHORITIES)? {
            let added = roots.add(certificate);
            added.map_err(|error| TrustError::Certificate(self.path.join(AUTHORITIES), error))?;
        }
        Ok(roots)
    }

    fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, TrustError> {
        if !self.path.join(REVOKED).exists() {
            return Ok(Vec::new());
        }
        self.read(REVOKED, "revocation list")
    }

    fn certificates(&self, file: &str) -> Result<Vec<CertificateDer<'static>>, TrustError> {
        self.read(file, "certificate")
    }

    /// All objects of this kind in a file, which has at least one.
    fn read<T: PemObject>(&self, file: &str, what: &'static str) -> Result<Vec<T>, TrustError> {
        let path = self.path.join(file);
        let bytes = opener::read(&path, LONGEST_FILE)
            .map_err(|error| TrustError::Read(path.clone(), error))?;
        let found: Result<Vec<T>, _> = T::pem_slice_iter(&bytes).collect();
        match found {
            Ok(found) if !found.is_empty() => Ok(found),
            Ok(_) => Err(TrustError::Malformed { path, what, source: pem::Error::NoItemsFound }),
            Err(source) => Err(TrustError::Malformed { path, what, source }),
        }
    }

    fn identity(
        &self, identity: Identity,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TrustError> {
        let certificates = self.certificates(identity.certificate)?;
        let path = self.path.join(identity.key);
        let file = path.metadata().map_err(|error| TrustError::Read(path.clone(), error))?;
        let mode = file.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(TrustError::KeyIsOpen { path, mode });
        }
        let key = self.read(identity.key, "private key")?.into_iter().next();
        let missing = std::io::Error::from(ErrorKind::NotFound);
        Ok((certificates, key.ok_or(TrustError::Read(path, missing))?))
    }

    fn of_certificate(&self, identity: Identity, error: rustls::Error) -> TrustError {
        TrustError::Certificate(self.path.join(identity.certificate), error)
    }
}
