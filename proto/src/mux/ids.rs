//! The ids of streams. The side that opens a stream gives it a new id. Ids grow modulo 2^32 in the sense of RFC 1982, and
//! none is used twice.
//!
//! A peer may send the OPENs of concurrent dials a little out of order, so each of the last [`SPAN`] ids is remembered by
//! itself. All older ones count as used.

/// How far an id may be behind the newest one and still be new.
pub const SPAN: u32 = 4096;
const WORDS: usize = (SPAN / u64::BITS) as usize;

/// Which ids have been used.
#[derive(Debug)]
pub struct Ids {
    newest: u32,
    /// A bit for each of the last [`SPAN`] ids, at the id modulo [`SPAN`].
    recent: [u64; WORDS],
}

impl Default for Ids {
    /// Only 0, which no stream has, and the ids before it count as used.
    fn default() -> Self {
        Self { newest: 0, recent: [u64::MAX; WORDS] }
    }
}

impl Ids {
    /// Uses the id after the newest one, and returns it.
    pub fn use_next(&mut self) -> u32 {
        let next = self.newest.wrapping_add(1).max(1);
        self.take(next);
        next
    }

    /// Uses an id. Returns `false` if it was used before.
    pub fn take(&mut self, id: u32) -> bool {
        if self.is_used(id) {
            return false;
        }
        let ahead = id.wrapping_sub(self.newest);
        if ahead < 1 << 31 {
            for skipped in (0..ahead.min(SPAN)).map(|back| id.wrapping_sub(back)) {
                self.set(skipped, false);
            }
            self.newest = id;
        }
        self.set(id, true);
        true
    }

    pub fn is_used(&self, id: u32) -> bool {
        let behind = self.newest.wrapping_sub(id);
        let (word, bit) = position(id);
        let recently = self.recent.get(word).is_some_and(|word| word & bit != 0);
        id == 0 || if behind < SPAN { recently } else { behind <= 1 << 31 }
    }

    fn set(&mut self, id: u32, used: bool) {
        let (word, bit) = position(id);
        if let Some(word) = self.recent.get_mut(word) {
            *word = if used { *word | bit } else { *word & !bit };
        }
    }
}

/// The word and the bit that stand for an id.
fn position(id: u32) -> (usize, u64) {
    let index = id % SPAN;
    (usize::try_from(index / u64::BITS).unwrap_or_default(), 1 << (index % u64::BITS))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn no_id_is_used_twice() {
        let mut ids = Ids::default();
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
    fn ids_wrap_around_and_leave_out_0() {
        let mut ids = Ids::default();
        for id in [1 << 30, 1 << 31, 3 << 30, u32::MAX - 1] {
            assert!(ids.take(id), "{id}");
        }
        assert_eq!([ids.use_next(), ids.use_next(), ids.use_next()], [u32::MAX, 1, 2]);
        assert!(ids.is_used(u32::MAX) && ids.is_used(0) && !ids.is_used(3));
        assert!(ids.take(u32::MAX - 2), "left out so far, and not long ago");
    }

    #[test]
    fn agrees_with_a_set_when_they_come_in_disorder() {
        let mut rng = StdRng::seed_from_u64(7);
        let (mut ids, mut used, mut newest) = (Ids::default(), HashSet::from([0]), 0u32);
        for _ in 0..200_000 {
            let id = if rng.random() {
                newest + rng.random_range(1..20)
            } else {
                newest.saturating_sub(rng.random_range(0..SPAN))
            };
            assert_eq!(ids.is_used(id), used.contains(&id), "{id} after {newest}");
            assert_eq!(ids.take(id), used.insert(id), "{id} after {newest}");
            newest = newest.max(id);
        }
    }
}
