//! Counters with a maximum for each key.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

/// The number of items that each key holds, with a maximum.
pub struct Counts<K> {
    max: usize,
    held: Arc<Mutex<HashMap<K, usize>>>,
}

/// One item of a key. Dropping it decrements the count.
pub struct Counted<K: Hash + Eq> {
    key: K,
    held: Arc<Mutex<HashMap<K, usize>>>,
}

impl<K: Hash + Eq + Clone> Counts<K> {
    pub fn new(max: usize) -> Self {
        Self { max, held: Arc::default() }
    }

    /// Counts an item. Returns `None` if the key already holds the maximum.
    pub fn take(&self, key: K) -> Option<Counted<K>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.entry(key.clone()).or_default();
        if *count >= self.max {
            return None;
        }
        *count += 1;
        drop(held);
        Some(Counted { key, held: self.held.clone() })
    }
}

impl<K: Hash + Eq> Drop for Counted<K> {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_holds_so_many_until_one_is_dropped() {
        let counts = Counts::new(2);
        let (a, b) = (counts.take("a").unwrap(), counts.take("a").unwrap());
        assert!(counts.take("a").is_none() && counts.take("b").is_some());
        drop(a);
        assert!(counts.take("a").is_some());
        drop(b);
        assert!(counts.held.lock().unwrap().is_empty());
    }
}
