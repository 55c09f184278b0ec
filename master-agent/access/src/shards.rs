//! A table in parts, each behind a lock of its own, so that threads seldom wait for each other.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The number of parts of a table that most requests use.
pub(crate) const SHARDS: usize = 32;

/// The parts of a table. A key always belongs to the same part, so that what is counted for it is exact. The hasher's
/// seed is random, so that nobody can choose keys that all belong to one part.
pub(crate) struct Shards<T> {
    first: Mutex<T>,
    others: Vec<Mutex<T>>,
    hasher: RandomState,
}

impl<T: Default> Shards<T> {
    /// Creates this number of parts, but at least one.
    pub(crate) fn new(parts: usize) -> Self {
        let others = (1..parts).map(|_| Mutex::default()).collect();
        Self { first: Mutex::default(), others, hasher: RandomState::new() }
    }
}

impl<T> Shards<T> {
    /// Locks the part to which a key belongs.
    pub(crate) fn of<K: Hash + ?Sized>(&self, key: &K) -> MutexGuard<'_, T> {
        let part = self.hasher.hash_one(key) % (self.others.len() as u64 + 1);
        let part = usize::try_from(part).ok().and_then(|part| self.others.get(part));
        lock(part.unwrap_or(&self.first))
    }

    /// Locks the parts one after the other.
    pub(crate) fn each(&self) -> impl Iterator<Item = MutexGuard<'_, T>> {
        std::iter::once(&self.first).chain(&self.others).map(lock)
    }
}

fn lock<T>(part: &Mutex<T>) -> MutexGuard<'_, T> {
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_key_always_has_the_same_part_and_many_keys_have_all_of_them() {
        let shards = Shards::<HashSet<String>>::new(SHARDS);
        for _ in 0..2 {
            for key in 0..1000 {
                let key = key.to_string();
                shards.of(key.as_str()).insert(key);
            }
        }
        let sizes: Vec<usize> = shards.each().map(|part| part.len()).collect();
        assert_eq!((sizes.len(), sizes.iter().sum::<usize>()), (SHARDS, 1000));
        assert!(sizes.iter().all(|size| (1..200).contains(size)), "{sizes:?}");
    }

    #[test]
    fn one_part_is_enough() {
        for parts in [0, 1] {
            let shards = Shards::<usize>::new(parts);
            *shards.of("a") += 1;
            *shards.of("b") += 1;
            assert_eq!(shards.each().map(|part| *part).collect::<Vec<_>>(), [2]);
        }
    }
}
