// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! As much of HTTP/1.1 as a proxy needs: heads, and where a body ends.

use std::io::{BufRead, Error, ErrorKind, Read, Result};

/// Longest head. Stores allow 8 KiB and less.
const LONGEST_HEAD: u64 = 64 << 10;

/// Bytes of a body that are passed on at once.
const PIECE: usize = 64 << 10;

/// The head of a request or of an answer.
#[derive(Debug, Clone)]
pub(super) struct Head {
    /// The request line or the status line, without its end.
    pub(super) first: String,
    /// The lines of the headers, without their ends.
    pub(super) headers: Vec<String>,
}

/// How the end of a body is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// This many bytes; 0 if there is no body.
    Length(u64),
    /// Chunks, each after its length.
    Chunked,
    /// The end of the connection.
    UntilClose,
}

/// For errors of a peer.
pub(super) fn bad(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, what.to_owned())
}

impl Head {
    /// Reads one. `None` if the connection ends before it.
    ///
    /// # Errors
    /// If the connection fails, or ends within the head, or the head is too long.
    pub(super) fn read(from: &mut impl BufRead) -> Result<Option<Self>> {
        let mut limited = from.take(LONGEST_HEAD);
        let mut lines = Vec::new();
        loop {
            let mut line = Vec::new();
            limited.read_until(b'\n', &mut line)?;
            match line.strip_suffix(b"\r\n").or_else(|| line.strip_suffix(b"\n")) {
                None if line.is_empty() && lines.is_empty() => return Ok(None),
                None => return Err(bad("a head ends too early or is too long")),
                Some([]) if lines.is_empty() => {} // An empty line before a request is allowed.
                Some([]) => break,
                Some(line) => lines.push(String::from_utf8_lossy(line).into_owned()),
            }
        }
        Ok(Some(Self { first: lines.remove(0), headers: lines }))
    }

    /// The bytes of the head.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut text = self.first.clone() + "\r\n";
        for line in &self.headers {
            text += line;
            text += "\r\n";
        }
        (text + "\r\n").into_bytes()
    }

    /// The value of a header, whose name is compared without case.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.trim().eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// Removes a header.
    pub(super) fn remove(&mut self, name: &str) {
        self.headers.retain(|line| {
            line.split_once(':').is_none_or(|(found, _)| !found.trim().eq_ignore_ascii_case(name))
        });
    }

    /// Word `index` of the first line; empty if there is none.
    pub(super) fn word(&self, index: usize) -> &str {
        self.first.split(' ').nth(index).unwrap_or("")
    }

    /// The status of an answer.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn status(&self) -> Result<u16> {
        self.word(1).parse().map_err(|_| bad("an answer without a status"))
    }

    fn framing(&self, otherwise: Framing) -> Result<Framing> {
        if let Some(coding) = self.header("transfer-encoding") {
            if coding.eq_ignore_ascii_case("chunked") {
                return Ok(Framing::Chunked);
            }
            return Err(bad("an unknown transfer coding"));
        }
        match self.header("content-length") {
            Some(length) => length.parse().map(Framing::Length).map_err(|_| bad("a bad length")),
            None => Ok(otherwise),
        }
    }

    /// The framing of a request's body.
    ///
    /// # Errors
    /// If it is not understood.
    pub(super) fn request_framing(&self) -> Result<Framing> {
        self.framing(Framing::Length(0))
    }

    /// The framing of the body of an answer to a request with this method.
    ///
    /// # Errors
    /// If it is not understood.
    pub(super) fn answer_framing(&self, method: &str) -> Result<Framing> {
        let status = self.status()?;
        if method == "HEAD" || status == 204 || status == 304 || status < 200 {
            return Ok(Framing::Length(0));
        }
        self.framing(Framing::UntilClose)
    }
}

/// Reads a body, and calls `pass` with its bytes, piece by piece. The bytes of chunked bodies
/// include the lengths of the chunks.
///
/// # Errors
/// If the connection fails or ends too early, or `pass` fails.
pub(super) fn copy_body(
    from: &mut impl BufRead, framing: Framing, pass: &mut impl FnMut(&mut [u8]) -> Result<()>,
) -> Result<()> {
    match framing {
        Framing::Length(length) => copy_exactly(from, length, pass),
        Framing::UntilClose => {
            let mut piece = vec![0; PIECE];
            loop {
                match from.read(&mut piece)? {
                    0 => return Ok(()),
                    count => pass(&mut piece[..count])?,
                }
            }
        }
        Framing::Chunked => loop {
            let mut line = read_line(from)?;
            let digits = String::from_utf8_lossy(&line);
            let digits = digits.split(';').next().unwrap_or("").trim();
            let length = u64::from_str_radix(digits, 16).map_err(|_| bad("a bad chunk"))?;
            pass(&mut line)?;
            if length > 0 {
                // The chunk, and the end of its line.
                copy_exactly(from, length.saturating_add(2), pass)?;
                continue;
            }
            // Trailers, until an empty line.
            loop {
                let mut line = read_line(from)?;
                pass(&mut line)?;
                if matches!(line.as_slice(), b"\r\n" | b"\n") {
                    return Ok(());
                }
            }
        },
    }
}

fn read_line(from: &mut impl BufRead) -> Result<Vec<u8>> {
    let mut line = Vec::new();
    from.take(LONGEST_HEAD).read_until(b'\n', &mut line)?;
    if line.ends_with(b"\n") { Ok(line) } else { Err(bad("a chunked body ends too early")) }
}

fn copy_exactly(
    from: &mut impl Read, mut left: u64, pass: &mut impl FnMut(&mut [u8]) -> Result<()>,
) -> Result<()> {
    let mut piece = vec![0; PIECE.min(left as usize)];
    while left > 0 {
        let most = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        match from.read(&mut piece[..most])? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => {
                pass(&mut piece[..count])?;
                left -= count as u64;
            }
        }
    }
    Ok(())
}
