// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The proxy between a small client and a small store.

use super::http::{Framing, Head, copy_body};
use super::{Fault, FaultProxy, Faults};
use crate::deadline::wait_until;
use std::collections::BTreeMap;
use std::io::{BufReader, Error, ErrorKind, Read, Result, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const LENGTH: usize = 300_000;

/// The content of every object that nobody has put.
fn content() -> Vec<u8> {
    (0..LENGTH).map(|index| (index * 7 % 251) as u8).collect()
}

/// A store: PUT keeps a body, GET returns it. `/chunked` comes in chunks, `/list` is XML.
struct Store {
    address: SocketAddr,
    objects: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
}

impl Store {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let objects: Arc<Mutex<BTreeMap<String, Vec<u8>>>> = Arc::default();
        let theirs = objects.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let objects = theirs.clone();
                // It ends with the connection, and with an error if a fault cuts it.
                std::thread::spawn(move || answer(&stream, &objects));
            }
        });
        Self { address, objects }
    }
}

fn answer(mut stream: &TcpStream, objects: &Mutex<BTreeMap<String, Vec<u8>>>) -> Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some(head) = Head::read(&mut reader)? {
        let mut body = Vec::new();
        copy_body(&mut reader, head.request_framing()?, &mut |piece| {
            body.extend_from_slice(piece);
            Ok(())
        })?;
        let name = head.word(1).to_owned();
        if head.word(0) == "PUT" {
            objects.lock().unwrap().insert(name, body);
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        }
        let object = objects.lock().unwrap().get(&name).cloned().unwrap_or_else(content);
        if name == "/chunked" {
            stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
            for chunk in object.chunks(70_001) {
                write!(stream, "{:x}\r\n", chunk.len())?;
                stream.write_all(chunk)?;
                stream.write_all(b"\r\n")?;
            }
            stream.write_all(b"0\r\n\r\n")?;
            continue;
        }
        let kind = if name == "/list" { "application/xml" } else { "binary/octet-stream" };
        let length = object.len();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
        )?;
        if head.word(0) == "GET" {
            stream.write_all(&object)?;
        }
    }
    Ok(())
}

/// A client that keeps its connection open.
struct Client(BufReader<TcpStream>);

impl Client {
    fn new(proxy: &FaultProxy) -> Self {
        Self::connect(proxy.address()).unwrap()
    }

    fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn request(&mut self, method: &str, target: &str, body: &[u8]) -> Result<(u16, Vec<u8>)> {
        let length = body.len();
        let head = format!("{method} {target} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
        self.0.get_mut().write_all(head.as_bytes())?;
        self.0.get_mut().write_all(body)?;
        let head = Head::read(&mut self.0)?.ok_or(Error::from(ErrorKind::UnexpectedEof))?;
        let mut body = Vec::new();
        copy_body(&mut self.0, head.answer_framing(method)?, &mut |piece| {
            body.extend_from_slice(piece);
            Ok(())
        })?;
        Ok((head.status()?, body))
    }

    fn get(&mut self, target: &str) -> Result<(u16, Vec<u8>)> {
        self.request("GET", target, &[])
    }
}

fn always(fault: Fault) -> Faults {
    Faults::default().with(fault, 1000)
}

fn scene() -> (Store, FaultProxy, Client) {
    let store = Store::start();
    let proxy = FaultProxy::to(store.address, 7).unwrap();
    let client = Client::new(&proxy);
    (store, proxy, client)
}

#[test]
fn everything_passes_on_one_connection_and_is_counted() {
    let (store, proxy, mut client) = scene();
    assert_eq!(client.request("PUT", "/new", b"body").unwrap(), (200, Vec::new()));
    assert_eq!(store.objects.lock().unwrap()["/new"], b"body");
    assert_eq!(client.get("/new").unwrap(), (200, b"body".to_vec()));
    assert_eq!(client.get("/old").unwrap(), (200, content()));
    assert_eq!(client.request("HEAD", "/old", &[]).unwrap(), (200, Vec::new()));
    let (_, chunks) = client.get("/chunked").unwrap();
    assert!(chunks.len() > LENGTH && chunks.ends_with(b"\r\n0\r\n\r\n"));
    let counts = proxy.counts();
    assert_eq!(
        (counts.requests("GET"), counts.requests("PUT"), counts.requests("HEAD")),
        (3, 1, 1)
    );
    assert_eq!((counts.uploaded, counts.downloaded), (4, (4 + LENGTH + chunks.len()) as u64));
    assert!(counts.faults.is_empty());
    assert_eq!(proxy.requests()[1].target, "/new");
    proxy.forget();
    assert!(proxy.requests().is_empty());
}

#[test]
fn a_busy_store_does_not_see_the_request() {
    let (store, proxy, mut client) = scene();
    for (fault, status, code) in
        [(Fault::Busy, 503, "SlowDown"), (Fault::Internal, 500, "Internal")]
    {
        proxy.set(always(fault));
        let (found, body) = client.request("PUT", "/new", &content()).unwrap();
        assert_eq!(found, status);
        assert!(String::from_utf8(body).unwrap().contains(code));
        assert_eq!(proxy.counts().injected(fault), 1);
    }
    assert!(store.objects.lock().unwrap().is_empty());
    // The connection is still good.
    proxy.set(Faults::default());
    assert_eq!(client.get("/old").unwrap(), (200, content()));
}

#[test]
fn a_cut_request_does_not_arrive_and_a_cut_answer_leaves_its_effect() {
    let (store, proxy, mut client) = scene();
    proxy.set(always(Fault::CutRequest));
    client.request("PUT", "/lost", &content()).unwrap_err();
    proxy.set(always(Fault::CutAnswer));
    Client::new(&proxy).request("PUT", "/done", &content()).unwrap_err();
    let objects = store.objects.lock().unwrap();
    assert_eq!(objects.keys().collect::<Vec<_>>(), ["/done"]);
}

#[test]
fn a_cut_body_ends_with_an_error_and_a_truncated_one_without() {
    let (_store, proxy, mut client) = scene();
    for (fault, clean) in [(Fault::Truncate, true), (Fault::CutBody, false)] {
        proxy.set(always(fault));
        client.0.get_mut().write_all(b"GET /old HTTP/1.1\r\n\r\n").unwrap();
        let head = Head::read(&mut client.0).unwrap().unwrap();
        assert_eq!(head.answer_framing("GET").unwrap(), Framing::Length(LENGTH as u64));
        let mut body = Vec::new();
        let end = client.0.read_to_end(&mut body);
        assert_eq!(end.is_ok(), clean, "{end:?}");
        assert!(body.len() < LENGTH && body == content()[..body.len()]);
        client = Client::new(&proxy);
    }
}

#[test]
fn a_flipped_body_differs_in_one_bit_and_lists_are_spared() {
    let (_store, proxy, mut client) = scene();
    proxy.set(always(Fault::Flip));
    let (_, body) = client.get("/old").unwrap();
    let bits: u32 =
        body.iter().zip(content()).map(|(found, right)| (found ^ right).count_ones()).sum();
    assert_eq!(bits, 1);
    assert_eq!(client.get("/list").unwrap(), (200, content()));
    assert_eq!(proxy.counts().injected(Fault::Flip), 1);
}

#[test]
fn faults_keep_to_their_share_their_requests_and_their_number() {
    let (_store, proxy, mut client) = scene();
    proxy.set(Faults { only: Some("/some".into()), ..Faults::default() }.with(Fault::Busy, 500));
    for target in ["/some", "/other"] {
        for _ in 0..100 {
            client.request("HEAD", target, &[]).unwrap();
        }
    }
    assert!((25..75).contains(&proxy.counts().injected(Fault::Busy)));
    assert!(proxy.requests()[100..].iter().all(|request| request.fault.is_none()));
    proxy.forget();
    proxy.set(Faults { at_most: Some(2), ..always(Fault::Busy) });
    let answers = [(); 4].map(|()| client.get("/old").unwrap().0);
    assert_eq!(answers, [503, 503, 200, 200]);
}

#[test]
fn latency_and_bandwidth_slow_all_connections_together() {
    let (_store, proxy, mut client) = scene();
    proxy.set(Faults { latency: Duration::from_millis(50), ..Faults::default() });
    let started = Instant::now();
    client.get("/old").unwrap();
    assert!(started.elapsed() >= Duration::from_millis(50));
    // Each of two takes 0.1 seconds of the wire.
    proxy.set(Faults { bandwidth: Some(10 * LENGTH as u64), ..Faults::default() });
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| Client::new(&proxy).get("/old").unwrap());
        }
    });
    assert!(started.elapsed() >= Duration::from_millis(199));
}

#[test]
fn a_stalled_answer_comes_late_or_ends_with_a_cut() {
    let (_store, proxy, mut client) = scene();
    proxy.set(Faults { stall: Duration::from_millis(100), ..always(Fault::Stall) });
    let started = Instant::now();
    assert_eq!(client.get("/old").unwrap(), (200, content()));
    assert!(started.elapsed() >= Duration::from_millis(100));
    proxy.set(always(Fault::Stall));
    std::thread::scope(|scope| {
        let stalled = scope.spawn(|| client.get("/old"));
        let stalls = || proxy.counts().injected(Fault::Stall) == 2;
        wait_until("a stalled answer", Duration::from_secs(10), stalls).unwrap();
        proxy.cut();
        stalled.join().unwrap().unwrap_err();
    });
}

#[test]
fn a_proxy_that_is_down_refuses_and_comes_back_at_its_port() {
    let (_store, mut proxy, mut client) = scene();
    let address = proxy.address();
    client.get("/old").unwrap();
    proxy.take_down();
    client.get("/old").unwrap_err();
    assert!(Client::connect(address).is_err());
    proxy.bring_up().unwrap();
    assert_eq!(proxy.address(), address);
    assert_eq!(Client::new(&proxy).get("/old").unwrap(), (200, content()));
}
