// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who may wait at the migration port, and who has to leave for that.
//!
//! Everybody who can reach the port may connect, as often as they like. A new connection always
//! gets a place: if there is none, another connection is closed. This file decides which one, and
//! whose bytes are looked at next. There are four kinds of connections, each with its own places
//! ([`Limits`]), so that none of a kind takes the place of one of the next:
//!
//! - *Silent strangers* have sent nothing that was looked at. Each costs a descriptor.
//! - *Begun strangers* have sent a part of a hello, or of a handshake of TLS.
//! - *Answered strangers* have begun a proper handshake of TLS, and this side has answered.
//! - *Known peers* have proved something: over `tls:` a certificate, over `tcp:` and `unix:` a
//!   hello. They wait for the other streams of their session.
//!
//! If a stranger has to leave, it is one from the origin with the most strangers of its kind
//! ([`Origin`]: an IPv4 address, or a network of IPv6), and of these the one that is here for
//! longest. If a known peer has to leave, it is a stream without its primary, or else the one that
//! is here for longest. (A source connects its primary first, and says hello on it.)
//!
//! A handshake of TLS costs the processor as much as ten connections. So the bytes of strangers are
//! looked at one connection after the other, between looks at the listener:
//!
//! 1. those of known peers,
//! 2. those of answered strangers,
//! 3. those of silent and of begun strangers in turn; of each kind those from the origin with the
//!    fewest, and of these those of the newest.
//!
//! A source sends its first bytes together with the connection, and a crowd that came before does
//! not delay a newer connection. So a source gets in however many others wait. Only a flood from
//! the very address of the source, or from thousands of addresses at once, of new connections that
//! each begin a proper handshake, faster than this processor answers them, can push a source out.
//! The source then connects again at once, for some seconds (`outgoing/reach.rs`).
//!
//! There is room for many silent strangers, because each that is closed connects again: while those
//! are held, the queue of the listener is short, in which the source waits, too.
//!
//! Strangers also have a time limit, whether their place is needed or not ([`HELLO_TIME`]).

use rustix::process::{Resource, getrlimit};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// How long a stranger may take for its whole hello, with the handshake of TLS. If `peer_timeout`
/// is shorter, that is the limit. The largest hello takes 3 seconds on the slowest link that is
/// supported.
pub const HELLO_TIME: Duration = Duration::from_secs(10);

/// Most silent strangers: as many as the queue of a listener.
const MAX_SILENT: usize = 4096;
/// Most begun strangers, and most answered ones: those of a third of a second, if this side answers
/// three every millisecond. A source on a slow link needs a round trip for its part.
const MAX_BEGUN: usize = 1024;
/// Most known peers: the streams of four sources, if each has as many as allowed.
const MAX_KNOWN: usize = 256;

/// Most connections of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most silent strangers.
    pub silent: usize,
    /// Most begun strangers, and most answered ones.
    pub begun: usize,
    /// Most known peers.
    pub known: usize,
}

impl Limits {
    /// The limits of this process. They use at most five eighths of its descriptors; the rest is
    /// for the VMM's memory, for operators and for the migration itself.
    pub fn of_this_process() -> Self {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let share = usize::try_from(descriptors / 8).unwrap_or(usize::MAX);
        Self {
            silent: (share.saturating_mul(2)).clamp(8, MAX_SILENT),
            begun: share.clamp(8, MAX_BEGUN),
            known: share.clamp(8, MAX_KNOWN),
        }
    }
}

/// Where a connection comes from. Connections of one origin share what there is for strangers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// This host, over a UNIX socket; or the VMM handed the socket over.
    Local,
    /// An IPv4 address.
    V4([u8; 4]),
    /// The first 64 bits of an IPv6 address: one host may use all addresses of such a network.
    V6([u8; 8]),
}

/// Behind "a source".
impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => formatter.write_str("on this host"),
            Self::V4(octets) => write!(formatter, "at {}", Ipv4Addr::from(*octets)),
            Self::V6(network) => {
                let mut octets = [0; 16];
                octets[..8].copy_from_slice(network);
                write!(formatter, "in {}/64", Ipv6Addr::from(octets))
            }
        }
    }
}

impl From<SocketAddr> for Origin {
    fn from(address: SocketAddr) -> Self {
        match address.ip().to_canonical() {
            IpAddr::V4(address) => Self::V4(address.octets()),
            IpAddr::V6(address) => {
                let mut network = [0; 8];
                network.copy_from_slice(&address.octets()[..8]);
                Self::V6(network)
            }
        }
    }
}

