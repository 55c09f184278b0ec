//! Rate limits by token buckets: one bucket, or one for each key. Time is an argument.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::shards::{SHARDS, Shards};

/// The maximum number of keys with a bucket of their own. All other keys share one bucket.
const MAX_KEYS: usize = 65_536;
/// The shortest time between two searches for keys that no longer need a bucket.
const SEARCH_INTERVAL: Duration = Duration::from_millis(100);

/// A number of events in a second, and how many may come at once.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    per_second: f64,
    burst: f64,
}

impl Rate {
    /// Creates a rate. A number of zero counts as one.
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self { per_second: f64::from(per_second.max(1)), burst: f64::from(burst.max(1)) }
    }
}

/// A bucket with a token for each event that is allowed now.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    rate: Rate,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// Creates a full bucket.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, tokens: rate.burst, at: now }
    }

    /// Counts an event. The error is the time until another event is allowed.
    pub fn take(&mut self, now: Instant) -> Result<(), Duration> {
        self.fill(now);
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - self.tokens) / self.rate.per_second))
    }

    /// Takes back an event that was counted.
    pub fn give_back(&mut self, now: Instant) {
        self.fill(now);
        self.tokens = (self.tokens + 1.0).min(self.rate.burst);
    }

    fn is_full(&self, now: Instant) -> bool {
        self.tokens_at(now) >= self.rate.burst
    }

    fn tokens_at(&self, now: Instant) -> f64 {
        let grown = now.saturating_duration_since(self.at).as_secs_f64() * self.rate.per_second;
        (self.tokens + grown).min(self.rate.burst)
    }

    fn fill(&mut self, now: Instant) {
        self.tokens = self.tokens_at(now);
        // A caller may pass an earlier time than another one before. The tokens since then must not be added twice.
        self.at = self.at.max(now);
    }
}

/// One bucket for each key. Threads meet at the same lock only if their keys are in the same part of the table, or if
/// the table is full.
pub struct Rates<K: ToOwned + ?Sized> {
    rate: Rate,
    buckets: Shards<HashMap<K::Owned, Bucket>>,
    /// The number of keys with a bucket of their own, in all parts.
    keys: AtomicUsize,
    others: Mutex<Others>,
}

/// The bucket that all keys without one of their own share.
struct Others {
    bucket: Bucket,
    /// When the table was last searched for keys that no longer need a bucket of their own.
    searched: Option<Instant>,
}

impl<K> Rates<K>
where
    K: Hash + Eq + ToOwned + ?Sized,
    K::Owned: Hash + Eq,
{
    pub fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        let rate = Rate::new(per_second, burst);
        let others = Others { bucket: Bucket::new(rate, now), searched: None };
        Self { rate, buckets: Shards::new(SHARDS), keys: AtomicUsize::new(0), others: Mutex::new(others) }
    }

    /// Counts an event. The error is the time until another event is allowed.
    pub fn take(&self, key: &K, now: Instant) -> Result<(), Duration> {
        self.with(key, now, |bucket| bucket.take(now))
    }

    /// Takes back an event that was counted.
    pub fn give_back(&self, key: &K, now: Instant) {
        self.with(key, now, |bucket| bucket.give_back(now));
    }

    fn with<R>(&self, key: &K, now: Instant, each: impl FnOnce(&mut Bucket) -> R) -> R {
        let mut buckets = self.buckets.of(key);
        if let Some(bucket) = self.own(&mut buckets, key, now) {
            return each(bucket);
        }
        drop(buckets);
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        // Every newcomer would otherwise search the whole table.
        let late = |searched: Instant| now.saturating_duration_since(searched) >= SEARCH_INTERVAL;
        if others.searched.is_none_or(late) {
            others.searched = Some(now);
            self.remove_full(now);
            if let Some(bucket) = self.own(&mut self.buckets.of(key), key, now) {
                return each(bucket);
            }
        }
        each(&mut others.bucket)
    }

    /// Returns the bucket of a key in its part of the table. It is a new one if the key has none and there is room.
    fn own<'a>(
        &self,
        buckets: &'a mut HashMap<K::Owned, Bucket>,
        key: &K,
        now: Instant,
    ) -> Option<&'a mut Bucket> {
        if !buckets.contains_key(key) {
            let one_more = |keys: usize| (keys < MAX_KEYS).then_some(keys + 1);
            self.keys.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
            buckets.insert(key.to_owned(), Bucket::new(self.rate, now));
        }
        buckets.get_mut(key)
    }

    /// Forgets the keys whose buckets have filled up again.
    fn remove_full(&self, now: Instant) {
        for mut buckets in self.buckets.each() {
            let before = buckets.len();
            buckets.retain(|_, bucket| !bucket.is_full(now));
            self.keys.fetch_sub(before - buckets.len(), Ordering::Relaxed);
        }
    }
}

