// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A token that both sides have, instead of certificates.
//!
//! The token is never sent. Both sides derive the same Ed25519 key from it (HKDF, RFC 5869), and
//! prove in the handshake of TLS that they have this key: each signs the handshake, which has fresh
//! random numbers of both sides, and shows the public key instead of a certificate (RFC 7250). Each
//! side accepts exactly this public key.
//!
//! Whoever connects to the destination sees the public key. So a token that can be guessed could be
//! tried in secret. Therefore it must be long, and random.
//!
//! The file is read again when it has changed. A file that others than its owner may read is
//! refused.

use super::cached::{Cached, check_mode};
use super::one_key::OneKey;
use super::{TrustError, provider};
use crate::opener;
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use rustls::client::AlwaysResolvesClientRawPublicKeys;
use rustls::crypto::ring::sign::any_eddsa_type;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zeroize::Zeroizing;

/// Fewest bytes of a token, without the white space around it.
pub(super) const MIN_TOKEN: usize = 32;
/// Most bytes of a token, without the white space around it.
pub(super) const MAX_TOKEN: usize = 4096;
/// Most bytes of white space around a token.
const MAX_SPACE: usize = 64;

/// Separates the keys of this program from what else is derived from the same token.
const SALT: &[u8] = b"pageferry token";
/// Separates this key from others that may be derived from the token one day.
const PURPOSE: &[u8] = b"TLS 1.3 raw public key, Ed25519 seed, version 1";

/// Bytes of the seed of an Ed25519 key; RFC 8032, section 5.1.5.
const SEED: usize = 32;
/// What stands before the seed in the PKCS #8 form of an Ed25519 key; RFC 8410, section 7.
const PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];

/// A file with a token.
#[derive(Debug)]
pub struct Token {
    path: PathBuf,
    client: Cached<ClientConfig>,
    server: Cached<ServerConfig>,
}

impl Token {
    /// A token that is read when it is needed.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), client: Cached::default(), server: Cached::default() }
    }

    /// What a source needs.
    ///
    /// # Errors
    /// If the file cannot be read, others may read it, or it has no token.
    pub fn client(&self) -> Result<Arc<ClientConfig>, TrustError> {
        self.client.get(std::slice::from_ref(&self.path), || {
            let (key, peer) = self.key()?;
            let mut config = ClientConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&TLS13])?
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(peer))
                .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(key)));
            // Every connection proves itself.
            config.resumption = rustls::client::Resumption::disabled();
            // The name says nothing here, and a stranger need not know it.
            config.enable_sni = false;
            Ok(config)
        })
    }

    /// What a destination needs.
    ///
    /// # Errors
    /// As [`Token::client`].
    pub fn server(&self) -> Result<Arc<ServerConfig>, TrustError> {
        self.server.get(std::slice::from_ref(&self.path), || {
            let (key, peer) = self.key()?;
            let mut config = ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&TLS13])?
                .with_client_cert_verifier(Arc::new(peer))
                .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(key)));
            config.send_tls13_tickets = 0;
            Ok(config)
        })
    }

    /// The key of both sides, and what accepts it.
    fn key(&self) -> Result<(Arc<CertifiedKey>, OneKey), TrustError> {
        let of_file = |error| TrustError::Certificate(self.path.clone(), error);
        let key = derive(&self.read()?).map_err(of_file)?;
        let public = key.public_key().map(|public| CertificateDer::from(public.to_vec()));
        let public = public.ok_or_else(|| of_file(rustls::Error::General("no key".into())))?;
        let certified = Arc::new(CertifiedKey::new(vec![public.clone()], key));
        Ok((certified, OneKey::new(public)))
    }

    /// The token. The buffer has its final size from the beginning: a buffer that grows leaves
    /// copies behind.
    fn read(&self) -> Result<Zeroizing<Vec<u8>>, TrustError> {
        let failed = |error| TrustError::Read(self.path.clone(), error);
        let file = opener::open_to_read(&self.path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        let none = |why| TrustError::NoToken(self.path.clone(), why);
        if !found.is_file() {
            return Err(none("it is no regular file"));
        }
        check_mode(&self.path, &found)?;
        let mut bytes = Zeroizing::new(vec![0; MAX_TOKEN + MAX_SPACE + 1]);
        let count = read_up_to(file, &mut bytes).map_err(failed)?;
        let token = bytes[..count].trim_ascii();
        if !(MIN_TOKEN..=MAX_TOKEN).contains(&token.len()) {
            let (path, length) = (self.path.clone(), token.len().min(MAX_TOKEN + 1));
            return Err(TrustError::TokenLength { path, length });
        }
        if token.iter().all(|byte| *byte == token[0]) {
            return Err(none("all its bytes are the same"));
        }
        Ok(Zeroizing::new(token.to_vec()))
    }
}

