//! Counters with a maximum for each key.

use std::{borrow::Borrow, collections::HashMap, hash::Hash, sync::Arc};

use crate::shards::{SHARDS, Shards};

/// The number of items that each key holds.
type Held<K> = Arc<Shards<HashMap<K, usize>>>;

/// The number of items that each key holds, with a maximum.
pub struct Counts<K: ToOwned + ?Sized> {
    max: usize,
    held: Held<K::Owned>,
}

/// One item of a key. Dropping it decrements the count.
pub struct Counted<K>
where
    K: Hash + Eq + ToOwned + ?Sized,
    K::Owned: Hash + Eq,
{
    key: K::Owned,
    held: Held<K::Owned>,
}

impl<K> Counts<K>
where
    K: Hash + Eq + ToOwned + ?Sized,
    K::Owned: Hash + Eq,
{
    pub fn new(max: usize) -> Self {
        Self { max, held: Arc::new(Shards::new(SHARDS)) }
    }

    /// Counts an item. Returns `None` if the key already holds the maximum.
    pub fn take(&self, key: &K) -> Option<Counted<K>> {
        let mut held = self.held.of(key);
        match held.get_mut(key) {
            Some(count) if *count >= self.max => return None,
            Some(count) => *count += 1,
            None if self.max == 0 => return None,
            None => {
                held.insert(key.to_owned(), 1);
            }
        }
        drop(held);
        Some(Counted { key: key.to_owned(), held: self.held.clone() })
    }
}

impl<K> Drop for Counted<K>
where
    K: Hash + Eq + ToOwned + ?Sized,
    K::Owned: Hash + Eq,
{
    fn drop(&mut self) {
        let key: &K = self.key.borrow();
        let mut held = self.held.of(key);
        if let Some(count) = held.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                held.remove(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        thread,
    };

    use super::*;

    #[test]
    fn a_key_holds_so_many_until_one_is_dropped() {
        let counts = Counts::new(2);
        let (a, b) = (counts.take("a").unwrap(), counts.take("a").unwrap());
        assert!(counts.take("a").is_none() && counts.take("b").is_some());
        drop(a);
        assert!(counts.take("a").is_some());
        drop(b);
        assert!(counts.held.each().all(|held| held.is_empty()));
    }

    #[test]
    fn threads_together_hold_no_more_than_the_maximum() {
        const MAX: usize = 3;
        let counts = Counts::<str>::new(MAX);
        let (now, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        let Some(counted) = counts.take("a") else {
                            refused.fetch_add(1, Ordering::SeqCst);
                            continue;
                        };
                        assert!(now.fetch_add(1, Ordering::SeqCst) < MAX);
                        now.fetch_sub(1, Ordering::SeqCst);
                        drop(counted);
                    }
                });
            }
        });
        assert!(counts.held.each().all(|held| held.is_empty()), "{refused:?} were refused");
    }
}
