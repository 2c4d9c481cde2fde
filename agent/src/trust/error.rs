// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a peer is not trusted.

use super::token::{MAX_TOKEN, MIN_TOKEN};
use rustls::pki_types::pem;
use rustls::server::VerifierBuilderError;
use std::path::PathBuf;

/// Why a peer cannot be trusted, or this side cannot show who it is.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The agent has nothing to prove itself with.
    #[error(
        "tls: needs certificates or a token: start the agent with --tls FOLDER or --token-file FILE"
    )]
    NoCredential,
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
    /// Others may read the key or the token.
    #[error(
        "{path:?} has mode {mode:03o}, but nobody except its owner may read a key or a token \
         (chmod 600)"
    )]
    KeyIsOpen {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A token can be guessed, or is none.
    #[error(
        "{path:?} has a token of {length} bytes, allowed: {MIN_TOKEN} to {MAX_TOKEN} bytes that \
         nobody can guess (head -c 32 /dev/urandom | base64)"
    )]
    TokenLength {
        /// The file.
        path: PathBuf,
        /// Bytes without the white space around them. One more than the most for all that are
        /// longer.
        length: usize,
    },
    /// A file is no file, or its bytes are no random ones.
    #[error("{0:?} has no token: {1}")]
    NoToken(PathBuf, &'static str),
    /// rustls does not take the authorities or what they revoked.
    #[error("{0:?}")]
    Authorities(PathBuf, #[source] VerifierBuilderError),
    /// A file that this side needs does not exist.
    #[error("{path:?} does not exist, which {side} needs")]
    Lacks {
        /// The file.
        path: PathBuf,
        /// Which side needs it.
        side: &'static str,
    },
    /// A certificate of this side cannot be used.
    #[error("{0:?}: the certificate {1}")]
    OwnCertificate(PathBuf, String),
    /// A key of this side is of a kind that is not known here.
    #[error("{0:?}: the key is none of ECDSA P-256, P-384, Ed25519, or RSA from 2048 bits on")]
    OwnKey(PathBuf),
    /// A key of this side needs a password.
    #[error("{0:?}: the key needs a password, which cannot be given: use one without")]
    Encrypted(PathBuf),
    /// A key of this side is not that of its certificate.
    #[error("{key:?} is not the key of {certificate:?}: if they are renewed, exchange both")]
    OtherKey {
        /// The file of the certificate.
        certificate: PathBuf,
        /// The file of the key.
        key: PathBuf,
    },
    /// rustls does not take a certificate or its key.
    #[error("{0:?}")]
    Certificate(PathBuf, #[source] rustls::Error),
    /// The peer's certificate is refused.
    #[error("the peer's certificate {0}")]
    PeerCertificate(String),
    /// The peer refuses the certificate of this side.
    #[error("the peer has refused the certificate of this side: it {0}")]
    RefusedByPeer(&'static str),
    /// The peer does not speak TLS.
    #[error("the other side does not speak TLS: both addresses must be tls:, or neither of them")]
    NoTls,
    /// A name cannot be in a certificate.
    #[error("{0:?} is no name of a host and no IP address")]
    Name(String),
    /// The peer's certificate is for somebody else.
    #[error("the peer's certificate is for {has}, and --tls-peer allows {allowed}")]
    NotAllowed {
        /// The names in the certificate.
        has: String,
        /// The names that are allowed.
        allowed: String,
    },
    /// The peer has another token, or none.
    #[error(
        "the peer has another token: the files of --token-file must have the same content at both \
         ends"
    )]
    OtherToken,
    /// One side has a token, and the other one certificates.
    #[error("this side has {ours}, and the peer has {theirs}: both need the same")]
    OtherKind {
        /// What this side has.
        ours: &'static str,
        /// What the peer has.
        theirs: &'static str,
    },
    /// The peer has refused the handshake. That is what a peer does that has something else.
    #[error(
        "the peer has refused the handshake: this side has {ours}, and the peer seems to have \
         {theirs}; both need the same"
    )]
    RefusedKind {
        /// What this side has.
        ours: &'static str,
        /// What the peer seems to have.
        theirs: &'static str,
    },
    /// The peer speaks an older version of TLS, or is made to seem so.
    #[error(
        "the peer does not offer TLS 1.3: it is no agent of pageferry, or somebody between the two \
         has changed what it says"
    )]
    NoTls13,
    /// Nothing is said to a peer before it has proved who it is.
    #[error("the peer has not proved who it is")]
    NotProved,
    /// The handshake or a record failed.
    #[error("TLS")]
    Tls(#[from] rustls::Error),
}

impl TrustError {
    /// True if this says something about a certificate or a token, of the peer or of this side.
    /// False for what anybody can cause who sends some bytes.
    pub fn is_about_credentials(&self) -> bool {
        use rustls::Error::{
            AlertReceived, InvalidCertificate, NoCertificatesPresented, PeerIncompatible,
        };
        match self {
            Self::NotProved | Self::NoTls => false,
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

    /// True if nothing is wrong with the peer, but with the files of this side.
    pub fn is_about_this_side(&self) -> bool {
        matches!(
            self,
            Self::NoCredential
                | Self::Read(..)
                | Self::Malformed { .. }
                | Self::KeyIsOpen { .. }
                | Self::TokenLength { .. }
                | Self::Authorities(..)
                | Self::Lacks { .. }
                | Self::OwnCertificate(..)
                | Self::OtherKey { .. }
                | Self::OwnKey(..)
                | Self::Encrypted(..)
                | Self::NoToken(..)
                | Self::Certificate(..)
        )
    }
}
