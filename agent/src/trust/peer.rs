// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who is at the other end of a connection, as it has proved.
//!
//! All connections of a migration must come from one peer, and so must those that continue it after
//! a lost connection (`docs/tls.md`, "Recovery"). A certificate may be renewed meanwhile. So a peer
//! is the same if it has the same key, or a certificate with the same DNS names. Other names do not
//! count: a certificate that has only addresses is renewed with its key.

use super::TrustError;
use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use rustls::CertificateError;
use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

/// A SHA-256 digest.
type Digest = [u8; SHA256_OUTPUT_LEN];

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Somebody who has the same token.
    Token,
    /// The owner of a certificate.
    Certificate {
        /// Digest of its public key.
        key: Digest,
        /// Digest of its DNS names. `None` if it has none.
        names: Option<Digest>,
    },
}

/// The first byte of an encoded peer.
const TOKEN: u8 = 1;
const CERTIFICATE: u8 = 2;
const CERTIFICATE_WITH_NAMES: u8 = 3;

impl Peer {
    /// The owner of a certificate.
    ///
    /// # Errors
    /// If the certificate is malformed.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, TrustError> {
        let key = digest_of(&parsed(certificate)?.subject_public_key_info());
        let mut names = dns_names(certificate)?;
        names.sort_unstable();
        names.dedup();
        // No name has a line break.
        let names = (!names.is_empty()).then(|| digest_of(names.join("\n").as_bytes()));
        Ok(Self::Certificate { key, names })
    }

    /// True if the two are one peer.
    pub fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Token, Self::Token) => true,
            (
                Self::Certificate { key, names },
                Self::Certificate { key: other_key, names: other_names },
            ) => key == other_key || (names.is_some() && names == other_names),
            _ => false,
        }
    }

    /// The bytes by which the next agent knows the peer.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Token => vec![TOKEN],
            Self::Certificate { key, names: None } => [&[CERTIFICATE], &key[..]].concat(),
            Self::Certificate { key, names: Some(names) } => {
                [&[CERTIFICATE_WITH_NAMES], &key[..], names].concat()
            }
        }
    }

    /// Reads what [`Peer::encode`] has made. `None` if it is malformed.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (kind, digests) = bytes.split_first()?;
        let (digests, rest) = digests.as_chunks::<SHA256_OUTPUT_LEN>();
        match (*kind, digests, rest) {
            (TOKEN, [], []) => Some(Self::Token),
            (CERTIFICATE, [key], []) => Some(Self::Certificate { key: *key, names: None }),
            (CERTIFICATE_WITH_NAMES, [key, names], []) => {
                Some(Self::Certificate { key: *key, names: Some(*names) })
            }
            _ => None,
        }
    }
}

fn parsed<'a>(certificate: &'a CertificateDer<'_>) -> Result<EndEntityCert<'a>, TrustError> {
    EndEntityCert::try_from(certificate).map_err(|_| {
        TrustError::Tls(rustls::Error::InvalidCertificate(CertificateError::BadEncoding))
    })
}

/// The DNS names of a certificate, in lower case.
///
/// # Errors
/// If it is malformed.
pub(super) fn dns_names(certificate: &CertificateDer<'_>) -> Result<Vec<String>, TrustError> {
    let parsed = parsed(certificate)?;
    Ok(parsed.valid_dns_names().map(str::to_ascii_lowercase).collect())
}

fn digest_of(bytes: &[u8]) -> Digest {
    let mut known = [0; SHA256_OUTPUT_LEN];
    known.copy_from_slice(digest(&SHA256, bytes).as_ref());
    known
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(key: u8, names: Option<u8>) -> Peer {
        let digest = |byte| [byte; SHA256_OUTPUT_LEN];
        Peer::Certificate { key: digest(key), names: names.map(digest) }
    }

    #[test]
    fn peer_is_known_by_its_key_or_by_its_names() {
        let first = certificate(1, Some(1));
        for (other, same) in [
            (first, true),
            (certificate(2, Some(1)), true),
            (certificate(1, Some(2)), true),
            (certificate(1, None), true),
            (certificate(2, Some(2)), false),
            (certificate(2, None), false),
            (Peer::Token, false),
        ] {
            assert_eq!(first.is(&other), same, "{other:?}");
            assert_eq!(other.is(&first), same, "{other:?}");
        }
        // Without names nothing but the key counts.
        assert!(!certificate(1, None).is(&certificate(2, None)));
        assert!(Peer::Token.is(&Peer::Token));
    }

    #[test]
    fn encoded_peer_is_read_and_everything_else_is_refused() {
        for peer in [Peer::Token, certificate(1, None), certificate(1, Some(2))] {
            let bytes = peer.encode();
            assert_eq!(Peer::decode(&bytes), Some(peer));
            assert_eq!(Peer::decode(&[&bytes[..], &[0]].concat()), None);
            assert_eq!(Peer::decode(&bytes[..bytes.len() - 1]), None);
            assert_eq!(Peer::decode(&[&[9], &bytes[1..]].concat()), None);
        }
    }
}
