//! A cache of results for tokens and requests, which holds at most a fixed number of entries.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    time::{Duration, Instant},
};

use crate::shards::{SHARDS, Shards};

/// The least number of entries of a part. A smaller cache has a single part, so that it holds all that it may.
const MIN_PART: usize = 256;

/// A cache whose entries expire. It is in parts, and a new entry evicts the oldest one of its part when that is full.
pub(crate) struct Cache<K, V> {
    /// The maximum number of entries of each part.
    size: usize,
    parts: Shards<Entries<K, V>>,
}

struct Entries<K, V> {
    values: HashMap<K, Entry<V>>,
    /// The keys with the serial numbers of their entries, oldest first. An entry that has been replaced or removed
    /// leaves its serial number here.
    order: VecDeque<(u64, K)>,
    next: u64,
}

struct Entry<V> {
    value: V,
    until: Instant,
    serial: u64,
}

impl<K, V> Default for Entries<K, V> {
    fn default() -> Self {
        Self { values: HashMap::new(), order: VecDeque::new(), next: 0 }
    }
}

impl<K: Copy + Eq + Hash, V: Clone> Cache<K, V> {
    /// Creates a cache for this number of entries. With a size of zero, it stores nothing.
    pub(crate) fn new(size: usize) -> Self {
        let parts = (size / MIN_PART).clamp(1, SHARDS);
        Self { size: size / parts, parts: Shards::new(parts) }
    }

    pub(crate) fn get(&self, key: &K, now: Instant) -> Option<V> {
        let entries = self.parts.of(key);
        let entry = entries.values.get(key)?;
        (now < entry.until).then(|| entry.value.clone())
    }

    pub(crate) fn remove(&self, key: &K) {
        self.parts.of(key).values.remove(key);
    }

    /// Stores a value for this time. A time of zero stores nothing.
    pub(crate) fn put(&self, key: K, value: V, ttl: Duration, now: Instant) {
        if self.size == 0 || ttl.is_zero() {
            return;
        }
        let Entries { values, order, next } = &mut *self.parts.of(&key);
        let serial = *next;
        *next += 1;
        values.insert(key, Entry { value, until: now + ttl, serial });
        order.push_back((serial, key));
        while let Some((serial, oldest)) = order.front().copied() {
            let current = values.get(&oldest).filter(|entry| entry.serial == serial);
            let (gone, expired) = (current.is_none(), current.is_some_and(|entry| entry.until <= now));
            if !gone && !expired && values.len() <= self.size {
                break;
            }
            order.pop_front();
            if !gone {
                values.remove(&oldest);
            }
        }
        // At most `size` items are left, so this happens at most once in `size` insertions.
        if order.len() > 2 * self.size {
            order.retain(|(serial, key)| values.get(key).is_some_and(|entry| entry.serial == *serial));
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        let lengths = self.parts.each().map(|entries| {
            assert!(entries.values.len() <= self.size && entries.order.len() <= 2 * self.size);
            entries.values.len()
        });
        lengths.sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(10);

    #[test]
    fn it_forgets_by_time_and_the_oldest_by_number() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let cache = Cache::<u32, u32>::new(2);
        cache.put(1, 10, TTL, at(0));
        assert_eq!((cache.get(&1, at(9)), cache.get(&1, at(10))), (Some(10), None));
        cache.put(2, 20, TTL, at(1));
        cache.put(3, 30, TTL, at(2));
        assert_eq!(
            (cache.get(&1, at(2)), cache.get(&2, at(2)), cache.get(&3, at(2))),
            (None, Some(20), Some(30))
        );
        cache.remove(&3);
        assert_eq!((cache.get(&2, at(2)), cache.get(&3, at(2))), (Some(20), None));
        cache.put(3, 30, TTL, at(2));
        cache.put(2, 21, TTL, at(3));
        assert_eq!((cache.get(&2, at(12)), cache.get(&3, at(11))), (Some(21), Some(30)));
        for i in 0..1000 {
            cache.put(i, i, TTL, at(4));
            assert!(cache.len() <= 2);
        }
    }

    #[test]
    fn a_value_that_is_stored_again_and_again_evicts_no_other() {
        let now = Instant::now();
        let cache = Cache::<u32, u32>::new(4);
        cache.put(1, 10, TTL, now);
        for value in 0..1000 {
            cache.put(2, value, TTL, now);
            cache.remove(&3);
            cache.put(3, value, TTL, now);
            assert_eq!((cache.get(&1, now), cache.len()), (Some(10), 3), "{value}");
        }
        assert_eq!((cache.get(&2, now), cache.get(&3, now)), (Some(999), Some(999)));
    }

    #[test]
    fn a_large_cache_is_in_parts_that_together_hold_what_it_may() {
        const SIZE: usize = 10_000;
        let now = Instant::now();
        let cache = Cache::<usize, usize>::new(SIZE);
        for i in 0..2 * SIZE {
            cache.put(i, i, TTL, now);
        }
        assert!((SIZE * 9 / 10..=SIZE).contains(&cache.len()), "{}", cache.len());
        let newest = 2 * SIZE - 1;
        assert_eq!((cache.get(&newest, now), cache.get(&0, now)), (Some(newest), None));
    }

    #[test]
    fn each_entry_has_a_time_of_its_own() {
        let start = Instant::now();
        let cache = Cache::<u32, u32>::new(2);
        cache.put(1, 10, TTL, start);
        cache.put(2, 20, TTL / 2, start);
        let later = start + TTL / 2;
        assert_eq!((cache.get(&1, later), cache.get(&2, later)), (Some(10), None));
    }

    #[test]
    fn a_size_or_time_of_zero_remembers_nothing() {
        let now = Instant::now();
        for (size, ttl) in [(0, TTL), (10, Duration::ZERO)] {
            let cache = Cache::<u32, u32>::new(size);
            cache.put(1, 1, ttl, now);
            assert_eq!(cache.get(&1, now), None);
        }
    }
}
