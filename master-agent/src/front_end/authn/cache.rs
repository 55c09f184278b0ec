//! What is remembered of bearer tokens for a while: never more than a fixed number, and never a token itself.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use sha2::{Digest as _, Sha256};

use crate::front_end::secret::Secret;

/// SHA-256 of a token: looking it up tells nothing about other tokens by the time it takes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    pub fn of(token: &Secret) -> Self {
        Self(Sha256::digest(token.expose()).into())
    }
}

/// Forgets after a time, and the oldest when there are too many.
pub(super) struct Cache<V, K = Digest> {
    size: usize,
    ttl: Duration,
    entries: Mutex<Entries<K, V>>,
}

struct Entries<K, V> {
    /// The value, and when it was put.
    values: HashMap<K, (V, Instant)>,
    /// When which was put, oldest first. One that was put again is here more than once.
    order: VecDeque<(Instant, K)>,
}

impl<V: Clone, K: Copy + Eq + std::hash::Hash> Cache<V, K> {
    /// A size or TTL of zero remembers nothing.
    pub(super) fn new(size: usize, ttl: Duration) -> Self {
        let entries = Entries { values: HashMap::new(), order: VecDeque::new() };
        Self { size, ttl, entries: Mutex::new(entries) }
    }

    pub(super) fn get(&self, key: &K, now: Instant) -> Option<V> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (value, put) = entries.values.get(key)?;
        (now.saturating_duration_since(*put) < self.ttl).then(|| value.clone())
    }

    pub(super) fn remove(&self, key: &K) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.values.remove(key).is_some() {
            entries.order.retain(|(_, one)| one != key);
        }
    }

    pub(super) fn put(&self, key: K, value: V, now: Instant) {
        if self.size == 0 || self.ttl.is_zero() {
            return;
        }
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.values.insert(key, (value, now));
        entries.order.push_back((now, key));
        while let Some((put, oldest)) = entries.order.front().copied() {
            let over = entries.order.len() > self.size;
            if !over && now.saturating_duration_since(put) < self.ttl {
                break;
            }
            entries.order.pop_front();
            if entries.values.get(&oldest).is_some_and(|(_, last)| *last == put) {
                entries.values.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_forgets_by_time_and_the_oldest_by_number() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let cache = Cache::<u32, u32>::new(2, Duration::from_secs(10));
        cache.put(1, 10, at(0));
        assert_eq!((cache.get(&1, at(9)), cache.get(&1, at(10))), (Some(10), None));
        cache.put(2, 20, at(1));
        cache.put(3, 30, at(2));
        assert_eq!(
            (cache.get(&1, at(2)), cache.get(&2, at(2)), cache.get(&3, at(2))),
            (None, Some(20), Some(30))
        );
        cache.remove(&3);
        assert_eq!((cache.get(&2, at(2)), cache.get(&3, at(2))), (Some(20), None));
        cache.put(3, 30, at(2));
        cache.put(2, 21, at(3));
        assert_eq!((cache.get(&2, at(12)), cache.get(&3, at(11))), (Some(21), Some(30)));
        for i in 0..1000 {
            cache.put(i, i, at(4));
            let entries = cache.entries.lock().unwrap();
            assert!(entries.values.len() <= 2 && entries.order.len() <= 2);
        }
    }

    #[test]
    fn a_size_of_zero_remembers_nothing() {
        let now = Instant::now();
        for (size, ttl) in [(0, 10), (10, 0)] {
            let cache = Cache::<u32, u32>::new(size, Duration::from_secs(ttl));
            cache.put(1, 1, now);
            assert_eq!(cache.get(&1, now), None);
        }
    }
}
