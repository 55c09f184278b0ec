//! Room for handshakes that have not proved anything yet.
//!
//! Whoever opens connections and says nothing must not keep a real peer out. A handshake takes milliseconds
//! from a real peer, so when all places are taken the oldest is given to the newcomer.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// A bounded number of places, the oldest of which is taken away when all are in use.
#[derive(Clone, Debug)]
pub struct Places {
    max: usize,
    taken: Arc<Mutex<VecDeque<(u64, CancellationToken)>>>,
    counter: Arc<std::sync::atomic::AtomicU64>,
}

/// One place; dropping it makes it free.
#[derive(Debug)]
pub struct Place {
    id: u64,
    places: Places,
    /// Cancelled when the place is taken away.
    pub evicted: CancellationToken,
}

impl Places {
    pub fn new(max: usize) -> Self {
        Self { max: max.max(1), taken: Arc::default(), counter: Arc::default() }
    }

    pub fn take(&self) -> Place {
        let id = self.counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let evicted = CancellationToken::new();
        let mut taken = self.lock();
        if taken.len() >= self.max
            && let Some((_, oldest)) = taken.pop_front()
        {
            oldest.cancel();
        }
        taken.push_back((id, evicted.clone()));
        Place { id, places: self.clone(), evicted }
    }

    pub fn in_use(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(u64, CancellationToken)>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.lock().retain(|(id, _)| *id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_makes_room_for_the_newest() {
        let places = Places::new(2);
        let (a, b) = (places.take(), places.take());
        let c = places.take();
        assert!(a.evicted.is_cancelled() && !b.evicted.is_cancelled() && !c.evicted.is_cancelled());
        drop(a);
        assert_eq!(places.in_use(), 2);
        drop(b);
        let d = places.take();
        assert!(!c.evicted.is_cancelled() && !d.evicted.is_cancelled());
        drop((c, d));
        assert_eq!(places.in_use(), 0);
    }
}
