// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Records into a stream and out of it.
//!
//! [`RecordReader`] reads records through a buffer and checks them. [`RecordWriter`] writes single
//! records. Both use a [`StreamSocket`], which bounds every wait.

use super::error::TransportError;
use super::socket::receive;
use super::stream::StreamSocket;
use pageferry_protocol::stream::hello::MAX_HELLO;
use pageferry_protocol::stream::{Kind, MAX_PAYLOAD, RECORD_SIZE, RecordHeader};
use rustix::event::PollFlags;
use rustix::io::IoSlice;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Writes single records that do not carry page data.
#[derive(Debug)]
pub struct RecordWriter {
    socket: StreamSocket,
}

impl RecordWriter {
    /// Writes to `socket`.
    pub fn new(socket: StreamSocket) -> Self {
        Self { socket }
    }

    /// Writes a record, and returns its length on the wire in bytes.
    ///
    /// # Errors
    /// If the peer is gone, or does not receive the record in time.
    pub fn write(&self, header: RecordHeader, payload: &[u8]) -> Result<u64, TransportError> {
        let header = header.with_checksum(self.socket.checked(payload)).to_wire();
        self.socket.write_all(&mut [IoSlice::new(&header), IoSlice::new(payload)])?;
        Ok((RECORD_SIZE + payload.len()) as u64)
    }

    /// Writes a record without page numbers and without a payload.
    ///
    /// # Errors
    /// If the peer is gone, or does not receive the record in time.
    pub fn write_plain(&self, kind: Kind, number: u64) -> Result<u64, TransportError> {
        self.write(RecordHeader::plain(kind, number, 0), &[])
    }

    /// The socket.
    pub fn socket(&self) -> &StreamSocket {
        &self.socket
    }
}

/// A received record. Its kind, lengths and checksum were checked.
#[derive(Debug)]
pub struct ReceivedRecord<'a> {
    /// Its kind.
    pub kind: Kind,
    /// Its header.
    pub header: RecordHeader,
    /// Its payload.
    pub payload: &'a [u8],
}

impl ReceivedRecord<'_> {
    /// Its length on the wire in bytes.
    pub fn wire_bytes(&self) -> u64 {
        (RECORD_SIZE + self.payload.len()) as u64
    }
}

/// Reads records through a buffer, so that several small records cost one system call.
#[derive(Debug)]
pub struct RecordReader {
    socket: StreamSocket,
    /// How long the peer may be silent before it begins a record; `None` means for ever.
    patience: Option<Duration>,
    buffer: Vec<u8>,
    /// The bytes from `start` to `end` of the buffer were received and are not used yet.
    start: usize,
    end: usize,
}

/// The state of the peer that sends the next record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HelloFrom {
    /// The hello of this peer was accepted.
    Peer,
    /// This peer has not said hello. Only a hello is accepted from it.
    Stranger,
}

/// What the buffer holds.
enum Next {
    /// A whole record.
    Record(Kind, RecordHeader),
    /// An incomplete record. This many bytes of it are missing; before the header is complete, of
    /// the header.
    Missing(usize),
}

/// How a handshake of TLS begins. No record does.
const HANDSHAKE_OF_TLS: [u8; 2] = [0x16, 3];
/// Size of the buffer: several records as the sender's batches make them. A larger buffer needs
/// fewer wake-ups, but a still larger one does not stay in the cache.
const BUFFER: usize = 1280 << 10;
/// The first buffer of a peer that has not said hello. Almost every hello fits.
const FIRST: usize = 4 << 10;
/// The same over TLS, whose layer has a buffer of its own: one record of such a batch. More only
/// costs cache.
const BUFFER_OVER_TLS: usize = 320 << 10;

impl RecordReader {
    /// Reads from `socket`. The buffer is allocated with the first read.
    pub fn new(socket: StreamSocket) -> Self {
        let patience = Some(socket.timeout());
        Self { socket, patience, buffer: Vec::new(), start: 0, end: 0 }
    }

    /// The socket.
    pub fn socket(&self) -> &StreamSocket {
        &self.socket
    }

