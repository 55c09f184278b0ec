//! The ids of streams. The side that opens a stream gives it a new id. Ids only grow, and none is used twice.
//!
//! A peer may send the OPENs of concurrent dials a little out of order, so each of the last [`SPAN`] ids is remembered by
//! itself. All older ones count as used.

use super::Version;

/// How far an id may be behind the newest one and still be new.
pub const SPAN: u64 = 4096;
const WORDS: usize = (SPAN / u64::BITS as u64) as usize;

/// Who opens streams, as seen from one of both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opener {
    This,
    Peer,
}

/// How both sides tell apart the ids of the streams that they open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbering {
    /// One side opens all streams, and uses all numbers of 32 bits (`streams-v1`).
    All { opener: Opener },
    /// Both sides open streams. Those of the SSH client have odd ids, and those of the server even ones.
    Halves { is_client: bool },
}

impl Numbering {
    /// The side whose streams have such an id.
    pub fn opener(self, id: u64) -> Opener {
        match self {
            Self::All { opener } => opener,
            Self::Halves { is_client } if is_client == (id % 2 == 1) => Opener::This,
            Self::Halves { .. } => Opener::Peer,
        }
    }

    /// Whether a side opens streams at all.
    pub fn opens(self, side: Opener) -> bool {
        match self {
            Self::All { opener } => opener == side,
            Self::Halves { .. } => true,
        }
    }

    pub fn version(self) -> Version {
        match self {
            Self::All { .. } => Version::V1,
            Self::Halves { .. } => Version::V2,
        }
    }

    /// The position of an id among those of its opener, from 1.
    fn position(self, id: u64) -> u64 {
        match self {
            Self::All { .. } => id,
            Self::Halves { .. } => id.div_ceil(2),
        }
    }

    /// The id at a position among those of this side; `None` if there are no more.
    fn id(self, position: u64) -> Option<u64> {
        match self {
            Self::All { .. } => u32::try_from(position).ok().map(u64::from),
            Self::Halves { is_client } => position.checked_mul(2).map(|id| id - u64::from(is_client)),
        }
    }
}

/// Which ids of one opener have been used.
#[derive(Debug)]
pub struct Ids {
    numbering: Numbering,
    /// The position of the newest one.
    newest: u64,
    /// A bit for each of the last [`SPAN`] positions, at the position modulo [`SPAN`].
    recent: [u64; WORDS],
}

impl Ids {
    /// Only 0, which no stream has, counts as used, and whatever could be before it.
    pub fn new(numbering: Numbering) -> Self {
        Self { numbering, newest: 0, recent: [u64::MAX; WORDS] }
    }

    /// Uses the next id of this side, and returns it; `None` if all have been used.
    pub fn use_next(&mut self) -> Option<u64> {
        let id = self.numbering.id(self.newest.checked_add(1)?)?;
        self.take(id);
        Some(id)
    }

    /// Uses an id. Returns `false` if it was used before.
    pub fn take(&mut self, id: u64) -> bool {
        if self.is_used(id) {
            return false;
        }
        let position = self.numbering.position(id);
        let ahead = position.saturating_sub(self.newest);
        if ahead >= SPAN {
            self.recent = [0; WORDS];
        } else {
            for skipped in (0..ahead).map(|back| position - back) {
                self.set(skipped, false);
            }
        }
        self.newest = self.newest.max(position);
        self.set(position, true);
        true
    }

    pub fn is_used(&self, id: u64) -> bool {
        let position = self.numbering.position(id);
        let Some(behind) = self.newest.checked_sub(position) else { return false };
        let (word, bit) = place(position);
        let recently = self.recent.get(word).is_some_and(|word| word & bit != 0);
        behind >= SPAN || recently
    }

    fn set(&mut self, position: u64, used: bool) {
        let (word, bit) = place(position);
        if let Some(word) = self.recent.get_mut(word) {
            *word = if used { *word | bit } else { *word & !bit };
        }
    }
}

/// The word and the bit that stand for a position.
fn place(position: u64) -> (usize, u64) {
    let index = position % SPAN;
    (usize::try_from(index / u64::from(u64::BITS)).unwrap_or_default(), 1 << (index % u64::from(u64::BITS)))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    const ALL: Numbering = Numbering::All { opener: Opener::This };
    const CLIENT: Numbering = Numbering::Halves { is_client: true };
    const SERVER: Numbering = Numbering::Halves { is_client: false };

    #[test]
    fn no_id_is_used_twice() {
        let mut ids = Ids::new(ALL);
        for id in [1, 2, 3, 10, 9, 8, 5000, 4999, 1_000_000, 1_000_000 - SPAN + 1] {
            assert!(!ids.is_used(id), "{id}");
            assert!(ids.take(id), "{id}");
            assert!(ids.is_used(id), "{id}");
            assert!(!ids.take(id), "{id}");
        }
        for old in [0, 1, 4, 10, 5000, 1_000_000, 1_000_000 - SPAN] {
            assert!(!ids.take(old), "{old}");
        }
        assert!(ids.take(999_999), "left out so far, and not long ago");
    }

    #[test]
    fn each_side_has_ids_of_its_own_which_come_to_an_end() {
        for (numbering, first, newest, last) in [
            (ALL, [1, 2], u64::from(u32::MAX) - 1, u64::from(u32::MAX)),
            (CLIENT, [1, 3], u64::MAX - 4, u64::MAX - 2),
            (SERVER, [2, 4], u64::MAX - 3, u64::MAX - 1),
        ] {
            let mut ids = Ids::new(numbering);
            assert_eq!([ids.use_next(), ids.use_next()], first.map(Some));
            assert!(ids.take(newest) && ids.is_used(newest) && !ids.is_used(last));
            assert_eq!([ids.use_next(), ids.use_next()], [Some(last), None], "{numbering:?}");
            assert!([first[0], newest, last].iter().all(|id| numbering.opener(*id) == Opener::This));
        }
        assert_eq!((CLIENT.opener(2), SERVER.opener(1)), (Opener::Peer, Opener::Peer));
        assert!(!ALL.opens(Opener::Peer) && CLIENT.opens(Opener::Peer));
    }

    #[test]
    fn agrees_with_a_set_when_they_come_in_disorder() {
        let mut rng = StdRng::seed_from_u64(7);
        let (mut ids, mut used, mut newest) = (Ids::new(ALL), HashSet::from([0]), 0);
        for _ in 0..200_000 {
            let id = if rng.random() {
                newest + rng.random_range(1..20)
            } else {
                u64::saturating_sub(newest, rng.random_range(0..SPAN))
            };
            assert_eq!(ids.is_used(id), used.contains(&id), "{id} after {newest}");
            assert_eq!(ids.take(id), used.insert(id), "{id} after {newest}");
            newest = newest.max(id);
        }
    }
}
