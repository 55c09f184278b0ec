//! Bounds on what all have at once, of which each has a share, so that nobody takes all of it.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A bound on what all have, and a lower one on what each of them has.
pub struct Shares<K> {
    all: Arc<Semaphore>,
    each: usize,
    /// The shares of those who hold a permit or a handle to their share.
    by_owner: Mutex<HashMap<K, Weak<Semaphore>>>,
}

/// What one may have. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Share {
    own: Arc<Semaphore>,
    all: Arc<Semaphore>,
}

/// One of what is bounded. Dropping it returns it.
#[derive(Debug)]
pub struct Permit {
    _own: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

impl<K: Eq + Hash> Shares<K> {
    pub fn new(all: usize, each: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), each, by_owner: Mutex::default() }
    }

    pub fn of(&self, owner: K) -> Share {
        let mut by_owner = self.by_owner.lock().unwrap_or_else(PoisonError::into_inner);
        let own = by_owner.get(&owner).and_then(Weak::upgrade).unwrap_or_else(|| {
            by_owner.retain(|_, own| own.strong_count() > 0);
            let own = Arc::new(Semaphore::new(self.each));
            by_owner.insert(owner, Arc::downgrade(&own));
            own
        });
        Share { own, all: self.all.clone() }
    }
}

impl Share {
    /// One more, unless this one or all together have as many as they may.
    pub fn try_take(&self) -> Option<Permit> {
        let own = self.own.clone().try_acquire_owned().ok()?;
        let all = self.all.clone().try_acquire_owned().ok()?;
        Some(Permit { _own: own, _all: all })
    }

    /// Waits for one more. Nobody waits for the others' permits who has all of its own already.
    pub async fn take(&self) -> Option<Permit> {
        let own = self.own.clone().acquire_owned().await.ok()?;
        let all = self.all.clone().acquire_owned().await.ok()?;
        Some(Permit { _own: own, _all: all })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_what_is_for_others_and_all_together_are_bounded() {
        let shares = Shares::new(5, 2);
        let mut held = Vec::new();
        for owner in ["a", "b", "c"] {
            while let Some(permit) = shares.of(owner).try_take() {
                held.push((owner, permit));
            }
        }
        let of = |held: &[(&str, Permit)], owner| held.iter().filter(|(of, _)| *of == owner).count();
        assert_eq!(["a", "b", "c"].map(|owner| of(&held, owner)), [2, 2, 1]);
        held.retain(|(owner, _)| *owner != "a");
        assert!(shares.of("b").try_take().is_none(), "b has its share");
        assert!(shares.of("c").try_take().is_some());
        held.clear();
        let _share = shares.of("d");
        assert_eq!(shares.by_owner.lock().unwrap().len(), 1, "nothing is kept of those who have nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_its_own_share_keeps_nobody_waiting() {
        let shares = Shares::new(3, 2);
        let greedy = shares.of("greedy");
        let _held = [greedy.take().await.unwrap(), greedy.take().await.unwrap()];
        let wait = std::time::Duration::from_secs(60);
        assert!(tokio::time::timeout(wait, greedy.take()).await.is_err());
        let other = shares.of("other");
        assert!(tokio::time::timeout(wait, other.take()).await.unwrap().is_some());
    }
}
