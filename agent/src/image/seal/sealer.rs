// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Seals what is written to an image, and opens what is read from one.
//!
//! No nonce is used twice with one key ([`sealed-once`](crate::invariants#sealed-once)): a
//! [`Sealer`] makes its own random salt, so it has keys that nobody else has, and it numbers its
//! nonces itself. All threads that write an image share one sealer, and each takes as many numbers
//! as it has pages. An [`Unsealer`] has the keys of an image that exists, and cannot seal.

use super::key::ImageKey;
use super::wiped::Wiped;
use crate::image::bytes::random;
use crate::image::error::ImageFault;
use pageferry_protocol::image::sealing::{MAC_SIZE, SALT_SIZE, TAG_SIZE};
use pageferry_protocol::image::{Place, Seal};
use pageferry_protocol::memory::PAGE_SIZE;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, Tag, UnboundKey};
use ring::error::Unspecified;
use ring::{hkdf, hmac};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the key of pages and pieces is derived for.
const CIPHER: &[u8] = b"pageferry image 1: pages and sections";
/// What the key of the header is derived for.
const HEADER: &[u8] = b"pageferry image 1: header";

/// The keys of one image.
struct Keys {
    cipher: Wiped<LessSafeKey>,
    header: Wiped<hmac::Key>,
}

impl Keys {
    fn derive(key: &ImageKey, salt: &[u8; SALT_SIZE]) -> Result<Self, Unspecified> {
        let secret = Wiped::new(hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(key.bytes()));
        let cipher = UnboundKey::from(secret.expand(&[CIPHER], &AES_256_GCM)?);
        let header = hmac::Key::from(secret.expand(&[HEADER], hmac::HMAC_SHA256)?);
        Ok(Self { cipher: Wiped::new(LessSafeKey::new(cipher)), header: Wiped::new(header) })
    }
}

/// The library refuses only what is longer than any page or piece, so nobody should see this.
fn refused(_: Unspecified) -> ImageFault {
    ImageFault::Cipher
}

/// The nonce with this number.
fn nonce(number: [u8; 8]) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[NONCE_LEN - number.len()..].copy_from_slice(&number);
    Nonce::assume_unique_for_key(nonce)
}

/// Seals the parts of a new image.
pub struct Sealer {
    keys: Keys,
    salt: [u8; SALT_SIZE],
    /// The number of the next nonce.
    next: AtomicU64,
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").field("next", &self.next).finish_non_exhaustive()
    }
}

impl Sealer {
    /// A sealer with a salt, and thereby with keys, of its own.
    ///
    /// # Errors
    /// If the kernel gives no random bytes.
    pub fn new(key: &ImageKey) -> Result<Self, ImageFault> {
        let salt = random()?;
        let keys = Keys::derive(key, &salt).map_err(refused)?;
        Ok(Self { keys, salt, next: AtomicU64::new(1) })
    }

    /// Its salt.
    pub fn salt(&self) -> [u8; SALT_SIZE] {
        self.salt
    }

    /// Seals `bytes`, which keep their length.
    ///
    /// # Errors
    /// If the library refuses.
    pub fn seal(&self, place: Place, bytes: &mut [u8]) -> Result<Seal, ImageFault> {
        // Relaxed is enough: only the numbers must differ.
        self.seal_as(self.next.fetch_add(1, Ordering::Relaxed), place, bytes)
    }

    /// Seals consecutive pages of a block, from page `first` on, and adds their seals to `seals`.
    ///
    /// # Errors
    /// If the library refuses.
    pub fn seal_pages(
        &self, block: u32, first: u64, bytes: &mut [u8], seals: &mut [Seal],
    ) -> Result<(), ImageFault> {
        let numbers = self.next.fetch_add(seals.len() as u64, Ordering::Relaxed)..;
        let pages = bytes.chunks_exact_mut(PAGE_SIZE as usize).zip(seals);
        for ((number, page), (bytes, seal)) in numbers.zip(first..).zip(pages) {
            *seal = self.seal_as(number, Place::Page { block, page }, bytes)?;
        }
        Ok(())
    }

    fn seal_as(&self, number: u64, place: Place, bytes: &mut [u8]) -> Result<Seal, ImageFault> {
        let (number, covered) = (number.to_le_bytes(), Aad::from(place.to_bytes()));
        let tag = self.keys.cipher.seal_in_place_separate_tag(nonce(number), covered, bytes);
        let mut seal = Seal { nonce: number, ..Seal::NONE };
        seal.tag.copy_from_slice(tag.map_err(refused)?.as_ref());
        Ok(seal)
    }

    /// The MAC of these bytes of the header.
    pub fn sign(&self, header: &[u8]) -> [u8; MAC_SIZE] {
        let mut mac = [0; MAC_SIZE];
        mac.copy_from_slice(hmac::sign(&self.keys.header, header).as_ref());
        mac
    }
}

/// Opens the parts of an image.
pub struct Unsealer(Keys);

impl fmt::Debug for Unsealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Unsealer(..)")
    }
}

/// What was sealed is something else, or was sealed for another place or with another key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BrokenSeal;

impl Unsealer {
    /// An unsealer of the image with this salt.
    ///
    /// # Errors
    /// If the library refuses.
    pub fn new(key: &ImageKey, salt: &[u8; SALT_SIZE]) -> Result<Self, ImageFault> {
        Keys::derive(key, salt).map(Self).map_err(refused)
    }

