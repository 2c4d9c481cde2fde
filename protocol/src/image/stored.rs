// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The index of an image in an object store, and the names of such images.
//!
//! An image in a store is the image file, cut into pieces of one size. The pieces are compressed,
//! and lie one after another in objects, the *packs*. The index says where each piece is. It is the
//! object with the name of the image. `docs/store.md` has all bytes.
//!
//! A piece without content is in no pack, and reads as zero.

use super::{ImageId, checksum};
use crate::control::codec::{DecodeError, Decoder, Encoder};

/// First bytes of an index.
pub const MAGIC: [u8; 8] = *b"PFstore\0";
/// The version that this crate reads and writes.
pub const VERSION: u32 = 1;
/// Smallest and largest size of a piece in bytes; a power of two.
pub const PIECE_SIZES: std::ops::RangeInclusive<u64> = 64 << 10..=16 << 20;
/// Longest file in bytes: the largest image file is shorter.
pub const MAX_LENGTH: u64 = 1 << 50;
/// Largest length of an index in bytes.
pub const MAX_SIZE: u64 = 1 << 30;
/// Longest name of a pack in bytes.
const MAX_NAME: usize = 2048;
/// Bytes before the packs.
const HEAD: usize = 64;
/// Bytes of a piece in the index.
const PIECE: usize = 48;
/// Fewest bytes of a pack in the index.
const PACK: usize = 5;

/// The schemes of names that are in a store and not files.
pub const SCHEMES: [&str; 9] = ["s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "file"];

/// True if `name` names an object in a store: `s3://BUCKET/NAME` and the like. Otherwise it is the
/// path of a file.
pub fn is_stored(name: &str) -> bool {
    name.split_once("://").is_some_and(|(scheme, _)| SCHEMES.contains(&scheme))
}

/// The scheme of `name`, if it has one and no store has it. Such a name is a mistake, and not the
/// path of a file.
pub fn unknown_scheme(name: &str) -> Option<&str> {
    let (scheme, _) = name.split_once("://")?;
    let is_word = scheme.bytes().all(|byte| byte.is_ascii_alphanumeric());
    (is_word && !is_stored(name)).then_some(scheme)
}

/// How a piece lies in its pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As it is.
    Plain = 1,
    /// One frame of zstd.
    Zstd = 2,
}

/// Where a piece with content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Its number: its offset in the file, divided by the size of pieces.
    pub number: u64,
    /// Index of its pack.
    pub pack: u32,
    /// How it lies there.
    pub form: Form,
    /// Its offset in the pack in bytes.
    pub offset: u64,
    /// Its length in the pack in bytes.
    pub length: u32,
    /// The first half of the SHA-256 of its content.
    pub hash: [u8; 16],
}

/// The index of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// The id in the header of the image.
    pub image: ImageId,
    /// The upload that has written it.
    pub upload: [u8; 16],
    /// Length of the image file in bytes.
    pub length: u64,
    /// Size of a piece in bytes. The last one of the file is shorter if the file ends within it.
    pub piece_size: u64,
    /// The names of the packs, in the folder `NAME.parts` beside the name of the image.
    pub packs: Vec<String>,
    /// The pieces that have content, in the order of their numbers.
    pub pieces: Vec<Piece>,
}

/// Why bytes are not an index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// It is another kind of object.
    #[error("the object is not an image of pageferry")]
    Magic,
    /// It is damaged.
    #[error("index: checksum is {found:#010x}, that of its bytes is {computed:#010x}")]
    Checksum {
        /// As written.
        found: u32,
        /// Of the bytes.
        computed: u32,
    },
    /// A field is wrong.
    #[error("index")]
    Field(#[from] DecodeError),
}

impl Index {
    /// Number of pieces of the file, with and without content.
    pub fn count(&self) -> u64 {
        self.length.div_ceil(self.piece_size)
    }