/// How far a connection has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// It has sent nothing that was looked at.
    Silent,
    /// It has sent something, and not enough for an answer.
    Begun,
    /// This side has answered its handshake of TLS.
    Answered,
    /// It is no stranger any more.
    Known,
}

/// The strangers of one origin.
#[derive(Debug, Default)]
struct Crowd {
    all: BTreeSet<u64>,
    /// Those which have sent something that was not looked at.
    ready: BTreeSet<u64>,
}

/// The strangers of one kind.
#[derive(Debug, Default)]
struct Strangers {
    crowds: BTreeMap<Origin, Crowd>,
    count: usize,
}

impl Strangers {
    fn add(&mut self, origin: Origin, number: u64) {
        self.crowds.entry(origin).or_default().all.insert(number);
        self.count += 1;
    }

    fn remove(&mut self, origin: Origin, number: u64) {
        let Some(crowd) = self.crowds.get_mut(&origin) else { return };
        crowd.all.remove(&number);
        crowd.ready.remove(&number);
        if crowd.all.is_empty() {
            self.crowds.remove(&origin);
        }
        self.count -= 1;
    }

    fn set_ready(&mut self, origin: Origin, number: u64) {
        if let Some(crowd) = self.crowds.get_mut(&origin) {
            crowd.ready.insert(number);
        }
    }

    /// The one that leaves first.
    fn first_to_leave(&self) -> Option<u64> {
        let crowd =
            self.crowds.values().max_by_key(|crowd| (crowd.all.len(), Reverse(crowd.all.first())));
        crowd?.all.first().copied()
    }

    /// The one that leaves before another is added, if there may be so many.
    fn leaves_for_one_more(&self, limit: usize) -> Option<u64> {
        if self.count >= limit { self.first_to_leave() } else { None }
    }

    /// The one whose bytes are looked at first. It is not ready any more.
    fn next_ready(&mut self) -> Option<u64> {
        let crowds = self.crowds.values_mut().filter(|crowd| !crowd.ready.is_empty());
        let first = |crowd: &&mut Crowd| (Reverse(crowd.all.len()), crowd.ready.last().copied());
        crowds.max_by_key(first)?.ready.pop_last()
    }

    fn has_ready(&self) -> bool {
        self.crowds.values().any(|crowd| !crowd.ready.is_empty())
    }
}

#[derive(Debug)]
struct Entry<T> {
    origin: Origin,
    stage: Stage,
    connection: T,
}

/// The connections that are not part of a migration yet. Each has a number; those of later
/// connections are higher.
#[derive(Debug)]
pub struct Gate<T> {
    limits: Limits,
    entries: BTreeMap<u64, Entry<T>>,
    silent: Strangers,
    begun: Strangers,
    answered: Strangers,
    known: BTreeSet<u64>,
    ready_known: BTreeSet<u64>,
    /// Whose turn it is to be looked at: that of begun strangers, or that of silent ones.
    is_turn_of_begun: bool,
    next: u64,
}

impl<T> Gate<T> {
    /// No connections. Their numbers begin with `first`.
    pub fn new(limits: Limits, first: u64) -> Self {
        let (entries, silent, begun, answered, known, ready_known) = Default::default();
        let (is_turn_of_begun, next) = (false, first);
        Self {
            limits,
            entries,
            silent,
            begun,
            answered,
            known,
            ready_known,
            is_turn_of_begun,
            next,
        }
    }

    /// Adds a connection. Returns its number, and the connection that has to leave for it.
    pub fn admit(&mut self, origin: Origin, connection: T) -> (u64, Option<T>) {
        let leaves = self.silent.leaves_for_one_more(self.limits.silent);
        let leaves = leaves.and_then(|number| self.remove(number));
        let number = self.next;
        self.next += 1;
        self.entries.insert(number, Entry { origin, stage: Stage::Silent, connection });
        self.silent.add(origin, number);
        (number, leaves)
    }

    /// Removes the stranger that can best be done without.
    pub fn evict_stranger(&mut self) -> Option<T> {
        let kinds = [&self.silent, &self.begun, &self.answered];
        let leaves = kinds.into_iter().find_map(Strangers::first_to_leave)?;
        self.remove(leaves)
    }

    /// Where a connection comes from. `None` if it has left.
    pub fn origin(&self, number: u64) -> Option<Origin> {
        self.entries.get(&number).map(|entry| entry.origin)
    }

