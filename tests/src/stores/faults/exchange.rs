// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A request, its answer, and the fault between them.

use super::Fault;
use super::http::{Framing, Head, bad, copy_body};
use super::proxy::{Direction, Shared};
use std::io::{BufReader, Error, Result, Write};
use std::net::{Shutdown, TcpStream};

/// One request on a connection.
struct Exchange<'a> {
    shared: &'a Shared,
    connection: u64,
    /// The number of the request.
    number: usize,
    client: &'a TcpStream,
    request: Head,
}

/// Serves the requests of one connection, until either side closes it or a fault does.
///
/// # Errors
/// If the connection ends otherwise.
pub(super) fn serve(shared: &Shared, connection: u64, client: &TcpStream) -> Result<()> {
    let mut from_client = BufReader::new(client);
    while let Some(request) = Head::read(&mut from_client)? {
        let last = request
            .header("connection")
            .is_some_and(|options| options.eq_ignore_ascii_case("close"));
        let (number, fault) = shared.begin(&request);
        let exchange = Exchange { shared, connection, number, client, request };
        if !exchange.run(&mut from_client, fault)? || last {
            break;
        }
    }
    Ok(())
}

impl Exchange<'_> {
    /// Returns false if the connection cannot be used again.
    fn run(&self, from_client: &mut BufReader<&TcpStream>, fault: Option<Fault>) -> Result<bool> {
        // Faults of content must wait for the answer.
        let now = fault.filter(|fault| !fault.is_of_content());
        let now = now.filter(|fault| self.shared.inject(self.number, *fault));
        if let Some(fault @ (Fault::Busy | Fault::Internal)) = now {
            copy_body(from_client, self.request.request_framing()?, &mut |_| Ok(()))?;
            self.refuse(fault)?;
            return Ok(true);
        }
        let store = TcpStream::connect(self.shared.store)?;
        store.set_nodelay(true)?;
        self.shared.add(self.connection, &store)?;
        let result = self.send(from_client, &store, now == Some(Fault::CutRequest));
        let result = result.and_then(|()| {
            let content = fault.filter(|fault| fault.is_of_content());
            self.answer(BufReader::new(&store), now, content)
        });
        // Each request has a connection of its own, so that the store never closes one that is
        // idle. The client must see only faults that were asked for.
        let _ = store.shutdown(Shutdown::Both);
        result
    }

    /// Sends the request to the store, or only a part of it.
    fn send(
        &self, from_client: &mut BufReader<&TcpStream>, mut store: &TcpStream, cut: bool,
    ) -> Result<()> {
        let framing = self.request.request_framing()?;
        if self.request.header("expect").is_some() {
            (&*self.client).write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let mut head = self.request.clone();
        head.remove("expect");
        head.remove("connection");
        head.headers.push("Connection: close".to_owned());
        store.write_all(&head.bytes())?;
        let most = match framing {
            Framing::Length(length) if cut => self.shared.below(length),
            _ if cut => 0,
            _ => u64::MAX,
        };
        if cut && most == 0 {
            return Err(self.reset(store));
        }
        let mut sent = 0;
        // A store may refuse a request before it has read the body. The client must get this
        // answer, so the rest of the body is read and dropped.
        let mut refused = false;
        copy_body(from_client, framing, &mut |piece| {
            let count = piece.len().min(usize::try_from(most - sent).unwrap_or(usize::MAX));
            self.shared.carry(self.connection, Direction::ToStore, count)?;
            refused = refused || store.write_all(&piece[..count]).is_err();
            sent += count as u64;
            self.shared.note(self.number, |request| request.uploaded += count as u64);
            if sent == most { Err(self.reset(store)) } else { Ok(()) }
        })
    }

    /// Passes the answer on. `now` was injected already; `content` is what is to happen to an
    /// object's content.
    fn answer(
        &self, mut from_store: BufReader<&TcpStream>, now: Option<Fault>, content: Option<Fault>,
    ) -> Result<bool> {
        let method = self.request.word(0);
        let mut head = loop {
            let head = Head::read(&mut from_store)?.ok_or_else(|| bad("the store is gone"))?;
            if head.status()? >= 200 {
                break head;
            }
        };
        let (latency, stall) = self.shared.delays();
        self.shared.pause(self.connection, latency)?;
        match now {
            Some(Fault::Stall) => self.shared.pause(self.connection, stall)?,
            Some(Fault::CutAnswer) => return Err(self.reset(self.client)),
            _ => {}
        }
        let framing = head.answer_framing(method)?;
        let status = head.status()?;
        let xml = head.header("content-type").is_some_and(|kind| kind.contains("xml"));
        let damage = match (content, framing) {
            (Some(fault), Framing::Length(length))
                if length > 0 && method == "GET" && matches!(status, 200 | 206) && !xml =>
            {
                let wanted = self.shared.inject(self.number, fault);
                wanted.then(|| (fault, self.shared.below(length)))
            }
            _ => None,
        };
        head.remove("connection");
        self.shared.note(self.number, |request| request.status = status);
        (&*self.client).write_all(&head.bytes())?;
        let mut passed = 0;
        copy_body(&mut from_store, framing, &mut |piece| {
            let before = passed;
            passed += piece.len() as u64;
            let Some((fault, at)) = damage.filter(|(_, at)| (before..passed).contains(at)) else {
                return self.pass(piece);
            };
            let index = (at - before) as usize;
            if fault == Fault::Flip {
                piece[index] ^= 1 << self.shared.below(8);
                return self.pass(piece);
            }
            self.pass(&piece[..index])?;
            if fault == Fault::CutBody {
                return Err(self.reset(self.client));
            }
            Err(bad("the rest of the body is dropped"))
        })?;
        Ok(framing != Framing::UntilClose)
    }

    fn pass(&self, piece: &[u8]) -> Result<()> {
        self.shared.carry(self.connection, Direction::ToClient, piece.len())?;
        // Counted first: a client that has the whole answer finds it in the counts.
        self.shared.note(self.number, |request| request.downloaded += piece.len() as u64);
        (&*self.client).write_all(piece)
    }

    /// Answers as a store that has too much to do, or has failed.
    fn refuse(&self, fault: Fault) -> Result<()> {
        let (status, reason, code, azure) = match fault {
            Fault::Busy => (503, "Slow Down", "SlowDown", "ServerBusy"),
            _ => (500, "Internal Server Error", "InternalError", "InternalError"),
        };
        let (latency, _) = self.shared.delays();
        self.shared.pause(self.connection, latency)?;
        let mut body = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code>\
             <Message>{reason}</Message></Error>"
        );
        let head = format!(
            "HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\n\
             x-ms-error-code: {azure}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        if self.request.word(0) == "HEAD" {
            body.clear();
        }
        self.shared.note(self.number, |request| request.status = status);
        (&*self.client).write_all((head + &body).as_bytes())
    }

    /// Resets the client's connection, and `also` if it is another one. Returns the error with
    /// which the exchange ends.
    fn reset(&self, also: &TcpStream) -> Error {
        for socket in [self.client, also] {
            // Unlike a close, this resets the connection while other descriptors of it are open.
            // It fails only if the peer was faster.
            let _ = rustix::net::connect_unspec(socket);
        }
        bad("a fault resets the connection")
    }
}