impl<K: ToOwned + ?Sized> fmt::Debug for Rates<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rates").field("rate", &self.rate).field("keys", &self.keys).finish_non_exhaustive()
    }
}

/// Returns the network that counts as one caller's address. For IPv6, this is the /64, since a single host can use all
/// of its addresses.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const THREADS: usize = 8;

    #[test]
    fn a_burst_is_allowed_and_then_a_rate() {
        let start = Instant::now();
        let rates = Rates::new(10, 3, start);
        for _ in 0..3 {
            assert_eq!(rates.take("a", start), Ok(()));
        }
        assert_eq!(rates.take("a", start), Err(Duration::from_millis(100)));
        assert_eq!(rates.take("b", start), Ok(()), "another key");
        assert_eq!(rates.take("a", start + Duration::from_millis(100)), Ok(()));
        assert!(rates.take("a", start + Duration::from_millis(110)).is_err());
        let later = start + Duration::from_secs(60);
        assert_eq!((0..9).filter(|_| rates.take("a", later).is_ok()).count(), 3);
    }

    #[test]
    fn what_is_given_back_can_be_taken_once_more() {
        let start = Instant::now();
        let rates = Rates::new(1, 2, start);
        rates.give_back("a", start);
        assert_eq!((0..9).filter(|_| rates.take("a", start).is_ok()).count(), 2);
        rates.give_back("a", start);
        assert_eq!((0..9).filter(|_| rates.take("a", start).is_ok()).count(), 1);
    }

    #[test]
    fn keys_are_bounded_and_newcomers_share_what_is_left() {
        let start = Instant::now();
        let rates = Rates::new(1, 2, start);
        for key in 0..MAX_KEYS {
            assert_eq!(rates.take(&key, start), Ok(()));
        }
        let newcomers = (0..100).filter(|i| rates.take(&(MAX_KEYS + i), start).is_ok()).count();
        assert_eq!(newcomers, 2);
        assert_eq!(keys(&rates), MAX_KEYS);
        // Keys whose bucket has filled up again give way.
        assert_eq!(rates.take(&MAX_KEYS, start + Duration::from_secs(5)), Ok(()));
        assert_eq!(keys(&rates), 1);
    }

    /// Returns the number of keys with a bucket, which must be the number that is kept.
    fn keys(rates: &Rates<usize>) -> usize {
        let keys = rates.buckets.each().map(|buckets| buckets.len()).sum();
        assert_eq!(rates.keys.load(Ordering::Relaxed), keys);
        keys
    }

    #[test]
    fn threads_together_take_no_more_than_the_burst_of_their_key() {
        let start = Instant::now();
        let rates = Rates::new(1, 1000, start);
        let take = || (0..1000).filter(|_| rates.take("a", start).is_ok()).count();
        let taken: usize = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(take)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(taken, 1000);
    }

    #[test]
    fn threads_together_get_no_more_buckets_than_there_are() {
        let start = Instant::now();
        let rates = Rates::new(1, 2, start);
        let each = 2 * MAX_KEYS / THREADS;
        let take = |thread: usize| {
            let own = thread * each..(thread + 1) * each;
            own.filter(|key| rates.take(key, start).is_ok()).count()
        };
        let taken: usize = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || take(thread))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!((taken, keys(&rates)), (MAX_KEYS + 2, MAX_KEYS), "the others share one burst of two");
    }

    #[test]
    fn a_bucket_fills_once_for_each_moment() {
        let start = Instant::now();
        let rates = Rates::new(1, 2, start);
        assert!(rates.take("a", start + Duration::from_secs(10)).is_ok());
        assert!(rates.take("a", start).is_ok());
        assert!(rates.take("a", start + Duration::from_secs(10)).is_err());
    }

    #[test]
    fn networks() {
        let network = |text: &str| super::network(text.parse().unwrap()).to_string();
        assert_eq!(network("192.0.2.7"), "192.0.2.7");
        assert_eq!(network("::ffff:192.0.2.7"), "192.0.2.7");
        assert_eq!(network("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }
}