    /// Removes a connection. `None` if it has left before.
    pub fn remove(&mut self, number: u64) -> Option<T> {
        let Entry { origin, stage, connection } = self.entries.remove(&number)?;
        self.forget(origin, stage, number);
        Some(connection)
    }

    /// The strangers of a stage; `None` for known peers.
    fn strangers(&mut self, stage: Stage) -> Option<&mut Strangers> {
        match stage {
            Stage::Silent => Some(&mut self.silent),
            Stage::Begun => Some(&mut self.begun),
            Stage::Answered => Some(&mut self.answered),
            Stage::Known => None,
        }
    }

    fn forget(&mut self, origin: Origin, stage: Stage, number: u64) {
        match self.strangers(stage) {
            Some(strangers) => strangers.remove(origin, number),
            None => {
                self.known.remove(&number);
                self.ready_known.remove(&number);
            }
        }
    }

    /// Notes that a connection has sent something, or was closed.
    pub fn set_ready(&mut self, number: u64) {
        let Some(Entry { origin, stage, .. }) = self.entries.get(&number) else { return };
        let (origin, stage) = (*origin, *stage);
        match self.strangers(stage) {
            Some(strangers) => strangers.set_ready(origin, number),
            None => drop(self.ready_known.insert(number)),
        }
    }

    /// The connection to look at next. It is not ready any more.
    pub fn next_ready(&mut self) -> Option<u64> {
        if let Some(known) = self.ready_known.pop_first() {
            return Some(known);
        }
        self.is_turn_of_begun = !self.is_turn_of_begun;
        let (first, second) = match self.is_turn_of_begun {
            true => (&mut self.begun, &mut self.silent),
            false => (&mut self.silent, &mut self.begun),
        };
        let answered = self.answered.next_ready();
        answered.or_else(|| first.next_ready()).or_else(|| second.next_ready())
    }

    /// True if there is a connection to look at.
    pub fn has_ready(&self) -> bool {
        let mut kinds = [&self.silent, &self.begun, &self.answered].into_iter();
        !self.ready_known.is_empty() || kinds.any(Strangers::has_ready)
    }

    /// Notes how far a connection has got. Returns the one that has to leave for it, if there is no
    /// place for one more; of known peers first one for which `is_spare` is true.
    pub fn reach(
        &mut self, number: u64, stage: Stage, is_spare: impl Fn(&Self, &T) -> bool,
    ) -> Option<T> {
        let entry = self.entries.get_mut(&number)?;
        let (origin, before) = (entry.origin, std::mem::replace(&mut entry.stage, stage));
        if before == stage {
            return None;
        }
        self.forget(origin, before, number);
        let Limits { silent, begun, known } = self.limits;
        let limit = if stage == Stage::Silent { silent } else { begun };
        let leaves = match self.strangers(stage) {
            Some(strangers) => {
                let leaves = strangers.leaves_for_one_more(limit);
                strangers.add(origin, number);
                leaves
            }
            None => {
                let is_full = self.known.len() >= known;
                let leaves = if is_full { self.known_to_leave(is_spare) } else { None };
                self.known.insert(number);
                leaves
            }
        };
        self.remove(leaves?)
    }

    /// The known peer that leaves for another one.
    fn known_to_leave(&self, is_spare: impl Fn(&Self, &T) -> bool) -> Option<u64> {
        let spare = self.known().find(|(_, connection)| is_spare(self, connection));
        spare.or_else(|| self.known().next()).map(|(number, _)| number)
    }