    /// Sets how long the peer may be silent before it begins a record.
    pub fn set_timeout(&mut self, patience: Duration) {
        self.patience = Some(patience);
    }

    /// Lets the peer be silent for any time before it begins a record. For a stream on which the
    /// peer sends only when it has something to report.
    pub fn set_no_timeout(&mut self) {
        self.patience = None;
    }

    /// Waits for the next record and returns it.
    ///
    /// # Errors
    /// If the record is malformed, or the peer is gone, is silent, or does not finish the record in
    /// time.
    pub fn read(&mut self) -> Result<ReceivedRecord<'_>, TransportError> {
        self.read_after(|| ())
    }

    /// The same. If no whole record is there, calls `before_wait` before each wait.
    ///
    /// # Errors
    /// As [`RecordReader::read`].
    pub fn read_after(
        &mut self, mut before_wait: impl FnMut(),
    ) -> Result<ReceivedRecord<'_>, TransportError> {
        // When the wait for the record began, and when its first byte was here.
        let (mut asked, mut begun) = (None, None);
        loop {
            let missing = match self.poll_next(HelloFrom::Peer)? {
                Next::Record(kind, header) => return Ok(self.take(kind, header)),
                Next::Missing(missing) => missing,
            };
            before_wait();
            let here = self.end - self.start;
            let (since, limit) = if here == 0 {
                (*asked.get_or_insert_with(Instant::now), self.patience)
            } else {
                (
                    *begun.get_or_insert_with(Instant::now),
                    Some(self.socket.time_for(here + missing)),
                )
            };
            if !self.socket.wait(PollFlags::IN, limit.map(|limit| since + limit))? {
                let timeout = limit.unwrap_or_default();
                return Err(match here {
                    0 => TransportError::Silent(timeout),
                    _ => TransportError::RecordTimeout { timeout, missing },
                });
            }
        }
    }

    /// True if the buffer holds the beginning of another record.
    pub fn has_more(&self) -> bool {
        self.end > self.start
    }

    /// The next record if all of it was received. Does not wait.
    ///
    /// # Errors
    /// If the record is malformed, or the peer is gone.
    pub fn try_read(&mut self) -> Result<Option<ReceivedRecord<'_>>, TransportError> {
        match self.poll_next(HelloFrom::Peer)? {
            Next::Record(kind, header) => Ok(Some(self.take(kind, header))),
            Next::Missing(_) => Ok(None),
        }
    }

    /// The payload of a hello if all of it was received. Does not wait. For a peer that has not
    /// said hello yet: the buffer grows to the longest hello at most, whatever the peer sends.
    ///
    /// # Errors
    /// If the record is not a hello, or is malformed, or the peer is gone.
    pub fn try_read_hello(&mut self) -> Result<Option<&[u8]>, TransportError> {
        match self.poll_next(HelloFrom::Stranger)? {
            Next::Record(kind, header) => Ok(Some(self.take(kind, header).payload)),
            Next::Missing(_) => Ok(None),
        }
    }

    /// Receives as much of the next record as is there, and checks it once it is complete. Does not
    /// wait.
    fn poll_next(&mut self, whose: HelloFrom) -> Result<Next, TransportError> {
        let missing = self.fill(RECORD_SIZE, whose)?;
        if missing > 0 {
            return Ok(Next::Missing(missing));
        }
        let mut bytes = [0; RECORD_SIZE];
        bytes.copy_from_slice(&self.buffer[self.start..self.start + RECORD_SIZE]);
        if whose == HelloFrom::Stranger && bytes.starts_with(&HANDSHAKE_OF_TLS) {
            return Err(TransportError::SpeaksTls);
        }
        let header = RecordHeader::from_wire(bytes);
        let kind = header.check()?;
        if whose == HelloFrom::Stranger
            && (kind != Kind::Hello || header.payload_length() > MAX_HELLO)
        {
            return Err(TransportError::HelloExpected { kind, length: header.payload_length() });
        }
        let missing = self.fill(RECORD_SIZE + header.payload_length(), whose)?;
        if missing > 0 {
            return Ok(Next::Missing(missing));
        }
        let payload = &self.buffer
            [self.start + RECORD_SIZE..self.start + RECORD_SIZE + header.payload_length()];
        header.verify(kind, self.socket.checked(payload))?;
        Ok(Next::Record(kind, header))
    }

    /// Size of the buffer in bytes.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Removes the record at the start of the buffer. [`RecordReader::poll_next`] has found it
    /// complete.
    fn take(&mut self, kind: Kind, header: RecordHeader) -> ReceivedRecord<'_> {
        let start = self.start + RECORD_SIZE;
        self.start = start + header.payload_length();
        ReceivedRecord { kind, header, payload: &self.buffer[start..self.start] }
    }

    /// Reads until `needed` bytes are in the buffer, or the socket has no more. Returns how many
    /// bytes are missing. The caller has checked `needed` against the limits of the format.
    fn fill(&mut self, needed: usize, whose: HelloFrom) -> Result<usize, TransportError> {
        debug_assert!(needed <= RECORD_SIZE + MAX_PAYLOAD);
        if self.end - self.start >= needed {
            return Ok(0);
        }
        if self.start + needed > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            // Whoever has not said hello gets no memory by a length, but as its bytes arrive.
            let size = match whose {
                HelloFrom::Stranger => FIRST,
                HelloFrom::Peer if self.socket.is_secured() => needed.max(BUFFER_OVER_TLS),
                HelloFrom::Peer => needed.max(BUFFER),
            };
            if self.buffer.len() < size {
                self.buffer.resize(size, 0);
            }
        }
        while self.end - self.start < needed {
            if self.end == self.buffer.len() {
                self.buffer.resize((2 * self.end).min(self.start + needed), 0);
            }
            let missing = needed - (self.end - self.start);
            match self.socket.read(&mut self.buffer[self.end..])? {
                None => return Ok(missing),
                Some(0) if self.end == self.start => return Err(TransportError::Closed),
                Some(0) => return Err(TransportError::ClosedInRecord { missing }),
                Some(count) => self.end += count,
            }
        }
        Ok(0)
    }

    /// Reads and drops some of the received bytes. Does not wait. Returns false if the peer has
    /// closed the connection.
    pub fn discard_some(&mut self) -> bool {
        let mut scratch = [0; 4096];
        !matches!(receive(self.socket.as_fd(), &mut scratch), Ok(Some(0)) | Err(_))
    }

    /// Reads and drops all bytes until the peer closes the connection, or until `patience` is over.
    ///
    /// If a socket is closed while it holds unread bytes, the kernel resets the connection, and the
    /// peer may lose the last record that this side has sent.
    pub fn drain(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut scratch = vec![0; 64 << 10];
        while Instant::now() < deadline {
            match receive(self.socket.as_fd(), &mut scratch) {
                Ok(Some(count)) if count > 0 => {}
                Ok(None) if matches!(self.socket.wait(PollFlags::IN, Some(deadline)), Ok(true)) => {
                }
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Deadline;
    use crate::outgoing::stop::Stop;
    use pageferry_protocol::control::job::OutgoingOptions;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn pair_with(timeout: Duration) -> (UnixStream, RecordReader) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        (theirs, RecordReader::new(StreamSocket::new(ours.into(), timeout).unwrap()))
    }

    fn pair() -> (UnixStream, RecordReader) {
        pair_with(Duration::from_secs(10))
    }

    /// Runs `test` while a peer repeats `step`. The time between two steps is much shorter than
    /// every timeout.
    fn beside(mut step: impl FnMut() + Send, test: impl FnOnce()) {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    step();
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            test();
            over.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn a_peer_that_sends_single_bytes_has_one_deadline_per_record() {
        let (mut theirs, mut reader) = pair_with(Duration::from_millis(300));
        let header = RecordHeader::plain(Kind::State, 0, 4096).with_checksum(&[]).to_wire();
        theirs.write_all(&header).unwrap();
        // At 50 bytes a second the whole record would take more than a minute.
        beside(
            || drop(theirs.write(&[0])),
            || {
                assert!(matches!(
                    reader.read(),
                    Err(TransportError::RecordTimeout { missing: 1.., .. })
                ))
            },
        );
    }

    #[test]
    fn a_peer_that_receives_slowly_has_one_deadline_per_write() {
        let (theirs, reader) = pair_with(Duration::from_millis(300));
        let mut taking = theirs.try_clone().unwrap();
        // Somewhat more than the queue holds. At this pace the write would take minutes; it is
        // allowed about 8 seconds.
        let bytes = vec![0; 512 << 10];
        beside(
            || drop(taking.read(&mut [0; 16])),
            || {
                let outcome = reader.socket().write_all(&mut [IoSlice::new(&bytes)]);
                assert!(matches!(outcome, Err(TransportError::SendTimeout { .. })), "{outcome:?}");
            },
        );
    }

    #[test]
    fn the_deadline_of_a_stop_ends_every_wait() {
        let none = OutgoingOptions {
            peer_timeout: Duration::from_millis(100),
            hook_timeout: Duration::ZERO,
            ..OutgoingOptions::default()
        };
        let deadline = Deadline::default();
        let (theirs, ours) = UnixStream::pair().unwrap();
        let socket =
            StreamSocket::with_stop(ours.into(), Duration::from_secs(3600), &deadline).unwrap();
        let mut reader = RecordReader::new(socket.clone());
        let stop = Stop::begin(&deadline, &none);
        assert!(matches!(reader.read(), Err(TransportError::StopDeadlinePassed)));
        let outcome = socket.write_all(&mut [IoSlice::new(&vec![0; 16 << 20])]);
        assert!(matches!(outcome, Err(TransportError::StopDeadlinePassed)), "{outcome:?}");
        drop(stop);
        // The deadline ends with the stop.
        (&theirs)
            .write_all(&RecordHeader::plain(Kind::Loaded, 0, 0).with_checksum(&[]).to_wire())
            .unwrap();
        assert_eq!(reader.read().unwrap().kind, Kind::Loaded);
    }

    #[test]
    fn a_stranger_gets_no_memory_for_anything_but_a_hello() {
        let large = RecordHeader::plain(Kind::Hello, 0, MAX_HELLO + 1);
        let other = RecordHeader::plain(Kind::State, 0, 100);
        for header in [large, other] {
            let (mut theirs, mut reader) = pair();
            theirs.write_all(&header.to_wire()).unwrap();
            assert!(matches!(reader.try_read_hello(), Err(TransportError::HelloExpected { .. })));
            assert!(reader.buffer.len() <= FIRST);
        }
    }

    #[test]
    fn a_stranger_gets_memory_only_for_what_it_has_sent() {
        let (mut theirs, mut reader) = pair();
        let claimed = RecordHeader::plain(Kind::Hello, 0, MAX_HELLO).with_checksum(&[]);
        theirs.write_all(&claimed.to_wire()).unwrap();
        let mut sent = RECORD_SIZE;
        while sent < MAX_HELLO {
            assert!(reader.try_read_hello().unwrap().is_none());
            assert!(reader.buffered() <= (2 * sent).max(FIRST), "{} of {sent}", reader.buffered());
            theirs.write_all(&[0; 1000]).unwrap();
            sent += 1000;
        }
    }

    #[test]
    fn a_hello_in_pieces_is_read_and_the_next_record_is_kept() {
        let (mut theirs, mut reader) = pair();
        let payload = vec![7; 10_000];
        let hello =
            RecordHeader::plain(Kind::Hello, 0, payload.len()).with_checksum(&payload).to_wire();
        let next = RecordHeader::plain(Kind::PassEnd, 5, 0).with_checksum(&[]).to_wire();
        let bytes = [&hello[..], &payload, &next].concat();
        for part in bytes.chunks(999) {
            assert!(reader.try_read_hello().unwrap().is_none());
            theirs.write_all(part).unwrap();
        }
        assert_eq!(reader.try_read_hello().unwrap().unwrap(), payload);
        let record = reader.read().unwrap();
        assert_eq!((record.kind, record.header.number()), (Kind::PassEnd, 5));
    }
}
