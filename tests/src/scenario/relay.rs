// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A relay between two agents. It passes one record at a time on the test's own thread, so the test
//! decides what happens between any two records.

use super::SOON;
use pageferry_client::{
    Client, DirtyLog, IncomingOptions, JobStatus, NonConvergence, OutgoingOptions, Target,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::stream::{Hello, Kind, RECORD_SIZE, RecordHeader};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_linger, set_socket_timeout};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the relay waits for a record before it returns to its caller.
const MOMENT: Duration = Duration::from_millis(2);

/// The kind of connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// A UNIX socket.
    Unix,
    /// TCP over the loopback device.
    Tcp,
}

/// Both kinds.
pub const WIRES: [Wire; 2] = [Wire::Unix, Wire::Tcp];

/// A record that was read and not passed on yet.
#[derive(Debug)]
pub struct Passing {
    link: usize,
    /// The number of its stream, from the stream's hello.
    pub stream: u16,
    /// True if it goes to the destination.
    pub to_destination: bool,
    /// Its kind.
    pub kind: Kind,
    /// Its header.
    pub header: RecordHeader,
    /// Its payload.
    pub payload: Vec<u8>,
}

impl Passing {
    /// True if it has this kind and this number.
    pub fn is(&self, kind: Kind, number: u64) -> bool {
        self.kind == kind && self.header.number() == number
    }

    /// True if it carries this page, as content or as zero.
    pub fn carries(&self, page: u64) -> bool {
        let range = self.header.range();
        matches!(self.kind, Kind::Data | Kind::Zero) && range.first <= page && page < range.end()
    }

    /// Its bytes on the wire.
    pub fn bytes(&self) -> Vec<u8> {
        [self.header.to_wire().as_slice(), &self.payload].concat()
    }
}

/// A connection of the source, and the matching connection to the destination. Their sockets can be
/// of either family, because both are read and written in the same way.
#[derive(Debug)]
struct Link {
    source: File,
    destination: File,
    stream: u16,
}

impl Link {
    fn end(&self, to_destination: bool) -> &File {
        if to_destination { &self.destination } else { &self.source }
    }

    fn close(&self) {
        for end in [&self.source, &self.destination] {
            // Either side may be closed already.
            let _ = rustix::net::shutdown(end, rustix::net::Shutdown::Both);
        }
    }
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn new(wire: Wire, path: &std::path::Path) -> Self {
        match wire {
            Wire::Unix => Self::Unix(UnixListener::bind(path).unwrap()),
            Wire::Tcp => Self::Tcp(TcpListener::bind("127.0.0.1:0").unwrap()),
        }
    }

