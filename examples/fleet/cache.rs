// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host's cache of extents: the one that was not used for longest is dropped first.

use crate::guests::Time;

/// No entry.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Entry {
    key: u32,
    /// When the store's answer is complete.
    ready: Time,
    older: u32,
    newer: u32,
}

/// Extents by number. Entries are a doubly linked list in the order of their last use.
#[derive(Debug)]
pub(crate) struct Cache {
    /// Index of the entry of each extent.
    places: Vec<u32>,
    entries: Vec<Entry>,
    most: usize,
    oldest: u32,
    newest: u32,
}

impl Cache {
    /// An empty cache of `most` extents, whose numbers are below `keys`.
    pub(crate) fn new(keys: usize, most: usize) -> Self {
        let entries = Vec::new();
        Self { places: vec![NONE; keys], entries, most: most.max(1), oldest: NONE, newest: NONE }
    }

    /// When the extent is complete, if the cache has it or fetches it. It is now the newest.
    pub(crate) fn find(&mut self, key: u32) -> Option<Time> {
        let place = self.places[key as usize];
        if place == NONE {
            return None;
        }
        self.unlink(place);
        self.link(place);
        Some(self.entries[place as usize].ready)
    }

    /// Adds an extent that the cache does not have.
    pub(crate) fn add(&mut self, key: u32, ready: Time) {
        let entry = Entry { key, ready, older: NONE, newer: NONE };
        let place = if self.entries.len() < self.most {
            self.entries.push(entry);
            self.entries.len() as u32 - 1
        } else {
            let place = self.oldest;
            self.unlink(place);
            self.places[self.entries[place as usize].key as usize] = NONE;
            self.entries[place as usize] = entry;
            place
        };
        self.places[key as usize] = place;
        self.link(place);
    }

    fn unlink(&mut self, place: u32) {
        let Entry { older, newer, .. } = self.entries[place as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.entries[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.entries[newer as usize].older = older,
        }
    }

    fn link(&mut self, place: u32) {
        let entry = &mut self.entries[place as usize];
        (entry.older, entry.newer) = (self.newest, NONE);
        match self.newest {
            NONE => self.oldest = place,
            newest => self.entries[newest as usize].newer = place,
        }
        self.newest = place;
    }
}