    /// Length of the content of piece `number` in bytes.
    pub fn content_length(&self, number: u64) -> u64 {
        self.length.saturating_sub(number * self.piece_size).min(self.piece_size)
    }

    /// The piece `number`; `None` if it has no content.
    pub fn find(&self, number: u64) -> Option<&Piece> {
        let at = self.pieces.binary_search_by_key(&number, |piece| piece.number).ok()?;
        self.pieces.get(at)
    }

    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let head = Encoder::new().bytes(&MAGIC).u32(VERSION).u32(self.piece_size as u32);
        let head = head.u64(self.length).bytes(&self.image).bytes(&self.upload);
        let head = head.u32(self.packs.len() as u32).u32(0);
        let packs = self.packs.iter().fold(head, |encoder, name| encoder.text(name));
        let piece = |encoder: Encoder, piece: &Piece| {
            let encoder = encoder.u64(piece.number).u32(piece.pack).u32(piece.form as u32);
            encoder.u64(piece.offset).u32(piece.length).u32(0).bytes(&piece.hash)
        };
        let mut bytes = self.pieces.iter().fold(packs, piece).finish();
        bytes.extend_from_slice(&checksum(&bytes).to_le_bytes());
        bytes
    }

    /// Decodes an index. What it returns is consistent: every piece lies in the file and in a pack
    /// that has a name.
    ///
    /// # Errors
    /// What is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, IndexError> {
        let mut decoder = Decoder::new(bytes);
        if decoder.array("magic")? != MAGIC {
            return Err(IndexError::Magic);
        }
        let checked = bytes.len().saturating_sub(4).max(HEAD.min(bytes.len()));
        let found = Decoder::new(&bytes[checked..]).u32("checksum")?;
        let computed = checksum(&bytes[..checked]);
        if found != computed {
            return Err(IndexError::Checksum { found, computed });
        }
        let mut decoder = Decoder::new(&bytes[MAGIC.len()..checked]);
        let version = decoder.u32("version")?;
        check("version", version.into(), version == VERSION, "1")?;
        let piece_size = u64::from(decoder.u32("piece size")?);
        let is_allowed = piece_size.is_power_of_two() && PIECE_SIZES.contains(&piece_size);
        check("piece size", piece_size, is_allowed, "powers of two, 64 KiB to 16 MiB")?;
        let length = decoder.u64("length")?;
        check("length", length, (1..=MAX_LENGTH).contains(&length), "1 to 2^50")?;
        let (image, upload) = (decoder.array("image")?, decoder.array("upload")?);
        let count = decoder.u32("packs")?;
        decoder.u32("zero")?;
        let fits = count as usize <= decoder.remaining() / PACK;
        check("packs", count.into(), fits, "as many as the index holds")?;
        let mut packs = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let name = decoder.text("name of a pack", MAX_NAME)?.to_owned();
            check("name of a pack", 0, !name.is_empty(), "1 to 2048 bytes")?;
            packs.push(name);
        }
        let rest = decoder.remaining();
        check("length of the pieces", rest as u64, rest.is_multiple_of(PIECE), "multiples of 48")?;
        let mut index = Self { image, upload, length, piece_size, packs, pieces: Vec::new() };
        index.pieces.reserve_exact(rest / PIECE);
        for _ in 0..rest / PIECE {
            let piece = index.decode_piece(&mut decoder)?;
            index.pieces.push(piece);
        }
        Ok(index)
    }

    fn decode_piece(&self, decoder: &mut Decoder<'_>) -> Result<Piece, DecodeError> {
        let number = decoder.u64("piece")?;
        let next = self.pieces.last().map_or(0, |last| last.number + 1);
        let is_next = number >= next && number < self.count();
        check("piece", number, is_next, "after the one before it, and in the file")?;
        let pack = decoder.u32("pack")?;
        let is_named = (pack as usize) < self.packs.len();
        check("pack", pack.into(), is_named, "those that have a name")?;
        let form = match decoder.u32("form")? {
            1 => Form::Plain,
            2 => Form::Zstd,
            value => {
                let (field, value) = ("form", value.into());
                return Err(DecodeError::InvalidValue { field, value, allowed: "1 plain, 2 zstd" });
            }
        };
        let (offset, length) = (decoder.u64("offset")?, decoder.u32("length in the pack")?);
        check("offset", offset, offset <= MAX_LENGTH, "at most 2^50")?;
        decoder.u32("zero")?;
        // What is compressed is kept only if it got shorter.
        let content = self.content_length(number);
        let fits = match form {
            Form::Plain => u64::from(length) == content,
            Form::Zstd => length > 0 && u64::from(length) <= content,
        };
        check("length in the pack", length.into(), fits, "at most that of the piece")?;
        Ok(Piece { number, pack, form, offset, length, hash: decoder.array("hash")? })
    }
}