    fn accept(&self) -> OwnedFd {
        match self {
            Self::Unix(listener) => listener.accept().unwrap().0.into(),
            Self::Tcp(listener) => without_delay(listener.accept().unwrap().0),
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

fn without_delay(stream: TcpStream) -> OwnedFd {
    stream.set_nodelay(true).unwrap();
    stream.into()
}

/// Connects to an address. `None` if no process listens there.
fn connect(address: &str) -> Option<OwnedFd> {
    match (address.strip_prefix("unix:"), address.strip_prefix("tcp:")) {
        (Some(path), _) => UnixStream::connect(path).ok().map(OwnedFd::from),
        (_, Some(name)) => TcpStream::connect(name).ok().map(without_delay),
        _ => panic!("no address: {address}"),
    }
}

/// Passes records between the agents, one at a time.
#[derive(Debug)]
pub struct Relay {
    /// The folder of its sockets.
    pub folder: tempfile::TempDir,
    wire: Wire,
    listener: Listener,
    /// The address at which the destination listens.
    destination: String,
    links: Vec<Link>,
    /// All records that were passed on.
    pub seen: Vec<Passing>,
    /// Keeps the guest's memory dirty, so that the source makes as many passes as the test wants.
    busy: Option<Busy>,
}

/// The guest's log, and how many passes find a dirty page in it: the first page of
/// [`super::Ram::odd`].
#[derive(Debug)]
struct Busy {
    log: Arc<DirtyLog>,
    passes: u64,
}

impl Busy {
    const PAGE: u64 = super::Ram::ODD_GPA / PAGE_SIZE;

    fn write(&self, record: &Passing) {
        if record.kind == Kind::PassDone && record.header.number() + 1 < self.passes {
            self.log.mark(PageRange::new(Self::PAGE, 1));
        }
    }
}

impl Relay {
    /// A relay over UNIX sockets.
    pub fn unix() -> Self {
        Self::over(Wire::Unix)
    }

    /// A relay over this kind of connection.
    pub fn over(wire: Wire) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = Listener::new(wire, &folder.path().join("relay"));
        Self {
            folder,
            wire,
            listener,
            destination: String::new(),
            links: Vec::new(),
            seen: Vec::new(),
            busy: None,
        }
    }

    /// The address for the source.
    pub fn address(&self) -> String {
        match &self.listener {
            Listener::Unix(_) => format!("unix:{}", self.folder.path().join("relay").display()),
            Listener::Tcp(listener) => format!("tcp:{}", listener.local_addr().unwrap()),
        }
    }

    /// The address for the destination to listen at.
    pub fn place(&self) -> String {
        match self.wire {
            Wire::Unix => format!("unix:{}", self.folder.path().join("destination").display()),
            Wire::Tcp => "tcp:127.0.0.1:0".to_owned(),
        }
    }

    /// Sets the address at which the destination listens.
    pub fn leads_to(&mut self, address: &str) {
        address.clone_into(&mut self.destination);
    }

    /// Starts the incoming job of the destination. Returns the job.
    pub fn listen(&mut self, destination: &Client, options: &IncomingOptions) -> u64 {
        let started = destination.start_incoming(Target::Address(self.place()), options).unwrap();
        self.leads_to(&started.address);
        started.job
    }

    /// Starts the outgoing job of the source. Returns the job. With options of [`super::passes`]
    /// the source makes that number of passes, because the guest has a dirty page before each of
    /// them.
    pub fn send(&mut self, source: &Client, options: &OutgoingOptions) -> u64 {
        let wants_passes =
            options.downtime_limit.is_zero() && options.policy == NonConvergence::StopAnyway;
        self.busy = wants_passes
            .then(|| Busy { log: source.log().clone(), passes: options.max_passes.into() });
        source.start_outgoing(Target::Address(self.address()), options).unwrap().job
    }

    fn accept(&mut self) {
        let source = self.listener.accept();
        // Without a destination the source's connection is closed, like that of a host without a
        // listener.
        let Some(destination) = connect(&self.destination) else { return };
        for end in [&source, &destination] {
            for timeout in [Timeout::Recv, Timeout::Send] {
                set_socket_timeout(end, timeout, Some(SOON)).unwrap();
            }
        }
        self.links.push(Link { source: source.into(), destination: destination.into(), stream: 0 });
    }

    /// Waits for at most [`MOMENT`]. Returns whether the listener is ready, and the first end that
    /// is ready: its link, and true if it is the source's end.
    fn wait(&self) -> (bool, Option<(usize, bool)>) {
        let mut polled = vec![PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN)];
        for link in &self.links {
            polled.extend(
                [&link.source, &link.destination].map(|end| PollFd::new(end, PollFlags::IN)),
            );
        }
        let moment = Timespec::try_from(MOMENT).unwrap();
        // An interrupted wait is only shorter.
        let _ = poll(&mut polled, Some(&moment));
        let mut ready = polled.iter().map(|fd| !fd.revents().is_empty());
        let listener = ready.next().unwrap();
        (listener, ready.position(|ready| ready).map(|at| (at / 2, at % 2 == 0)))
    }

    /// Reads the next record of either side, without passing it on. `None` if none comes within
    /// [`MOMENT`]. If one end of a link is closed, closes the link.
    fn next(&mut self) -> Option<Passing> {
        let (connection, ready) = self.wait();
        if connection {
            self.accept();
        }
        let (link, to_destination) = ready?;
        match read_record(self.links[link].end(!to_destination)) {
            Some((kind, header, payload)) => {
                if kind == Kind::Hello {
                    self.links[link].stream = Hello::decode(&payload).unwrap().stream;
                }
                let stream = self.links[link].stream;
                Some(Passing { link, stream, to_destination, kind, header, payload })
            }
            None => {
                self.links.remove(link).close();
                None
            }
        }
    }

    /// Passes a record on.
    pub fn pass(&mut self, record: Passing) {
        if let Some(busy) = &self.busy {
            busy.write(&record);
        }
        let mut to = self.links[record.link].end(record.to_destination);
        // The receiver may have closed the link.
        let _ = to.write_all(&record.bytes());
        self.seen.push(record);
    }

    fn pass_part(&self, record: &Passing, bytes: usize) {
        let mut to = self.links[record.link].end(record.to_destination);
        to.write_all(&record.bytes()[..bytes]).unwrap();
    }

    /// Passes a record on byte by byte, one in each `interval`, until `until` returns true.
    pub fn trickle(&self, record: &Passing, interval: Duration, mut until: impl FnMut() -> bool) {
        let mut to = self.links[record.link].end(record.to_destination);
        for byte in record.bytes() {
            if until() || to.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(interval);
        }
    }

    /// Passes only the first `bytes` of a record on, and cuts all links.
    pub fn cut_in(&mut self, record: &Passing, bytes: usize) {
        self.pass_part(record, bytes);
        self.cut();
    }

    /// Passes only the first `bytes` of a record on, and cuts the link that it came on.
    pub fn cut_one(&mut self, record: &Passing, bytes: usize) {
        self.pass_part(record, bytes);
        self.links.remove(record.link).close();
    }

    /// Passes records on until one is `wanted`. Returns that one without passing it on.
    pub fn until(&mut self, mut wanted: impl FnMut(&Passing) -> bool) -> Passing {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(record) = self.next() {
                if wanted(&record) {
                    return record;
                }
                self.pass(record);
            }
            assert!(Instant::now() < deadline, "the record did not come");
        }
    }

