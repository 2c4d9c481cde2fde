// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The page stream in the hands of the VMM. A VMM with its own transport between hosts relays
//! records, instead of letting the agents connect to each other.
//!
//! One end of a [`PageStream::pair`] goes to the agent as
//! [`Target::Socket`](crate::Target::Socket). Each record that [`PageStream::recv`] returns must go
//! into [`PageStream::send`] on the other host, in order. The same holds for the other direction.

use crate::control::socket_pair;
use crate::error::Error;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::stream::{Kind, RECORD_SIZE, RecordHeader};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A record of the page stream that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    kind: Kind,
    header: RecordHeader,
    /// Header and payload.
    bytes: Vec<u8>,
}

impl Record {
    /// Makes a record about the pages `range` of `block`. `flags` are those of the kind.
    ///
    /// # Errors
    /// If the flags or the length of the payload do not fit the kind.
    pub fn from_parts(
        kind: Kind, flags: u16, block: u32, range: PageRange, payload: &[u8],
    ) -> Result<Self, Error> {
        let header =
            RecordHeader::new(kind, flags, block, range, payload.len()).with_checksum(payload);
        header.check()?;
        let mut bytes = header.to_wire().to_vec();
        bytes.extend_from_slice(payload);
        Ok(Self { kind, header, bytes })
    }

    /// Reads the next record; `None` if the stream ends before it. The header is checked before the
    /// payload is allocated, and the checksum afterwards.
    ///
    /// # Errors
    /// If the record is not valid, the stream ends inside it, or `from` cannot be read.
    pub fn read_from(from: &mut impl Read) -> Result<Option<Self>, Error> {
        let mut wire = [0; RECORD_SIZE];
        if read_up_to(from, &mut wire)? == 0 {
            return Ok(None);
        }
        let header = RecordHeader::from_wire(wire);
        let kind = header.check()?;
        let mut bytes = vec![0; RECORD_SIZE + header.payload_length()];
        let (head, payload) = bytes.split_at_mut(RECORD_SIZE);
        head.copy_from_slice(&wire);
        if !payload.is_empty() && read_up_to(from, payload)? == 0 {
            return Err(Error::ClosedInRecord);
        }
        header.verify(kind, payload)?;
        Ok(Some(Self { kind, header, bytes }))
    }

    /// Writes the record.
    ///
    /// # Errors
    /// If `to` cannot be written.
    pub fn write_to(&self, to: &mut impl Write) -> Result<(), Error> {
        to.write_all(&self.bytes).map_err(|source| Error::Stream { source })
    }

    /// The kind of the record.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The pages of the record, if its kind has any.
    pub fn range(&self) -> PageRange {
        self.header.range()
    }

    /// The block of the record, if its kind has one.
    pub fn block(&self) -> u32 {
        self.header.block()
    }

    /// Flags of its kind.
    pub fn flags(&self) -> u16 {
        self.header.flags()
    }

    /// The number of a record that is not about pages, such as a pass.
    pub fn number(&self) -> u64 {
        self.header.number()
    }

    /// The payload.
    pub fn payload(&self) -> &[u8] {
        &self.bytes[RECORD_SIZE..]
    }

    /// The whole record as it travels.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Fills `buffer`; 0 if the stream ended before the first byte.
fn read_up_to(from: &mut impl Read, buffer: &mut [u8]) -> Result<usize, Error> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) if filled == 0 => return Ok(0),
            Ok(0) => return Err(Error::ClosedInRecord),
            Ok(read) => filled += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(source) => return Err(Error::Stream { source }),
        }
    }
    Ok(filled)
}

/// The VMM's end of a page stream, both directions. Its methods block.
#[derive(Debug)]
pub struct PageStream {
    reader: PageStreamReader,
    writer: PageStreamWriter,
}

/// The direction from the agent. Dropping it makes the agent's writes fail.
#[derive(Debug)]
pub struct PageStreamReader {
    socket: Socket,
}

/// The direction to the agent. Dropping it ends the stream for the agent.
#[derive(Debug)]
pub struct PageStreamWriter {
    socket: Socket,
}

impl PageStream {
    /// A stream and the socket to hand to the agent.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn pair() -> Result<(Self, OwnedFd), Error> {
        let (ours, agents) = socket_pair()?;
        Ok((Self::from(ours), agents))
    }

    /// The next record from the agent; `None` when it ended the stream.
    ///
    /// # Errors
    /// If the record is not valid, or the connection broke.
    pub fn recv(&mut self) -> Result<Option<Record>, Error> {
        self.reader.recv()
    }

    /// Sends a record to the agent.
    ///
    /// # Errors
    /// If the connection broke.
    pub fn send(&mut self, record: &Record) -> Result<(), Error> {
        self.writer.send(record)
    }

    /// The two directions, for two threads.
    pub fn split(self) -> (PageStreamReader, PageStreamWriter) {
        (self.reader, self.writer)
    }
}

