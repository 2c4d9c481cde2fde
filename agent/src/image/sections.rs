// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sections of an image, written and read from their start to their end.
//!
//! In an image in plain text, a section has one checksum, in the header. A part of it must not be
//! used before the last part is read. In a sealed image, a section consists of pieces of
//! [`PIECE`] bytes, and each piece is followed by its seal. It is opened before it is handed out.
//!
//! Memory: one piece at a time, also of a state of the VMM that has a gigabyte.

use super::bytes::write_at;
use super::error::ImageFault;
use super::file::ImageFile;
use super::seal::{Sealer, Unsealer};
use pageferry_protocol::image::sealing::{PIECE, SEAL_SIZE};
use pageferry_protocol::image::{Place, Seal, Section, SectionKind};
use std::os::fd::BorrowedFd;
use zerocopy::{FromBytes, IntoBytes};

/// Size of a hole: parts of this size that are zero are not written.
const HOLE: usize = 4096;
/// Bytes of a piece in memory.
pub(super) const PART: usize = PIECE as usize;

/// A section that is written from its start to its end.
pub(super) struct SectionWriter<'a> {
    file: BorrowedFd<'a>,
    sealer: Option<&'a Sealer>,
    kind: SectionKind,
    /// The section as far as it is written.
    section: Section,
    digest: crc_fast::Digest,
    /// Number of pieces that were written.
    pieces: u64,
    /// The bytes that are written next.
    pub(super) bytes: Vec<u8>,
    /// Bytes that were written, without holes.
    written: u64,
}

impl<'a> SectionWriter<'a> {
    /// The section `kind`, which begins at `offset`. With a sealer it is sealed.
    pub(super) fn new(
        file: BorrowedFd<'a>, sealer: Option<&'a Sealer>, kind: SectionKind, offset: u64,
    ) -> Self {
        Self {
            file,
            sealer,
            kind,
            section: Section { offset, ..Section::default() },
            digest: crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi),
            pieces: 0,
            bytes: Vec::new(),
            written: 0,
        }
    }

    /// Writes those of `bytes` that fill a piece, and removes them.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn write_pieces(&mut self) -> Result<(), ImageFault> {
        while self.bytes.len() >= PART {
            let rest = self.bytes.split_off(PART);
            self.write_piece()?;
            self.bytes.extend_from_slice(&rest);
        }
        Ok(())
    }

    /// Writes the rest. Returns the section, and the bytes that were written, without holes.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn finish(mut self) -> Result<(Section, u64), ImageFault> {
        self.write_pieces()?;
        if !self.bytes.is_empty() {
            self.write_piece()?;
        }
        let checksum = if self.sealer.is_some() { 0 } else { self.digest.finalize() as u32 };
        Ok((Section { checksum, ..self.section }, self.written))
    }

    /// Writes all of `bytes` as one piece, and clears them.
    fn write_piece(&mut self) -> Result<(), ImageFault> {
        let start = self.section.offset + self.section.length;
        match self.sealer {
            None => self.write_with_holes(start)?,
            Some(sealer) => {
                let place = Place::Piece { section: self.kind, number: self.pieces };
                let seal = sealer.seal(place, &mut self.bytes)?;
                self.bytes.extend_from_slice(seal.as_bytes());
                write_at(self.file, &self.bytes, start)?;
                self.written += self.bytes.len() as u64;
            }
        }
        self.pieces += 1;
        self.section.length += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }

    /// Zeroes become holes: the section of a guest that is mostly empty is mostly zero.
    fn write_with_holes(&mut self, start: u64) -> Result<(), ImageFault> {
        for (at, part) in (start..).step_by(HOLE).zip(self.bytes.chunks(HOLE)) {
            if part.iter().fold(0, |sum, byte| sum | byte) != 0 {
                write_at(self.file, part, at)?;
                self.written += part.len() as u64;
            }
        }
        self.digest.update(&self.bytes);
        Ok(())
    }
}

/// Reads a section, and calls `each` with its content, at most [`PART`] bytes at a time; all but
/// the last part have as many. In plain text, the checksum is compared after the last part: until
/// this has returned, the caller must not use the parts. The parts of a sealed section are right.
///
/// # Errors
/// If the section cannot be read, or is damaged; and the errors of `each`.
pub(super) fn read_section(
    file: &ImageFile, unsealer: Option<&Unsealer>, kind: SectionKind, section: Section,
    mut each: impl FnMut(&[u8]) -> Result<(), ImageFault>,
) -> Result<(), ImageFault> {
    let seal_size = if unsealer.is_some() { SEAL_SIZE } else { 0 };
    let stride = PIECE + seal_size;
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    let mut bytes = vec![0; stride.min(section.length) as usize];
    for (number, offset) in (0..).zip((0..section.length).step_by(stride as usize)) {
        let part = &mut bytes[..stride.min(section.length - offset) as usize];
        let at = section.offset + offset;
        file.read_at(part, at).map_err(|fault| fault.in_section(kind))?;
        let Some(unsealer) = unsealer else {
            digest.update(part);
            each(part)?;
            continue;
        };
        let broken = || ImageFault::PieceSeal { section: kind.name(), at };
        let (content, seal) = Seal::mut_from_suffix(part).map_err(|_| broken())?;
        let place = Place::Piece { section: kind, number };
        unsealer.open(place, *seal, content).map_err(|_| broken())?;
        each(content)?;
    }
    if unsealer.is_some() { Ok(()) } else { check_sum(kind, section, digest.finalize() as u32) }
}

/// Compares the checksum of a section with the computed one.
fn check_sum(kind: SectionKind, section: Section, computed: u32) -> Result<(), ImageFault> {
    let Section { offset, length, checksum: found } = section;
    if found != computed {
        return Err(ImageFault::SectionChecksum {
            section: kind.name(),
            offset,
            length,
            found,
            computed,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::seal::ImageKey;
    use std::os::fd::{AsFd, OwnedFd};

    #[test]
    fn a_section_is_read_as_it_was_written_in_any_steps() {
        let key = ImageKey::parse(&[1; 32]).unwrap();
        for length in [0, 1, 5000, PART - 1, PART, PART + 1, 2 * PART + 77] {
            let content: Vec<u8> = (0..length).map(|at| (at / 3) as u8).collect();
            for sealer in [None, Some(Sealer::new(&key).unwrap())] {
                let file = tempfile::tempfile().unwrap();
                let kind = SectionKind::VmmState;
                let mut out = SectionWriter::new(file.as_fd(), sealer.as_ref(), kind, 4096);
                for part in content.chunks(length / 3 + 1) {
                    out.bytes.extend_from_slice(part);
                    out.write_pieces().unwrap();
                }
                let (section, _) = out.finish().unwrap();
                file.set_len(section.offset + section.length).unwrap();
                let file = ImageFile::from(OwnedFd::from(file));
                let unsealer = sealer.map(|sealer| Unsealer::new(&key, &sealer.salt()).unwrap());
                let mut found = Vec::new();
                let each = |part: &[u8]| {
                    assert_eq!(found.len() % PART, 0);
                    found.extend_from_slice(part);
                    Ok(())
                };
                read_section(&file, unsealer.as_ref(), kind, section, each).unwrap();
                assert!(found == content, "{length} bytes, sealed: {}", unsealer.is_some());
                if length > 0
                    && let Some(unsealer) = &unsealer
                {
                    let other = SectionKind::States;
                    let read = read_section(&file, Some(unsealer), other, section, |_| Ok(()));
                    assert!(matches!(read, Err(ImageFault::PieceSeal { at: 4096, .. })));
                }
            }
        }
    }
}