fn check(
    field: &'static str, value: u64, is_allowed: bool, allowed: &'static str,
) -> Result<(), DecodeError> {
    if is_allowed { Ok(()) } else { Err(DecodeError::InvalidValue { field, value, allowed }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_told_from_a_file_by_the_scheme() {
        for name in ["s3://bucket/image", "gs://b/i", "az://c/i", "file:///images/i"] {
            assert!(is_stored(name), "{name}");
        }
        for path in ["/images/s3:/a", "guest.img", "s3:/bucket/image", "ftp://host/image", ""] {
            assert!(!is_stored(path), "{path}");
        }
    }

    fn index() -> Index {
        let piece = |number, form, length| Piece {
            number,
            pack: 0,
            form,
            offset: 7,
            length,
            hash: [number as u8; 16],
        };
        Index {
            image: [1; 16],
            upload: [2; 16],
            length: (5 << 20) + 1,
            piece_size: 1 << 20,
            packs: vec!["1/0".into()],
            pieces: vec![
                piece(0, Form::Zstd, 9),
                piece(2, Form::Plain, 1 << 20),
                piece(5, Form::Plain, 1),
            ],
        }
    }

    #[test]
    fn an_index_survives_its_bytes_and_finds_its_pieces() {
        let index = index();
        assert_eq!(Index::decode(&index.encode()).unwrap(), index);
        assert_eq!((index.count(), index.content_length(5), index.content_length(6)), (6, 1, 0));
        assert_eq!(index.find(2), index.pieces.get(1));
        assert_eq!(index.find(3), None);
    }

    #[test]
    fn what_is_inconsistent_is_refused_with_the_field() {
        let refused = |change: &dyn Fn(&mut Index)| {
            let mut index = index();
            change(&mut index);
            let IndexError::Field(error) = Index::decode(&index.encode()).unwrap_err() else {
                panic!("a field");
            };
            error.to_string()
        };
        type Change<'a> = &'a dyn Fn(&mut Index);
        let cases: [(Change<'_>, &str); 8] = [
            (&|index| index.piece_size = 3 << 20, "piece size"),
            (&|index| index.length = 0, "length"),
            (&|index| index.pieces[1].number = 0, "piece is 0x0"),
            (&|index| index.pieces[2].number = 6, "piece is 0x6"),
            (&|index| index.pieces[0].pack = 1, "pack is 0x1"),
            (&|index| index.pieces[1].length -= 1, "length in the pack"),
            (&|index| index.pieces[0].length = 0, "length in the pack"),
            (&|index| index.packs[0].clear(), "name of a pack"),
        ];
        for (change, field) in cases {
            let error = refused(change);
            assert!(error.starts_with(field), "{error}");
        }
        let mut bytes = index().encode();
        bytes[20] ^= 1;
        assert!(matches!(Index::decode(&bytes), Err(IndexError::Checksum { .. })));
        assert_eq!(Index::decode(b"PFimage\0 and more"), Err(IndexError::Magic));
    }
}