impl From<OwnedFd> for PageStream {
    /// A connected stream socket as a page stream.
    fn from(socket: OwnedFd) -> Self {
        let socket = Arc::new(socket);
        let reader = PageStreamReader { socket: Socket(Arc::clone(&socket)) };
        Self { reader, writer: PageStreamWriter { socket: Socket(socket) } }
    }
}

impl PageStreamReader {
    /// The next record from the agent; `None` when it ended the stream.
    ///
    /// # Errors
    /// If the record is not valid, or the connection broke.
    pub fn recv(&mut self) -> Result<Option<Record>, Error> {
        Record::read_from(&mut self.socket)
    }
}

impl PageStreamWriter {
    /// Sends a record to the agent.
    ///
    /// # Errors
    /// If the connection broke.
    pub fn send(&mut self, record: &Record) -> Result<(), Error> {
        record.write_to(&mut self.socket)
    }
}

impl Drop for PageStreamReader {
    fn drop(&mut self) {
        // Fails only if the connection has ended already.
        let _ = shutdown(&self.socket.0, Shutdown::Read);
    }
}

impl Drop for PageStreamWriter {
    fn drop(&mut self) {
        let _ = shutdown(&self.socket.0, Shutdown::Write);
    }
}

/// A stream socket that raises no SIGPIPE, whatever the VMM does with signals.
#[derive(Debug)]
struct Socket(Arc<OwnedFd>);

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        Ok(recv(&self.0, buffer, RecvFlags::empty())?.0)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(send(&self.0, bytes, SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::stream::{MAX_PAYLOAD, RecordError};
    use std::os::fd::AsFd;

    fn pages(count: u64) -> Record {
        let payload = vec![0x5a; count as usize * 4096];
        Record::from_parts(Kind::Data, 0, 3, PageRange::new(9, count), &payload).unwrap()
    }

    #[test]
    fn records_pass_both_ways_and_the_end_is_clean() {
        let (mut ours, agents) = PageStream::pair().unwrap();
        let mut agent = PageStream::from(agents);
        // Less than a socket's buffer, so that one thread can play both.
        let there = pages(2);
        let back = Record::from_parts(Kind::PassDone, 0, 0, PageRange::new(4, 0), &[]).unwrap();
        agent.send(&there).unwrap();
        ours.send(&back).unwrap();

        let received = ours.recv().unwrap().unwrap();
        assert_eq!(received, there);
        assert_eq!(
            (received.kind(), received.block(), received.range()),
            (Kind::Data, 3, PageRange::new(9, 2))
        );
        assert_eq!(received.payload(), &there.as_bytes()[RECORD_SIZE..]);
        assert_eq!(agent.recv().unwrap().unwrap().number(), 4);

        drop(agent);
        assert!(ours.recv().unwrap().is_none());
        assert!(matches!(ours.send(&back), Err(Error::Stream { .. })), "an error, and no signal");
    }

    #[test]
    fn the_halves_end_their_own_direction_only() {
        let (ours, agents) = PageStream::pair().unwrap();
        let mut agent = PageStream::from(agents);
        let (mut reader, writer) = ours.split();
        drop(writer);
        assert!(agent.recv().unwrap().is_none());
        agent.send(&pages(1)).unwrap();
        assert_eq!(reader.recv().unwrap().unwrap(), pages(1));
        drop(reader);
        assert!(agent.send(&pages(1)).is_err());
    }

    #[test]
    fn a_flipped_bit_and_a_cut_record_are_errors() {
        let mut bytes = pages(1).as_bytes().to_vec();
        bytes[RECORD_SIZE + 17] ^= 1;
        assert!(matches!(
            Record::read_from(&mut bytes.as_slice()),
            Err(Error::Record(RecordError::Checksum { kind: Kind::Data, .. }))
        ));
        for cut in [1, RECORD_SIZE - 1, RECORD_SIZE, RECORD_SIZE + 1] {
            assert!(
                matches!(Record::read_from(&mut &bytes[..cut]), Err(Error::ClosedInRecord)),
                "cut at {cut}"
            );
        }
        assert!(Record::read_from(&mut &bytes[..0]).unwrap().is_none());
    }

    #[test]
    fn a_lying_header_is_refused_before_its_payload_is_waited_for() {
        let (ours, agents) = PageStream::pair().unwrap();
        let (mut reader, _writer) = ours.split();
        let lying = RecordHeader::new(Kind::State, 0, 0, PageRange::default(), MAX_PAYLOAD + 1);
        rustix::io::write(agents.as_fd(), &lying.to_wire()).unwrap();
        assert!(matches!(reader.recv(), Err(Error::Record(RecordError::Payload { .. }))));
    }

    #[test]
    fn parts_that_do_not_fit_the_kind_make_no_record() {
        let range = PageRange::new(0, 2);
        assert!(matches!(
            Record::from_parts(Kind::Data, 0, 0, range, &[0; 4096]),
            Err(Error::Record(RecordError::Length { .. }))
        ));
        assert!(Record::from_parts(Kind::PassEnd, 1, 0, range, &[]).is_err());
    }
}
