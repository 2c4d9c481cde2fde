// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Steps of the guest and its VMM at the destination.

use super::guest::Guest;
use super::sides::Destination;
use crate::source::{Page, World, pages_of, ragged, some_pages, whole};
use pageferry_client::Punch;
use pageferry_tests::random::Random;

/// A thread of the guest touches a page, often one that another thread is just touching.
pub fn touch(chance: &mut Random, guest: &mut Guest, world: &World) {
    let Some(thread) = guest.idle() else { return };
    let touched: Vec<Page> = guest.touching().collect();
    let page = match touched.first() {
        Some(page) if chance.one_in(3) => *page,
        _ => {
            let (id, range) = some_pages(chance);
            (id, range.first)
        }
    };
    let writes = chance.one_in(3).then(|| world.model.lock().unwrap().stamp());
    guest.touch(thread, page, writes);
}

/// The guest discards pages. Returns them.
pub fn discard(chance: &mut Random, guest: &mut Guest, destination: &Destination) -> Vec<Page> {
    let (id, range) = some_pages(chance);
    let given = ragged(chance, id, range);
    let punch = if chance.one_in(4) { Punch::No } else { Punch::Yes };
    destination.client.discard(&[given], punch).unwrap();
    let pages: Vec<Page> = pages_of(id, range).collect();
    for page in &pages {
        let kept = punch == Punch::No && !destination.memory.is_hole(*page);
        let content = kept.then(|| destination.memory.stamp(*page));
        guest.discarded(*page, content);
    }
    pages
}

/// The guest populates pages.
pub fn populate(chance: &mut Random, guest: &mut Guest, destination: &Destination) {
    let (id, range) = some_pages(chance);
    let gained = pages_of(id, range).filter(|page| guest.is_discarded(*page)).count();
    assert_eq!(destination.client.populate(&[whole(id, range)]).unwrap(), gained as u64);
    pages_of(id, range).for_each(|page| guest.populated(page));
}

/// The guest frees pages, and may use them again at once.
pub fn free(chance: &mut Random, guest: &mut Guest, destination: &Destination) -> Vec<Page> {
    let (id, range) = some_pages(chance);
    let given = ragged(chance, id, range);
    destination.client.free(&[given]).unwrap();
    let pages: Vec<Page> = pages_of(id, range).collect();
    pages.iter().for_each(|page| guest.frees(*page));
    pages
}

/// A VMM may do this with memory that its guest gave back.
pub fn punch(chance: &mut Random, guest: &mut Guest, destination: &Destination) {
    let (id, range) = some_pages(chance);
    for page in pages_of(id, range).filter(|page| guest.is_discarded(*page)).collect::<Vec<_>>() {
        destination.memory.punch(page);
        guest.freed(page);
    }
}
