// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Authorities, and the folders of certificates that agents get.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ED25519, RevokedCertParams, SanType,
    SerialNumber, date_time_ymd,
};
use std::fs::{Permissions, set_permissions, write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// What comes before the 32 bytes of a private key of Ed25519 in PKCS #8.
const ED25519_PKCS8: [u8; 16] =
    [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];

/// A certificate authority.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    /// Makes the keys of those whom it signs.
    keys: fn() -> KeyPair,
}

/// A certificate to be made.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The only name in it.
    pub name: &'a str,
    /// Its number.
    pub serial: u64,
    /// Its last year.
    pub until: i32,
}

impl<'a> Wanted<'a> {
    /// One with this name.
    pub fn new(name: &'a str) -> Self {
        Self { name, serial: 7, until: 2900 }
    }
}

/// A certificate and its key, as files have them.
#[derive(Debug)]
pub struct Identity {
    /// The certificate, as PEM.
    pub certificate: String,
    /// The key, as PEM.
    pub key: String,
}

fn params(wanted: Wanted<'_>) -> CertificateParams {
    let mut params = CertificateParams::new(vec![wanted.name.to_owned()]).unwrap();
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(wanted.until, 1, 1);
    params.distinguished_name.push(DnType::CommonName, wanted.name);
    params.serial_number = Some(SerialNumber::from(wanted.serial));
    params
}

/// A certificate that nobody else has signed.
pub fn self_signed(wanted: Wanted<'_>) -> Identity {
    let key = KeyPair::generate().unwrap();
    let certificate = params(wanted).self_signed(&key).unwrap().pem();
    Identity { certificate, key: key.serialize_pem() }
}

impl Authority {
    /// A new one.
    pub fn new(name: &str) -> Self {
        Self::with_keys(name, || KeyPair::generate().unwrap())
    }

    /// One that is the same in each run, and so are all certificates that it signs. They have one
    /// key.
    pub fn fixed(name: &str) -> Self {
        Self::with_keys(name, || {
            let mut key = ED25519_PKCS8.to_vec();
            key.extend([7; 32]);
            KeyPair::from_pkcs8_der_and_sign_algo(&key.into(), &PKCS_ED25519).unwrap()
        })
    }

    fn with_keys(name: &str, keys: fn() -> KeyPair) -> Self {
        let mut params = params(Wanted::new(name));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self { issuer: CertifiedIssuer::self_signed(params, keys()).unwrap(), keys }
    }

    /// A certificate and its key.
    pub fn sign(&self, wanted: Wanted<'_>) -> Identity {
        let key = (self.keys)();
        let certificate = params(wanted).signed_by(&key, &self.issuer).unwrap().pem();
        Identity { certificate, key: key.serialize_pem() }
    }

    /// A certificate with several names.
    pub fn sign_names(&self, names: &[&str]) -> Identity {
        let key = (self.keys)();
        let more = names[1..].iter().map(|name| SanType::DnsName((*name).try_into().unwrap()));
        let mut params = params(Wanted::new(names[0]));
        params.subject_alt_names.extend(more);
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Identity { certificate, key: key.serialize_pem() }
    }

    /// Writes all files of a folder.
    pub fn fill(&self, folder: &Path, server: &Identity, client: &Identity) {
        write(folder.join("ca-cert.pem"), self.issuer.pem()).unwrap();
        for (side, identity) in [("server", server), ("client", client)] {
            write(folder.join(format!("{side}-cert.pem")), &identity.certificate).unwrap();
            let key = folder.join(format!("{side}-key.pem"));
            write(&key, &identity.key).unwrap();
            set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
        }
    }

    /// A folder of a host with these names.
    pub fn folder(&self, names: [&str; 2]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let [server, client] = names.map(|name| self.sign(Wanted::new(name)));
        self.fill(folder.path(), &server, &client);
        folder
    }

    /// Writes the list of revoked certificates.
    pub fn revoke(&self, folder: &Path, serial: u64) {
        self.revoke_until(folder, serial, 2900);
    }

    /// The same, with the last year of the list.
    pub fn revoke_until(&self, folder: &Path, serial: u64, until: i32) {
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2001, 1, 1),
            next_update: date_time_ymd(until, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: date_time_ymd(2001, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        write(folder.join("ca-crl.pem"), params.signed_by(&self.issuer).unwrap().pem().unwrap())
            .unwrap();
    }
}