    /// Opens `bytes`, which keep their length. If the seal is broken, nothing of them may be used.
    ///
    /// # Errors
    /// If the seal is broken.
    pub fn open(&self, place: Place, seal: Seal, bytes: &mut [u8]) -> Result<(), BrokenSeal> {
        let (covered, tag) = (Aad::from(place.to_bytes()), Tag::from(seal.tag));
        let nonce = nonce(seal.nonce);
        let opened = self.0.cipher.open_in_place_separate_tag(nonce, covered, tag, bytes, 0..);
        opened.map(drop).map_err(|_| BrokenSeal)
    }

    /// True if `mac` is the MAC of these bytes of the header. Takes the same time for any MAC.
    pub fn has_signed(&self, header: &[u8], mac: &[u8; MAC_SIZE]) -> bool {
        hmac::verify(&self.0.header, header, mac).is_ok()
    }
}

const _: () = assert!(TAG_SIZE == ring::aead::MAX_TAG_LEN);

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    fn key(byte: u8) -> ImageKey {
        ImageKey::parse(&[byte; 32]).unwrap()
    }

    const HERE: Place = Place::Page { block: 3, page: 7 };

    #[test]
    fn what_was_sealed_is_opened_only_at_its_place_and_with_its_key() {
        let sealer = Sealer::new(&key(1)).unwrap();
        let mut sealed = *b"what the guest knows";
        let seal = sealer.seal(HERE, &mut sealed).unwrap();
        assert_ne!(&sealed, b"what the guest knows");
        let open = |unsealer: &Unsealer, place, seal, mut bytes: [u8; 20]| {
            unsealer.open(place, seal, &mut bytes).map(|()| bytes)
        };
        let unsealer = Unsealer::new(&key(1), &sealer.salt()).unwrap();
        assert_eq!(open(&unsealer, HERE, seal, sealed), Ok(*b"what the guest knows"));
        let elsewhere = Place::Page { block: 3, page: 8 };
        assert_eq!(open(&unsealer, elsewhere, seal, sealed), Err(BrokenSeal));
        for bit in 0..sealed.len() * 8 {
            let mut changed = sealed;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&unsealer, HERE, seal, changed), Err(BrokenSeal));
        }
        let mut other = seal;
        other.nonce[0] ^= 1;
        assert_eq!(open(&unsealer, HERE, other, sealed), Err(BrokenSeal));
        let mut other = seal;
        other.tag[15] ^= 1;
        assert_eq!(open(&unsealer, HERE, other, sealed), Err(BrokenSeal));
        assert_eq!(open(&unsealer, HERE, Seal::NONE, sealed), Err(BrokenSeal));
        let others =
            [Unsealer::new(&key(2), &sealer.salt()), Unsealer::new(&key(1), &[0; SALT_SIZE])];
        for other in others.map(Result::unwrap) {
            assert_eq!(open(&other, HERE, seal, sealed), Err(BrokenSeal));
        }
    }

    #[test]
    fn the_mac_is_that_of_the_key_and_the_bytes() {
        let sealer = Sealer::new(&key(1)).unwrap();
        let mac = sealer.sign(b"header");
        let unsealer = Unsealer::new(&key(1), &sealer.salt()).unwrap();
        assert!(unsealer.has_signed(b"header", &mac) && !unsealer.has_signed(b"Header", &mac));
        assert!(!Unsealer::new(&key(2), &sealer.salt()).unwrap().has_signed(b"header", &mac));
    }

    #[test]
    fn no_nonce_comes_twice_from_any_number_of_threads() {
        let sealer = Sealer::new(&key(1)).unwrap();
        let found = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (sealer, found) = (&sealer, &found);
                scope.spawn(move || {
                    for count in 1..20 {
                        let mut bytes = vec![7; count * PAGE_SIZE as usize];
                        let mut seals = vec![Seal::NONE; count];
                        sealer.seal_pages(thread, 5, &mut bytes, &mut seals).unwrap();
                        seals.push(sealer.seal(HERE, &mut [1]).unwrap());
                        found.lock().unwrap().extend(seals.iter().map(|seal| seal.nonce));
                    }
                });
            }
        });
        let found = found.into_inner().unwrap();
        assert_eq!(found.iter().collect::<BTreeSet<_>>().len(), found.len());
        assert!(!found.contains(&[0; 8]), "what a page without content has");
    }

    #[test]
    fn images_of_one_key_have_different_keys() {
        let (one, other) = (Sealer::new(&key(1)).unwrap(), Sealer::new(&key(1)).unwrap());
        let (mut first, mut second) = ([0; 32], [0; 32]);
        let seals = [one.seal(HERE, &mut first).unwrap(), other.seal(HERE, &mut second).unwrap()];
        assert_eq!(seals[0].nonce, seals[1].nonce);
        assert_ne!(first, second);
        // Derived as `docs/image.md` says, whatever the library calls it.
        let salt = one.salt();
        let secret = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &salt), &[1; 32]);
        let secret = hmac::Key::new(hmac::HMAC_SHA256, secret.as_ref());
        let header = hmac::sign(&secret, &[HEADER, &[1]].concat());
        let header = hmac::Key::new(hmac::HMAC_SHA256, header.as_ref());
        assert_eq!(hmac::sign(&header, b"x").as_ref(), one.sign(b"x"));
        let cipher = hmac::sign(&secret, &[CIPHER, &[1]].concat());
        let cipher = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, cipher.as_ref()).unwrap());
        let covered = Aad::from(HERE.to_bytes());
        let tag = Tag::from(seals[0].tag);
        let mut number = [0; 12];
        number[4] = 1;
        let number = Nonce::assume_unique_for_key(number);
        cipher.open_in_place_separate_tag(number, covered, tag, &mut first, 0..).unwrap();
        assert_eq!(first, [0; 32]);
    }
}
