//! A connected stream: records in and out, with deadlines.
//!
//! The socket blocks, and the kernel keeps the deadlines: a call that makes no progress for that long fails. Cancelling a job shuts the
//! socket down, which ends any call at once (see [`crate::job::Cancel`]).

use super::TransportError;
use pageferry_protocol::stream::hello::MAX_HELLO;
use pageferry_protocol::stream::{Kind, MAX_PAYLOAD, RECORD_SIZE, RecordHeader};
use rustix::io::{Errno, IoSlice};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Most parts of one write; the kernel's `UIO_MAXIOV`.
const MAX_PARTS: usize = 1024;

/// A connected socket. Clones are the same socket.
#[derive(Debug, Clone)]
pub struct StreamSocket {
    fd: Arc<OwnedFd>,
    timeout: Duration,
}

impl StreamSocket {
    /// A stream over `fd` on which the peer may be silent, or take nothing, for `timeout`.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn new(fd: OwnedFd, timeout: Duration) -> Result<Self, TransportError> {
        let kernel = |errno: Errno| TransportError::Kernel(errno.into());
        super::address::tune(fd.as_fd()).map_err(kernel)?;
        let socket = Self { fd: Arc::new(fd), timeout };
        socket.set_recv_timeout(timeout)?;
        set_socket_timeout(&socket.fd, Timeout::Send, Some(timeout)).map_err(kernel)?;
        Ok(socket)
    }

    /// Changes how long the peer may be silent.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn set_recv_timeout(&self, timeout: Duration) -> Result<(), TransportError> {
        // Zero would be no deadline.
        let timeout = timeout.max(Duration::from_micros(1));
        set_socket_timeout(&self.fd, Timeout::Recv, Some(timeout)).map_err(|errno| TransportError::Kernel(errno.into()))
    }

    /// The peer may be silent for as long as it likes: it has nothing to say unless something happens.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn wait_for_ever(&self) -> Result<(), TransportError> {
        set_socket_timeout(&self.fd, Timeout::Recv, None).map_err(|errno| TransportError::Kernel(errno.into()))
    }

    /// Ends both directions, and wakes who reads or writes.
    pub fn shut(&self) {
        // Fails only if it is not connected any more.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    /// Ends the receiving side, and wakes who reads. On a UNIX socket the peer can send no more, on TCP it does not notice.
    pub fn stop_reading(&self) {
        // Fails only if it is not connected any more.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Read);
    }

    /// Ends the sending side: the peer reads to the end and then sees it.
    pub fn end(&self) {
        // Fails only if it is not connected any more.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write);
    }

    /// Writes all of `parts`.
    ///
    /// # Errors
    /// If the peer is gone or takes nothing.
    pub fn write_all(&self, mut parts: &mut [IoSlice<'_>]) -> Result<(), TransportError> {
        while !parts.is_empty() {
            let batch = parts.len().min(MAX_PARTS);
            let sent = sendmsg(&self.fd, &parts[..batch], &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL);
            match sent {
                Ok(count) => IoSlice::advance_slices(&mut parts, count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(TransportError::Stuck(self.timeout)),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(TransportError::Closed),
                Err(errno) => return Err(TransportError::Kernel(errno.into())),
            }
        }
        Ok(())
    }

    fn read(&self, buffer: &mut [u8], flags: RecvFlags) -> Result<Option<usize>, TransportError> {
        loop {
            match recv(&self.fd, &mut *buffer, flags) {
                Ok((_, count)) => return Ok(Some(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::CONNRESET) => return Ok(Some(0)),
                Err(errno) => return Err(TransportError::Kernel(errno.into())),
            }
        }
    }
}

impl AsFd for StreamSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Writes single records, for what is not page data.
#[derive(Debug)]
pub struct RecordWriter {
    socket: StreamSocket,
}

impl RecordWriter {
    /// Writes to `socket`.
    pub fn new(socket: StreamSocket) -> Self {
        Self { socket }
    }

    /// Writes a record; returns its bytes on the wire.
    ///
    /// # Errors
    /// If the peer is gone or takes nothing.
    pub fn write(&self, header: RecordHeader, payload: &[u8]) -> Result<u64, TransportError> {
        let header = header.sealed(payload).to_wire();
        self.socket.write_all(&mut [IoSlice::new(&header), IoSlice::new(payload)])?;
        Ok((RECORD_SIZE + payload.len()) as u64)
    }

    /// Writes a record that is not about pages, without a payload.
    ///
    /// # Errors
    /// If the peer is gone or takes nothing.
    pub fn write_plain(&self, kind: Kind, number: u64) -> Result<u64, TransportError> {
        self.write(RecordHeader::plain(kind, number, 0), &[])
    }

    /// The socket.
    pub fn socket(&self) -> &StreamSocket {
        &self.socket
    }
}

/// A record that came, checked: kind, lengths and checksum.
#[derive(Debug)]
pub struct ReceivedRecord<'a> {
    /// What it is.
    pub kind: Kind,
    /// Its header.
    pub header: RecordHeader,
    /// Its payload.
    pub payload: &'a [u8],
}

impl ReceivedRecord<'_> {
    /// Bytes on the wire.
    pub fn wire_bytes(&self) -> u64 {
        (RECORD_SIZE + self.payload.len()) as u64
    }
}

/// Reads records through a buffer, so that small ones cost less than a system call each.
#[derive(Debug)]
pub struct RecordReader {
    socket: StreamSocket,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

/// How a record is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Waits until all of it is here.
    Wait,
    /// Does not wait.
    Look,
    /// Does not wait, and takes nothing but a hello.
    Stranger,
}

/// Some of the records that the sender's batches make: larger ones save wake-ups, still larger ones leave the cache.
const BUFFER: usize = 1280 << 10;

impl RecordReader {
    /// Reads from `socket`. The buffer comes with the first record.
    pub fn new(socket: StreamSocket) -> Self {
        Self { socket, buffer: Vec::new(), start: 0, end: 0 }
    }

    /// The socket.
    pub fn socket(&self) -> &StreamSocket {
        &self.socket
    }

    /// The next record.
    ///
    /// # Errors
    /// If it is malformed, or the peer is gone or silent.
    pub fn read(&mut self) -> Result<ReceivedRecord<'_>, TransportError> {
        match self.poll_next(How::Wait)? {
            Some((kind, header)) => Ok(self.take(kind, header)),
            None => Err(TransportError::Silent(self.socket.timeout)),
        }
    }

    /// True if the beginning of another record came with the last.
    pub fn has_more(&self) -> bool {
        self.end > self.start
    }

    /// The next record if it is all here, without waiting.
    ///
    /// # Errors
    /// If it is malformed, or the peer is gone.
    pub fn try_read(&mut self) -> Result<Option<ReceivedRecord<'_>>, TransportError> {
        Ok(self.poll_next(How::Look)?.map(|(kind, header)| self.take(kind, header)))
    }

    /// The payload of a hello if it is all here, without waiting. For a peer that is not known yet: it gets no more memory than the longest hello takes.
    ///
    /// # Errors
    /// If it is no hello, or malformed, or the peer is gone.
    pub fn try_read_hello(&mut self) -> Result<Option<&[u8]>, TransportError> {
        Ok(self.poll_next(How::Stranger)?.map(|(kind, header)| self.take(kind, header).payload))
    }

    fn poll_next(&mut self, how: How) -> Result<Option<(Kind, RecordHeader)>, TransportError> {
        if !self.fill(RECORD_SIZE, how)? {
            return Ok(None);
        }
        let mut bytes = [0; RECORD_SIZE];
        bytes.copy_from_slice(&self.buffer[self.start..self.start + RECORD_SIZE]);
        let header = RecordHeader::from_wire(bytes);
        let kind = header.check()?;
        if how == How::Stranger && (kind != Kind::Hello || header.payload_length() > MAX_HELLO) {
            return Err(TransportError::NoHello { kind, length: header.payload_length() });
        }
        if !self.fill(RECORD_SIZE + header.payload_length(), how)? {
            return Ok(None);
        }
        let payload = &self.buffer[self.start + RECORD_SIZE..self.start + RECORD_SIZE + header.payload_length()];
        header.verify(kind, payload)?;
        Ok(Some((kind, header)))
    }

    fn take(&mut self, kind: Kind, header: RecordHeader) -> ReceivedRecord<'_> {
        let start = self.start + RECORD_SIZE;
        self.start = start + header.payload_length();
        ReceivedRecord { kind, header, payload: &self.buffer[start..self.start] }
    }

    /// Makes sure that `needed` bytes are in the buffer; `needed` was checked against the format's limits.
    fn fill(&mut self, needed: usize, how: How) -> Result<bool, TransportError> {
        debug_assert!(needed <= RECORD_SIZE + MAX_PAYLOAD);
        if self.end - self.start >= needed {
            return Ok(true);
        }
        if self.start + needed > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            let size = if how == How::Stranger { needed.max(4096) } else { needed.max(BUFFER) };
            if self.buffer.len() < size {
                self.buffer.resize(size, 0);
            }
        }
        let flags = if how == How::Wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        while self.end - self.start < needed {
            match self.socket.read(&mut self.buffer[self.end..], flags)? {
                None => return Ok(false),
                Some(0) if self.end == self.start => return Err(TransportError::Closed),
                Some(0) => return Err(TransportError::Cut { missing: needed - (self.end - self.start) }),
                Some(count) => self.end += count,
            }
        }
        Ok(true)
    }

    /// Reads and throws away what still comes until the peer closes or is silent, so that our last word is not lost to a reset.
    pub fn drain(&mut self, patience: Duration) {
        let deadline = std::time::Instant::now() + patience;
        let _ = self.socket.set_recv_timeout(patience);
        let mut scratch = vec![0; 64 << 10];
        while std::time::Instant::now() < deadline {
            match self.socket.read(&mut scratch, RecvFlags::empty()) {
                Ok(Some(count)) if count > 0 => {}
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, RecordReader) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        (theirs, RecordReader::new(StreamSocket::new(ours.into(), Duration::from_secs(10)).unwrap()))
    }

    #[test]
    fn a_stranger_gets_no_memory_for_anything_but_a_hello() {
        let large = RecordHeader::plain(Kind::Hello, 0, MAX_HELLO + 1);
        let other = RecordHeader::plain(Kind::State, 0, 100);
        for header in [large, other] {
            let (mut theirs, mut reader) = pair();
            theirs.write_all(&header.to_wire()).unwrap();
            assert!(matches!(reader.try_read_hello(), Err(TransportError::NoHello { .. })));
            assert!(reader.buffer.len() <= 4096);
        }
    }

    #[test]
    fn a_hello_comes_as_its_bytes_do_and_what_follows_is_kept() {
        let (mut theirs, mut reader) = pair();
        let payload = vec![7; 10_000];
        let hello = RecordHeader::plain(Kind::Hello, 0, payload.len()).sealed(&payload).to_wire();
        let next = RecordHeader::plain(Kind::PassEnd, 5, 0).sealed(&[]).to_wire();
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