    /// A connection.
    pub fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        Some(&mut self.entries.get_mut(&number)?.connection)
    }

    /// The known peers and their numbers, the oldest first.
    pub fn known(&self) -> impl DoubleEndedIterator<Item = (u64, &T)> {
        self.known
            .iter()
            .filter_map(|number| Some((*number, &self.entries.get(number)?.connection)))
    }

    /// True if there are no connections.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All connections and their numbers, the oldest first.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Stage, &T)> {
        self.entries.iter().map(|(number, entry)| (*number, entry.stage, &entry.connection))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { silent: 4, begun: 2, known: 2 };
    const CROWD: Origin = Origin::V4([10, 0, 0, 9]);
    const SOURCE: Origin = Origin::V4([10, 0, 0, 1]);

    fn gate() -> Gate<&'static str> {
        Gate::new(LIMITS, 100)
    }

    fn never(_: &Gate<&'static str>, _: &&'static str) -> bool {
        false
    }

    #[test]
    fn the_oldest_of_the_largest_crowd_leaves_first() {
        let mut gate = gate();
        assert_eq!(gate.admit(SOURCE, "source"), (100, None));
        for name in ["a", "b", "c"] {
            assert_eq!(gate.admit(CROWD, name).1, None);
        }
        assert_eq!(gate.admit(CROWD, "d").1, Some("a"));
        assert_eq!(gate.admit(SOURCE, "source, too").1, Some("b"));
        // Now both crowds are equal.
        assert_eq!(gate.admit(CROWD, "e").1, Some("source"));
        assert_eq!(gate.evict_stranger(), Some("c"));
    }

    #[test]
    fn strangers_take_the_place_of_their_own_kind_only() {
        let mut gate = gate();
        let (source, _) = gate.admit(SOURCE, "source");
        assert_eq!(gate.reach(source, Stage::Answered, never), None);
        for number in 0..100 {
            for origin in [SOURCE, Origin::V6([number; 8])] {
                let (stranger, leaves) = gate.admit(origin, "stranger");
                assert_ne!(leaves, Some("source"));
                assert_ne!(gate.reach(stranger, Stage::Begun, never), Some("source"));
            }
        }
        // But strangers that were answered, too, from the same address.
        let [first, second] = ["first", "second"].map(|name| gate.admit(SOURCE, name).0);
        assert_eq!(gate.reach(first, Stage::Answered, never), None);
        assert_eq!(gate.reach(second, Stage::Answered, never), Some("source"));
    }

    #[test]
    fn the_newest_of_the_smallest_crowd_is_looked_at_first() {
        let mut gate = gate();
        let [old, new, answered] = ["old", "new", "answered"].map(|name| gate.admit(CROWD, name).0);
        let (source, _) = gate.admit(SOURCE, "source");
        gate.reach(answered, Stage::Answered, never);
        for number in [old, new, answered, source] {
            gate.set_ready(number);
        }
        let order: Vec<_> = std::iter::from_fn(|| gate.next_ready()).collect();
        assert_eq!(order, [answered, source, new, old]);
        // Begun and silent ones take turns.
        gate.reach(old, Stage::Begun, never);
        gate.reach(new, Stage::Begun, never);
        let (silent, _) = gate.admit(CROWD, "silent");
        for number in [old, new, source, silent] {
            gate.set_ready(number);
        }
        let order: Vec<_> = std::iter::from_fn(|| gate.next_ready()).collect();
        let place = order.iter().position(|number| *number == new);
        assert!(place < Some(2), "{order:?}");
        assert!(!gate.has_ready());
    }

    #[test]
    fn strangers_never_take_the_place_of_known_peers() {
        let mut gate = gate();
        let (known, _) = gate.admit(CROWD, "known");
        assert_eq!(gate.reach(known, Stage::Known, never), None);
        for _ in 0..100 {
            let (number, leaves) = gate.admit(CROWD, "stranger");
            assert_ne!(leaves, Some("known"));
            assert_ne!(gate.reach(number, Stage::Answered, never), Some("known"));
        }
        gate.set_ready(known);
        assert_eq!(gate.next_ready(), Some(known));
        while let Some(stranger) = gate.evict_stranger() {
            assert_eq!(stranger, "stranger");
        }
        assert_eq!(gate.iter().count(), 1);
    }

    #[test]
    fn a_known_peer_takes_the_place_of_a_spare_one_or_of_the_oldest() {
        let mut gate = gate();
        let numbers = ["first", "spare", "third", "fourth"].map(|name| gate.admit(SOURCE, name).0);
        let is_spare = |_: &Gate<_>, name: &&str| *name == "spare";
        let left = numbers.map(|number| gate.reach(number, Stage::Known, is_spare));
        assert_eq!(left, [None, None, Some("spare"), Some("first")]);
        assert_eq!(gate.remove(numbers[1]), None);
    }

    #[test]
    fn the_hosts_of_a_network_of_ipv6_are_one_origin() {
        let origin = |text: &str| Origin::from(text.parse::<SocketAddr>().unwrap());
        assert_eq!(origin("[fd00::1]:7"), origin("[fd00::2]:8"));
        assert_eq!(origin("[fd00::1]:7").to_string(), "in fd00::/64");
        assert_eq!(origin("[::ffff:10.1.2.3]:7").to_string(), "at 10.1.2.3");
        assert_ne!(origin("[fd00::1]:7"), origin("[fd00:0:0:1::1]:7"));
        assert_eq!(origin("[::ffff:10.0.0.9]:7"), CROWD);
    }
}