/// Reads until `buffer` is full or the file ends. Returns how many bytes were read.
fn read_up_to(mut file: impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// The length of a seed, as HKDF wants to have it.
struct Seed;

impl KeyType for Seed {
    fn len(&self) -> usize {
        SEED
    }
}

/// Derives the key from a token.
fn derive(token: &[u8]) -> Result<Arc<dyn SigningKey>, rustls::Error> {
    let mut pkcs8 = Zeroizing::new([0; PKCS8_PREFIX.len() + SEED]);
    pkcs8[..PKCS8_PREFIX.len()].copy_from_slice(&PKCS8_PREFIX);
    Salt::new(HKDF_SHA256, SALT)
        .extract(token)
        .expand(&[PURPOSE], Seed)
        .and_then(|seed| seed.fill(&mut pkcs8[PKCS8_PREFIX.len()..]))
        .map_err(|_| rustls::Error::General("HKDF refused the length of the key".into()))?;
    any_eddsa_type(&PrivatePkcs8KeyDer::from(&pkcs8[..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::client::ResolvesClientCert;
    use rustls::{CertificateError, ClientConnection, ServerConnection, SignatureScheme};
    use std::fs::{Permissions, set_permissions, write};
    use std::os::unix::fs::PermissionsExt;

    /// A file that only its owner may read.
    fn file_with(content: &[u8]) -> (tempfile::TempDir, Token) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        write(&path, content).unwrap();
        set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        (folder, Token::new(&path))
    }

    fn public_key(token: &[u8]) -> Vec<u8> {
        derive(token).unwrap().public_key().unwrap().to_vec()
    }

    /// Agents of two versions must derive the same key. OpenSSL derives it, too: `openssl kdf` with
    /// HKDF, and `openssl pkey` for the public key of the seed.
    #[test]
    fn key_of_a_token_never_changes() {
        let key = public_key(b"0123456789abcdef0123456789abcdef");
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "302a300506032b65700321005fce36f0cc371bab24ad75472ee89c10c15abb9207965e8385b31e4d06d8fffa"
        );
        assert_ne!(key, public_key(b"0123456789abcdef0123456789abcdeg"));
    }

    #[test]
    fn white_space_around_a_token_is_no_part_of_it() {
        let token = b"0123456789abcdef0123456789abcdef";
        for content in [&token[..], b"0123456789abcdef0123456789abcdef\n", b" \t\r\n"] {
            let (_folder, file) = file_with(content);
            match file.read() {
                Ok(read) => assert_eq!(read[..], token[..]),
                Err(error) => {
                    assert!(content.trim_ascii().is_empty());
                    assert!(matches!(error, TrustError::TokenLength { length: 0, .. }), "{error}");
                }
            }
        }
    }

    #[test]
    fn token_that_is_too_short_or_too_long_is_refused() {
        for (length, allowed) in [
            (0, false),
            (MIN_TOKEN - 1, false),
            (MIN_TOKEN, true),
            (MAX_TOKEN, true),
            (MAX_TOKEN + 1, false),
            (1 << 20, false),
        ] {
            let token: Vec<u8> = b"0123456789abcdef".iter().copied().cycle().take(length).collect();
            let (_folder, file) = file_with(&token);
            let read = file.read().map(|token| token.len());
            assert_eq!(read.is_ok(), allowed, "{length}: {read:?}");
        }
    }

    #[test]
    fn what_is_no_token_is_refused_by_name() {
        let (folder, file) = file_with(&[b'x'; MIN_TOKEN]);
        let said = file.read().unwrap_err().to_string();
        assert!(said.contains("all its bytes are the same"), "{said}");
        let said = Token::new(folder.path()).read().unwrap_err().to_string();
        assert!(said.contains("it is no regular file"), "{said}");
    }

    /// Passes what two ends say to each other until they have nothing to say. Returns what the
    /// destination makes of the source.
    fn shaken(client: ClientConfig, server: Arc<ServerConfig>) -> Result<(), rustls::Error> {
        let name = "localhost".try_into().unwrap();
        let mut source = ClientConnection::new(Arc::new(client), name).unwrap();
        let mut destination = ServerConnection::new(server).unwrap();
        while source.wants_write() || destination.wants_write() {
            let mut wire = Vec::new();
            while source.wants_write() {
                source.write_tls(&mut wire).unwrap();
            }
            let mut rest = &wire[..];
            while !rest.is_empty() {
                destination.read_tls(&mut rest).unwrap();
                destination.process_new_packets()?;
            }
            let mut wire = Vec::new();
            while destination.wants_write() {
                destination.write_tls(&mut wire).unwrap();
            }
            let mut rest = &wire[..];
            while !rest.is_empty() {
                source.read_tls(&mut rest).unwrap();
                source.process_new_packets().unwrap();
            }
        }
        assert!(!destination.is_handshaking());
        Ok(())
    }

    /// A client that accepts the key `accepts`, and shows this key for itself.
    fn client(accepts: &CertificateDer<'static>, shows: Option<CertifiedKey>) -> ClientConfig {
        #[derive(Debug)]
        struct Shows(Option<Arc<CertifiedKey>>);

        impl ResolvesClientCert for Shows {
            fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
                self.0.clone()
            }

            fn only_raw_public_keys(&self) -> bool {
                true
            }

            fn has_certs(&self) -> bool {
                true
            }
        }

        ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(OneKey::new(accepts.clone())))
            .with_client_cert_resolver(Arc::new(Shows(shows.map(Arc::new))))
    }

    #[test]
    fn destination_accepts_only_a_source_that_signs_with_the_key() {
        let (_folder, file) = file_with(b"0123456789abcdef0123456789abcdef");
        let (right, _) = file.key().unwrap();
        let wrong = derive(b"another 89abcdef0123456789abcdef").unwrap();
        let public = right.cert[0].clone();
        let other = CertificateDer::from(wrong.public_key().unwrap().to_vec());
        let refused = CertificateError::ApplicationVerificationFailure;
        for (shows, expected) in [
            (Some((public.clone(), right.key.clone())), Ok(())),
            (Some((other, wrong.clone())), Err(refused.into())),
            // The key that every stranger sees, and a signature with another one.
            (Some((public.clone(), wrong)), Err(CertificateError::BadSignature.into())),
            (None, Err(rustls::Error::NoCertificatesPresented)),
        ] {
            let shows = shows.map(|(public, key)| CertifiedKey::new(vec![public], key));
            let found = shaken(client(&public, shows), file.server().unwrap());
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn debug_output_has_no_secret() {
        let (_folder, file) = file_with(b"the secret of this house is not told");
        let (client, server) = (file.client().unwrap(), file.server().unwrap());
        let text = format!("{file:?} {client:?} {server:?}");
        let seed = "the secret of this house";
        assert!(!text.contains(seed), "{text}");
        // Also not as a list of bytes.
        let bytes: Vec<String> = seed.bytes().map(|byte| byte.to_string()).collect();
        assert!(!text.contains(&bytes.join(", ")), "{text}");
    }
}