    /// Like [`Relay::until`]. `None` if `over` says that the jobs ended before, because one of
    /// their timeouts was too short for this machine.
    pub fn until_unless(
        &mut self, mut over: impl FnMut() -> bool, mut wanted: impl FnMut(&Passing) -> bool,
    ) -> Option<Passing> {
        let deadline = Instant::now() + SOON;
        loop {
            match self.next() {
                Some(record) if wanted(&record) => return Some(record),
                Some(record) => self.pass(record),
                // No record is left.
                None if over() => return None,
                None => assert!(Instant::now() < deadline, "the record did not come"),
            }
        }
    }

    /// Passes all records on until `until` returns true. `what` names the condition.
    pub fn pump(&mut self, what: &str, mut until: impl FnMut() -> bool) {
        let deadline = Instant::now() + SOON;
        while !until() {
            if let Some(record) = self.next() {
                self.pass(record);
            }
            assert!(Instant::now() < deadline, "{what} did not come about");
        }
    }

    /// Passes all records on until the job ends.
    pub fn finish(&mut self, side: &Client, job: u64) -> JobStatus {
        let deadline = Instant::now() + SOON;
        loop {
            while let Some(record) = self.next() {
                self.pass(record);
            }
            let status = side.status().unwrap();
            assert_eq!(status.job, job);
            if status.phase.is_final() {
                // The last records.
                while let Some(record) = self.next() {
                    self.pass(record);
                }
                return status;
            }
            assert!(Instant::now() < deadline, "stuck: {status:?}");
        }
    }

    /// Closes all links.
    pub fn cut(&mut self) {
        self.links.drain(..).for_each(|link| link.close());
    }

    /// Resets all links, like a host that has rebooted. UNIX sockets, which cannot be reset, are
    /// closed.
    pub fn reset(&mut self) {
        if self.wire == Wire::Tcp {
            for link in self.links.drain(..) {
                for end in [&link.source, &link.destination] {
                    set_socket_linger(end, Some(Duration::ZERO)).unwrap();
                }
            }
        }
        self.cut();
    }
}

/// Reads a record from a blocking socket. `None` at its end.
pub fn read_record(mut from: impl Read) -> Option<(Kind, RecordHeader, Vec<u8>)> {
    let mut bytes = [0; RECORD_SIZE];
    from.read_exact(&mut bytes).ok()?;
    let header = RecordHeader::from_wire(bytes);
    let kind = header.check().unwrap();
    let mut payload = vec![0; header.payload_length()];
    from.read_exact(&mut payload).ok()?;
    Some((kind, header, payload))
}
