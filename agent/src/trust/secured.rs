// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection over TLS, and how its peer proves who it is.

use super::{Peer, TrustError, peer, words};
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::{ParsedCertificate, UnbufferedServerConnection};
use rustls::{AlertDescription, CertificateError, CommonState, Error, PeerIncompatible};

/// A connection of rustls, without buffers.
pub enum Connection {
    /// The side of the source.
    Client(UnbufferedClientConnection),
    /// The side of the destination.
    Server(UnbufferedServerConnection),
}

impl Connection {
    /// What both sides have.
    pub fn common(&self) -> &CommonState {
        match self {
            Self::Client(client) => client,
            Self::Server(server) => server,
        }
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Client(_) => "Client",
            Self::Server(_) => "Server",
        })
    }
}

/// How both sides of a connection prove who they are.
#[derive(Debug)]
pub enum Proof {
    /// By a certificate. It must have one of these names, if there are any.
    Certificate(Vec<ServerName<'static>>),
    /// By a token.
    Token,
}

/// A connection that has not begun its handshake, and how its peer proves who it is.
#[derive(Debug)]
pub struct Secured {
    /// The connection.
    pub connection: Connection,
    /// How both sides prove who they are.
    pub proof: Proof,
}

const CERTIFICATES: &str = "certificates (--tls)";
const TOKEN: &str = "a token (--token-file)";

impl Secured {
    /// Who the peer is. The handshake is done, and has checked the certificate or the token.
    ///
    /// # Errors
    /// If it has none of the names that are allowed.
    pub fn check_peer(&self) -> Result<Peer, TrustError> {
        let Proof::Certificate(allowed) = &self.proof else { return Ok(Peer::Token) };
        let certificate = self.connection.common().peer_certificates().and_then(<[_]>::first);
        let certificate = certificate.ok_or(TrustError::NotProved)?;
        let parsed = ParsedCertificate::try_from(certificate)?;
        let has = |name| rustls::client::verify_server_name(&parsed, name).is_ok();
        if !allowed.is_empty() && !allowed.iter().any(has) {
            let has = peer::dns_names(certificate)?;
            let allowed: Vec<_> = allowed.iter().map(ServerName::to_str).collect();
            let has = if has.is_empty() { "no DNS name".into() } else { has.join(", ") };
            return Err(TrustError::NotAllowed { has, allowed: allowed.join(", ") });
        }
        Peer::of_certificate(certificate)
    }

    /// What an error of TLS means here.
    pub fn explain(&self, error: Error) -> TrustError {
        let is_token = matches!(self.proof, Proof::Token);
        let (ours, theirs) = if is_token { (TOKEN, CERTIFICATES) } else { (CERTIFICATES, TOKEN) };
        match error {
            Error::PeerIncompatible(PeerIncompatible::IncorrectCertificateTypeExtension) => {
                TrustError::OtherKind { ours, theirs }
            }
            Error::PeerIncompatible(
                PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled,
            )
            | Error::AlertReceived(AlertDescription::ProtocolVersion) => TrustError::NoTls13,
            // The destination finds out first, and this is all that it can say.
            Error::AlertReceived(AlertDescription::HandshakeFailure) => {
                TrustError::RefusedKind { ours, theirs }
            }
            // The second one is what the peer says who has found the first one.
            Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
            | Error::AlertReceived(AlertDescription::AccessDenied)
                if is_token =>
            {
                TrustError::OtherToken
            }
            Error::InvalidCertificate(error) => {
                TrustError::PeerCertificate(words::of_certificate(&error))
            }
            Error::AlertReceived(alert) if let Some(words) = words::of_alert(alert) => {
                TrustError::RefusedByPeer(words)
            }
            Error::InvalidMessage(_) if self.is_first() => TrustError::NoTls,
            error => TrustError::Tls(error),
        }
    }

    /// True if the peer has said nothing yet that belongs to TLS.
    fn is_first(&self) -> bool {
        self.connection.common().negotiated_cipher_suite().is_none()
    }
}
