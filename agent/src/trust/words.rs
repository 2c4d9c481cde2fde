// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What rustls finds wrong with a certificate, in the words of an operator.

use rustls::{AlertDescription, CertificateError};

/// What is wrong with a certificate, behind "the certificate".
pub(super) fn of_certificate(error: &CertificateError) -> String {
    use CertificateError as E;
    match error {
        E::BadEncoding => "is malformed".into(),
        E::UnhandledCriticalExtension => "has a critical extension that is not known here".into(),
        E::Expired => "has expired".into(),
        E::ExpiredContext { time, not_after } => {
            let since = time.as_secs().saturating_sub(not_after.as_secs());
            format!("expired {} ago", span(since))
        }
        E::NotValidYet => "is not valid yet: look at the clocks of both hosts".into(),
        E::NotValidYetContext { time, not_before } => {
            let until = not_before.as_secs().saturating_sub(time.as_secs());
            let span = span(until);
            format!("becomes valid in {span}: look at the clocks of both hosts")
        }
        E::Revoked => "is revoked by ca-crl.pem".into(),
        E::UnknownIssuer => "is not signed by an authority of ca-cert.pem".into(),
        E::UnknownRevocationStatus => {
            "is of an authority whose revocation list is not in ca-crl.pem".into()
        }
        E::ExpiredRevocationList => "cannot be checked: ca-crl.pem has expired".into(),
        E::ExpiredRevocationListContext { time, next_update } => {
            let since = time.as_secs().saturating_sub(next_update.as_secs());
            format!("cannot be checked: ca-crl.pem expired {} ago: renew it", span(since))
        }
        E::BadSignature => "has a wrong signature".into(),
        E::NotValidForName => "is not for the host of the address".into(),
        E::NotValidForNameContext { expected, presented } => {
            let names = if presented.is_empty() {
                "has no subject alternative name".into()
            } else {
                // `DnsName("host")`
                let names = presented.iter().map(|name| name.split('"').nth(1).unwrap_or(name));
                format!("is for {}", names.collect::<Vec<_>>().join(", "))
            };
            format!("{names}, and not for {}", expected.to_str())
        }
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            "is not for this side: a destination's must be for server authentication, and a \
             source's for client authentication"
                .into()
        }
        E::UnsupportedSignatureAlgorithmContext { .. }
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "has a key or a signature of a kind that is not known here".into()
        }
        E::Other(other) => match other.0.downcast_ref::<webpki::Error>() {
            Some(webpki::Error::CaUsedAsEndEntity) => {
                "is that of an authority (CA:TRUE), which cannot be shown by a peer".into()
            }
            Some(webpki::Error::UnsupportedCertVersion) => {
                "is not of version 3 of X.509, which has subject alternative names".into()
            }
            Some(error) => format!("is refused: {error}"),
            None => format!("is refused: {other}"),
        },
        error => format!("is refused: {error}"),
    }
}

/// Why a peer has refused the certificate of this side, behind "it". `None` if it was not that.
pub(super) fn of_alert(alert: AlertDescription) -> Option<&'static str> {
    Some(match alert {
        AlertDescription::UnknownCA => {
            "does not trust who has signed it, or its ca-crl.pem has expired or lacks that authority"
        }
        AlertDescription::CertificateExpired => "finds that it has expired, or is not valid yet",
        AlertDescription::CertificateRevoked => "knows that it is revoked",
        AlertDescription::BadCertificate => "finds it malformed, or for another host",
        AlertDescription::UnsupportedCertificate => "finds that it is not for this side",
        AlertDescription::CertificateUnknown => "does not take it",
        AlertDescription::CertificateRequired => "was shown none",
        _ => return None,
    })
}

/// A time in whole units.
fn span(seconds: u64) -> String {
    match seconds {
        seconds @ 172_800.. => format!("{} days", seconds / 86_400),
        seconds @ 7_200.. => format!("{} hours", seconds / 3600),
        seconds => format!("{seconds} s"),
    }
}
