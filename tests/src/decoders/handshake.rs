// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an agent reads over TLS before its peer has proved who it is.
//!
//! Nothing here can make a proof: whoever gets in does so with the certificate or the token, and
//! with every byte as the other side has sent it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a target fails by panicking")]

use super::choice;
use super::heap::within;
use crate::certificates::{Authority, Wanted};
use pageferry_agent::transport::{Proof, RecordReader, RecordWriter, StreamSocket, TransportError};
use pageferry_agent::trust::{Secured, Trust};
use pageferry_protocol::stream::{Kind, RecordHeader};
use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme};
use std::fs::{Permissions, set_permissions, write};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

/// The host of the certificates.
const HOST: &str = "localhost";
/// A peer of these targets sends all that it will send at once, so nobody waits.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most bytes of an input: more would not fit into a socket that nobody reads.
const MOST: usize = 100 << 10;
/// Most memory for a peer that has proved nothing: the 72 KiB that it may fill, once more while the
/// buffer grows, what rustls puts together of them, and the state of a handshake.
const FAIR: usize = 320 << 10;

/// The credentials of both sides.
struct Credentials {
    /// Keeps their files.
    _folder: tempfile::TempDir,
    by_token: Trust,
    by_certificate: Trust,
    /// The certificate of a source.
    certificate: Vec<u8>,
    /// A source that shows another certificate with the same key.
    key: Arc<dyn rustls::sign::SigningKey>,
}

static CREDENTIALS: LazyLock<Credentials> = LazyLock::new(|| {
    let authority = Authority::fixed("authority");
    let folder = tempfile::tempdir().unwrap();
    let [server, client] = [Wanted::new(HOST), Wanted { serial: 8, ..Wanted::new("source") }]
        .map(|wanted| authority.sign(wanted));
    authority.fill(folder.path(), &server, &client);
    let token = folder.path().join("token");
    write(&token, "a token that is as good as any for a target").unwrap();
    set_permissions(&token, Permissions::from_mode(0o600)).unwrap();
    let key = PrivateKeyDer::from_pem_slice(client.key.as_bytes()).unwrap();
    Credentials {
        by_token: Trust::by_token(&token),
        by_certificate: Trust::in_folder(folder.path(), &[]).unwrap(),
        certificate: CertificateDer::from_pem_slice(client.certificate.as_bytes())
            .unwrap()
            .to_vec(),
        key: ring::sign::any_supported_type(&key).unwrap(),
        _folder: folder,
    }
});

impl Credentials {
    /// Even numbers stand for the token, odd ones for certificates.
    fn of(&self, number: u8) -> &Trust {
        if number.is_multiple_of(2) { &self.by_token } else { &self.by_certificate }
    }
}

/// A stream of the agent, and the other end of its socket.
fn end(secured: Secured) -> (StreamSocket, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    (StreamSocket::new(ours.into(), PATIENCE).unwrap().secured(Some(secured)), theirs)
}

