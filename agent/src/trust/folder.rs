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

use super::cached::{Cached, check_mode};
use super::{TrustError, host_name, provider, words};
use crate::opener;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig};
use std::fs::Metadata;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest file in bytes.
const LONGEST_FILE: usize = 16 << 20;
const KEY: &str = "private key";
const AUTHORITIES: &str = "ca-cert.pem";
const REVOKED: &str = "ca-crl.pem";

/// The files of one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    certificate: &'static str,
    key: &'static str,
    side: &'static str,
}

const SERVER: Identity =
    Identity { certificate: "server-cert.pem", key: "server-key.pem", side: "a destination" };
const CLIENT: Identity =
    Identity { certificate: "client-cert.pem", key: "client-key.pem", side: "a source" };

/// A folder of certificates.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    allowed: Vec<ServerName<'static>>,
    client: Cached<ClientConfig>,
    server: Cached<ServerConfig>,
}

impl Folder {
    /// A folder that is read when it is needed.
    ///
    /// # Errors
    /// If one of the names can be none of a certificate.
    pub fn new(path: &Path, allowed: &[String]) -> Result<Self, TrustError> {
        let allowed = allowed.iter().map(|text| host_name(text)).collect::<Result<_, _>>()?;
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

    /// What this side finds wrong with its own certificates. It is no error: the peers may trust
    /// other authorities.
    pub fn doubts(&self) -> Vec<TrustError> {
        [CLIENT, SERVER].into_iter().filter_map(|identity| self.doubt(identity).err()).collect()
    }

    fn doubt(&self, identity: Identity) -> Result<(), TrustError> {
        if !self.has(identity) {
            return Ok(());
        }
        let (roots, revoked) = (Arc::new(self.authorities()?), self.revoked()?);
        let chain = self.certificates(identity.certificate)?;
        let Some((first, others)) = chain.split_first() else { return Ok(()) };
        let now = UnixTime::now();
        let checked = if identity == CLIENT {
            let verifier = self.of_clients(roots, revoked, provider())?;
            verifier.verify_client_cert(first, others, now).map(drop)
        } else {
            // Which of its names a source will ask for is not known here.
            let verifier = self.of_servers(roots, revoked, provider())?;
            let any = ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into());
            verifier.verify_server_cert(first, others, &any, &[], now).map(drop)
        };
        match checked {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            ))
            | Ok(()) => Ok(()),
            Err(error) => Err(self.of_certificate(identity, error)),
        }
    }

    /// Checks destinations.
    fn of_servers(
        &self, roots: Arc<RootCertStore>, revoked: Vec<CertificateRevocationListDer<'static>>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Arc<WebPkiServerVerifier>, TrustError> {
        WebPkiServerVerifier::builder_with_provider(roots, provider)
            .with_crls(revoked)
            .enforce_revocation_expiration()
            .build()
            .map_err(|error| self.of_verifier(error))
    }

    /// Checks sources.
    fn of_clients(
        &self, roots: Arc<RootCertStore>, revoked: Vec<CertificateRevocationListDer<'static>>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ClientCertVerifier>, TrustError> {
        WebPkiClientVerifier::builder_with_provider(roots, provider)
            .with_crls(revoked)
            .enforce_revocation_expiration()
            .build()
            .map_err(|error| self.of_verifier(error))
    }

    /// The names of the peers that are allowed; empty for all.
    pub fn allowed(&self) -> &[ServerName<'static>] {
        &self.allowed
    }

    fn has(&self, identity: Identity) -> bool {
        opener::metadata(&self.path.join(identity.certificate)).is_ok()
    }

    /// What a source needs.
    ///
    /// # Errors
    /// If a file is missing or malformed.
    pub fn client(&self) -> Result<Arc<ClientConfig>, TrustError> {
        self.cached(&self.client, CLIENT, |roots, revoked, provider| {
            let verifier = self.of_servers(roots, revoked, provider.clone())?;
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
            let verifier = self.of_clients(roots, revoked, provider.clone())?;
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
        &self, cache: &Cached<T>, identity: Identity,
        read: impl FnOnce(
            Arc<RootCertStore>,
            Vec<CertificateRevocationListDer<'static>>,
            Arc<CryptoProvider>,
        ) -> Result<T, TrustError>,
    ) -> Result<Arc<T>, TrustError> {
        let files = [AUTHORITIES, REVOKED, identity.certificate, identity.key];
        cache.get(&files.map(|name| self.path.join(name)), || {
            read(Arc::new(self.authorities()?), self.revoked()?, provider())
        })
    }

    fn authorities(&self) -> Result<RootCertStore, TrustError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates(AUTHORITIES)? {
            let added = roots.add(certificate);
            added.map_err(|error| own(self.path.join(AUTHORITIES), error))?;
        }
        Ok(roots)
    }

    fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, TrustError> {
        match self.read(REVOKED, "revocation list") {
            // Only a list that does not exist revokes nothing. One that cannot be read may revoke a
            // peer, and so may one that a link names.
            Err(TrustError::Read(path, error))
                if error.kind() == ErrorKind::NotFound && !path.is_symlink() =>
            {
                Ok(Vec::new())
            }
            read => read,
        }
    }

    fn certificates(&self, file: &str) -> Result<Vec<CertificateDer<'static>>, TrustError> {
        self.read(file, "certificate")
    }

    /// All objects of this kind in a file, which has at least one.
    fn read<T: PemObject>(&self, file: &str, what: &'static str) -> Result<Vec<T>, TrustError> {
        self.read_checked(file, what, |_, _| Ok(()))
    }

    /// The same of a file that is opened and passes `check`.
    fn read_checked<T: PemObject>(
        &self, file: &str, what: &'static str,
        check: impl FnOnce(&Path, &Metadata) -> Result<(), TrustError>,
    ) -> Result<Vec<T>, TrustError> {
        let path = self.path.join(file);
        let failed = |error| TrustError::Read(path.clone(), error);
        let opened = opener::open_to_read(&path).map_err(failed)?;
        check(&path, &opened.metadata().map_err(failed)?)?;
        let bytes = opener::read_open(opened, LONGEST_FILE).map_err(failed)?;
        let found: Result<Vec<T>, _> = T::pem_slice_iter(&bytes).collect();
        let has = |bytes: &[u8], word: &[u8]| bytes.windows(word.len()).any(|part| part == word);
        match found {
            Ok(found) if !found.is_empty() => Ok(found),
            _ if what == KEY && has(&bytes, b"ENCRYPTED") => Err(TrustError::Encrypted(path)),
            Ok(_) => Err(TrustError::Malformed { path, what, source: pem::Error::NoItemsFound }),
            Err(source) => Err(TrustError::Malformed { path, what, source }),
        }
    }

    fn identity(
        &self, identity: Identity,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TrustError> {
        let lacks = |error| match error {
            TrustError::Read(path, error) if error.kind() == ErrorKind::NotFound => {
                TrustError::Lacks { path, side: identity.side }
            }
            error => error,
        };
        let certificates = self.certificates(identity.certificate).map_err(lacks)?;
        let keys = self.read_checked(identity.key, KEY, check_mode).map_err(lacks)?;
        let missing =
            || TrustError::Lacks { path: self.path.join(identity.key), side: identity.side };
        Ok((certificates, keys.into_iter().next().ok_or_else(missing)?))
    }

    fn of_verifier(&self, error: VerifierBuilderError) -> TrustError {
        let file = if matches!(error, VerifierBuilderError::InvalidCrl(_)) {
            REVOKED
        } else {
            AUTHORITIES
        };
        TrustError::Authorities(self.path.join(file), error)
    }

    fn of_certificate(&self, identity: Identity, error: rustls::Error) -> TrustError {
        let path = self.path.join(identity.certificate);
        match error {
            rustls::Error::InconsistentKeys(_) => {
                TrustError::OtherKey { certificate: path, key: self.path.join(identity.key) }
            }
            // What rustls says of a key that ring does not take.
            rustls::Error::General(_) => TrustError::OwnKey(self.path.join(identity.key)),
            error => own(path, error),
        }
    }
}

/// What is wrong with a certificate of this side.
fn own(path: PathBuf, error: rustls::Error) -> TrustError {
    match error {
        rustls::Error::InvalidCertificate(error) => {
            TrustError::OwnCertificate(path, words::of_certificate(&error))
        }
        error => TrustError::Certificate(path, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_revocation_list_that_does_not_exist_revokes_nothing() {
        let home = tempfile::tempdir().unwrap();
        let folder = Folder::new(home.path(), &[]).unwrap();
        assert!(folder.revoked().unwrap().is_empty());
        let list = home.path().join(REVOKED);
        for target in [list.as_path(), Path::new("not there")] {
            std::os::unix::fs::symlink(target, &list).unwrap();
            let refused = folder.revoked().unwrap_err();
            assert!(matches!(&refused, TrustError::Read(path, _) if *path == list), "{refused}");
            std::fs::remove_file(&list).unwrap();
        }
        std::fs::create_dir(&list).unwrap();
        assert!(matches!(folder.revoked(), Err(TrustError::Read(..))));
    }
}
