//! Rate limits for each key, by token buckets. Time is an argument.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The maximum number of keys with a bucket of their own. All other keys share one bucket.
const MAX_KEYS: usize = 65_536;

/// One token bucket for each key.
#[derive(Debug)]
pub struct Rates<K> {
    /// The long-term number of events in a second.
    per_second: f64,
    /// The maximum number of events at once.
    burst: f64,
    state: Mutex<State<K>>,
}

#[derive(Debug)]
struct State<K> {
    buckets: HashMap<K, Bucket>,
    /// The bucket of all keys that have none of their own.
    others: Bucket,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl<K: Hash + Eq> Rates<K> {
    pub fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        let burst = f64::from(burst.max(1));
        let others = Bucket { tokens: burst, at: now };
        let state = Mutex::new(State { buckets: HashMap::new(), others });
        Self { per_second: f64::from(per_second.max(1)), burst, state }
    }

    /// Counts an event. The error is the time until another event is allowed.
    pub fn take(&self, key: K, now: Instant) -> Result<(), Duration> {
        self.with(key, now, |bucket| {
            if bucket.tokens >= 1.0 {
                bucket.tokens -= 1.0;
                return Ok(());
            }
            Err(Duration::from_secs_f64((1.0 - bucket.tokens) / self.per_second))
        })
    }

    /// Takes back an event that was counted.
    pub fn give_back(&self, key: K, now: Instant) {
        self.with(key, now, |bucket| bucket.tokens = (bucket.tokens + 1.0).min(self.burst));
    }

    fn with<R>(&self, key: K, now: Instant, each: impl FnOnce(&mut Bucket) -> R) -> R {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.buckets.len() >= MAX_KEYS && !state.buckets.contains_key(&key) {
            let full = |bucket: &Bucket| self.tokens(bucket, now) >= self.burst;
            state.buckets.retain(|_, bucket| !full(bucket));
            if state.buckets.len() >= MAX_KEYS {
                self.fill(&mut state.others, now);
                return each(&mut state.others);
            }
        }
        let bucket = state.buckets.entry(key).or_insert(Bucket { tokens: self.burst, at: now });
        self.fill(bucket, now);
        each(bucket)
    }

    fn tokens(&self, bucket: &Bucket, now: Instant) -> f64 {
        let grown = now.saturating_duration_since(bucket.at).as_secs_f64() * self.per_second;
        (bucket.tokens + grown).min(self.burst)
    }

    fn fill(&self, bucket: &mut Bucket, now: Instant) {
        bucket.tokens = self.tokens(bucket, now);
        // A caller may pass an earlier time than another one before. The tokens since then must not be added twice.
        bucket.at = bucket.at.max(now);
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
    use super::*;

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
            assert_eq!(rates.take(key, start), Ok(()));
        }
        let newcomers = (0..100).filter(|i| rates.take(MAX_KEYS + i, start).is_ok()).count();
        assert_eq!(newcomers, 2);
        assert_eq!(rates.state.lock().unwrap().buckets.len(), MAX_KEYS);
        // Keys whose bucket has filled up again give way.
        assert_eq!(rates.take(MAX_KEYS, start + Duration::from_secs(5)), Ok(()));
        assert_eq!(rates.state.lock().unwrap().buckets.len(), 1);
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