/// What is there to be read.
fn all_of(socket: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match socket.read_to_end(&mut bytes) {
        Err(error) if error.kind() != ErrorKind::WouldBlock => {
            // The other end was closed with bytes that it has not read.
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
        _ => {}
    }
    bytes
}

/// A stranger sends these bytes to a destination, or to a source that has connected to it. Accepted
/// is what begins a handshake that the destination answers.
pub fn tls_stranger(data: &[u8]) -> bool {
    let (kind, bytes) = choice(data);
    let bytes = &bytes[..bytes.len().min(MOST)];
    let trust = CREDENTIALS.of(kind);
    let is_source = kind & 2 != 0;
    let secured = if is_source { trust.connect(HOST) } else { trust.accept() };
    let (stream, mut stranger) = end(secured.unwrap());
    stranger.write_all(bytes).unwrap();
    stranger.shutdown(Shutdown::Write).unwrap();
    let proof = within(FAIR, || {
        stream.shake_hands().expect_err("a stranger has proved who it is");
        stream.proof().unwrap()
    });
    assert!(stream.peer().is_none());
    assert_ne!(proof, Proof::Given);
    if proof == Proof::Missing && !is_source {
        // Not more than an alert.
        drop(stream);
        assert!(all_of(&mut stranger).len() <= 7);
    }
    proof == Proof::Answered
}

/// The first bytes of both kinds of sources, alone and in pieces of a handshake.
pub fn stranger_seeds() -> Vec<Vec<u8>> {
    let hello = |kind: u8| {
        let (stream, mut theirs) = end(CREDENTIALS.of(kind).connect(HOST).unwrap());
        let mut reader = RecordReader::new(stream);
        assert!(reader.try_read().unwrap().is_none());
        [vec![kind], all_of(&mut theirs)].concat()
    };
    vec![hello(0), hello(1)]
}

/// A source shows these bytes as its chain of certificates, and signs with the key that belongs to
/// the right one. The first byte is the number of bytes of the second certificate, in units of 8.
/// Accepted is what the destination accepts, which is nothing but what the authority has signed.
pub fn tls_certificate(data: &[u8]) -> bool {
    let (second, bytes) = choice(data);
    let bytes = &bytes[..bytes.len().min(MOST / 2)];
    let (first, second) = bytes.split_at(bytes.len().saturating_sub(8 * usize::from(second)));
    let mut chain = vec![CertificateDer::from(first.to_vec())];
    if !second.is_empty() {
        chain.push(second.to_vec().into());
    }
    let client = Claims(Arc::new(CertifiedKey::new(chain, CREDENTIALS.key.clone())));
    let (stream, mut theirs) = end(CREDENTIALS.by_certificate.accept().unwrap());
    let mut client = ClientConnection::new(client.config(), HOST.try_into().unwrap()).unwrap();
    let mut reader = RecordReader::new(stream);
    // Its hello, the answer, and its certificate.
    for _ in 0..2 {
        while client.wants_write() {
            client.write_tls(&mut theirs).unwrap();
        }
        let read = within(FAIR, || reader.try_read_hello().map(|hello| hello.is_none()));
        match read {
            Ok(is_none) => assert!(is_none),
            Err(_) => break,
        }
        while client.read_tls(&mut theirs).is_ok_and(|count| count > 0) {
            client.process_new_packets().unwrap();
        }
    }
    let is_accepted = reader.socket().peer().is_some();
    assert_eq!(is_accepted, reader.socket().proof() == Some(Proof::Given));
    assert!(!is_accepted || first == CREDENTIALS.certificate, "{first:02x?}");
    is_accepted
}

/// The right certificate, alone and with another one behind it.
pub fn certificate_seeds() -> Vec<Vec<u8>> {
    let right = &CREDENTIALS.certificate;
    let other = &right[..right.len() / 8 * 8];
    vec![[&[0], &right[..]].concat(), [&[(other.len() / 8) as u8], &right[..], other].concat()]
}

/// A source that shows what it likes, and trusts anybody.
#[derive(Debug)]
struct Claims(Arc<CertifiedKey>);

impl Claims {
    fn config(self) -> Arc<ClientConfig> {
        let provider = Arc::new(ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
            .with_client_cert_resolver(Arc::new(self));
        Arc::new(config)
    }
}

impl ResolvesClientCert for Claims {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self, _: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: &ServerName<'_>, _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self, _: &[u8], _: &CertificateDer<'_>, _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self, _: &[u8], _: &CertificateDer<'_>, _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// What somebody between the two sides does to a byte of one direction.
#[derive(Debug, Clone, Copy)]
struct Deed {
    /// From the source to the destination.
    forward: bool,
    kind: u8,
    /// How many bytes of this direction come before.
    at: u64,
    value: u8,
}

/// Somebody between the two sides: one direction.
#[derive(Debug, Default)]
struct Wire {
    /// Bytes that have passed.
    passed: u64,
    deeds: Vec<Deed>,
    is_cut: bool,
}

impl Wire {
    /// Passes on what has come. Returns whether there was anything.
    fn pass(&mut self, from: &mut UnixStream, to: &mut UnixStream) -> bool {
        let came = all_of(from);
        let mut goes = Vec::with_capacity(came.len());
        for byte in &came {
            let deed = self.deeds.iter().find(|deed| deed.at == self.passed);
            self.passed += 1;
            match deed.map(|deed| (deed.kind % 5, deed.value)) {
                None => goes.push(*byte),
                Some((0, value)) => goes.push(*byte ^ value),
                Some((1, _)) => {}
                Some((2, value)) => goes.extend([value, *byte]),
                // The bytes before come once more.
                Some((3, value)) => {
                    let start = goes.len().saturating_sub(value.into());
                    goes.extend_from_within(start..);
                    goes.push(*byte);
                }
                Some(_) => {
                    self.is_cut = true;
                    break;
                }
            }
        }
        // A side that has failed may be gone.
        let _ = to.write_all(&goes);
        if self.is_cut {
            let _ = to.shutdown(Shutdown::Both);
        }
        !came.is_empty()
    }
}

/// Somebody between a source and a destination changes, drops, adds and repeats bytes, or cuts the
/// connection. Either side gets what the other one has sent, or nothing. Accepted is if both get
/// all.
///
/// The first byte chooses the credential. Each four bytes that follow are a deed.
pub fn tls_disturbed(data: &[u8]) -> bool {
    let (kind, deeds) = choice(data);
    let mut wires = [Wire::default(), Wire::default()];
    for [how, low, high, value] in deeds.as_chunks().0.iter().take(16).copied() {
        let at = u64::from(low) | u64::from(high % 16) << 8;
        let deed = Deed { forward: how & 1 == 0, kind: how >> 1, at, value };
        wires[usize::from(!deed.forward)].deeds.push(deed);
    }
    let trust = CREDENTIALS.of(kind);
    let (source, mut of_source) = end(trust.connect(HOST).unwrap());
    let (destination, mut of_destination) = end(trust.accept().unwrap());
    let mut sides = [Side::new(source, Kind::Hello), Side::new(destination, Kind::Accept)];
    loop {
        let mut goes_on = false;
        for side in &mut sides {
            goes_on |= side.step();
        }
        let [forward, back] = &mut wires;
        goes_on |= forward.pass(&mut of_source, &mut of_destination);
        goes_on |= back.pass(&mut of_destination, &mut of_source);
        if !goes_on {
            break;
        }
    }
    let [source, destination] = &sides;
    let gets_all = source.has(Kind::Accept) && destination.has(Kind::Hello);
    let is_quiet = wires.iter().all(|wire| wire.deeds.iter().all(|deed| deed.at >= wire.passed));
    assert!(gets_all || !is_quiet, "nobody has disturbed {sides:?}");
    gets_all
}

/// Undisturbed, and disturbed where nothing comes any more.
pub fn disturbed_seeds() -> Vec<Vec<u8>> {
    let late: Vec<u8> = (0..10).flat_map(|how| [how, 255, 15, 1]).collect();
    vec![vec![0], vec![1], [&[0], &late[..]].concat(), [&[1], &late[..]].concat()]
}

/// One side, which sends one record, and receives one.
#[derive(Debug)]
struct Side {
    reader: RecordReader,
    /// The kind of the record that it sends.
    sends: Kind,
    has_sent: bool,
    received: Option<Kind>,
    failed: Option<TransportError>,
}

impl Side {
    fn new(stream: StreamSocket, sends: Kind) -> Self {
        let reader = RecordReader::new(stream);
        Self { reader, sends, has_sent: false, received: None, failed: None }
    }

    /// The payload of the record of this kind.
    fn payload(kind: Kind) -> Vec<u8> {
        (0..300).map(|byte| byte as u8 ^ kind as u8).collect()
    }

    /// Reads, and sends its record if it can. Returns whether it has done anything.
    fn step(&mut self) -> bool {
        if self.failed.is_some() {
            return false;
        }
        let before = (self.has_sent, self.received);
        if let Err(error) = self.try_step() {
            self.reader.socket().shut_down();
            self.failed = Some(error);
            return true;
        }
        before != (self.has_sent, self.received)
    }

    fn try_step(&mut self) -> Result<(), TransportError> {
        if let Some(record) = self.reader.try_read()? {
            let kind = record.kind;
            assert_ne!(kind, self.sends, "its own record came back");
            assert_eq!(record.payload, Self::payload(kind), "the record was changed");
            assert!(self.received.is_none(), "the record came twice");
            self.received = Some(kind);
        }
        let socket = self.reader.socket();
        if !self.has_sent && socket.peer().is_some() {
            let payload = Self::payload(self.sends);
            let header = RecordHeader::plain(self.sends, 0, payload.len());
            RecordWriter::new(socket.clone()).write(header, &payload)?;
            self.has_sent = true;
        }
        Ok(())
    }

    fn has(&self, kind: Kind) -> bool {
        self.received == Some(kind)
    }
}
