//! Room for handshakes that have not proved anything yet.
//!
//! Whoever opens connections and says nothing must not keep a real peer out. When all places are taken, the
//! newcomer gets one of the network that holds most of them, of a peer that has said little so far if there is
//! one, and picked at random: whoever floods mostly takes places from itself, and a real peer that lost its own
//! has a chance each time it comes again.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use tokio_util::sync::CancellationToken;

/// Bytes that an SSH peer has sent once its version and its offer of algorithms (RFC 4253 §7.1) have come.
pub const BEGUN: usize = 512;

/// A bounded number of places, one of which is taken away when all are in use.
#[derive(Clone, Debug)]
pub struct Places {
    max: usize,
    taken: Arc<Mutex<Vec<Taken>>>,
    counter: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Taken {
    id: u64,
    network: IpAddr,
    received: Arc<AtomicUsize>,
    evicted: CancellationToken,
}

/// One place; dropping it makes it free.
#[derive(Debug)]
pub struct Place {
    id: u64,
    places: Places,
    /// Bytes that the peer has sent, counted by whoever reads them.
    pub received: Arc<AtomicUsize>,
    /// Cancelled when the place is taken away.
    pub evicted: CancellationToken,
}

impl Places {
    pub fn new(max: usize) -> Self {
        Self { max: max.max(1), taken: Arc::default(), counter: Arc::default() }
    }

    /// A place for a connection from `peer`.
    pub fn take(&self, peer: IpAddr) -> Place {
        self.take_or_cancel(peer, CancellationToken::new())
    }

    /// The same, for a connection that ends once `evicted` is cancelled, whichever of its places is taken away.
    pub fn take_or_cancel(&self, peer: IpAddr, evicted: CancellationToken) -> Place {
        let id = self.counter.fetch_add(1, Ordering::Relaxed);
        let received = Arc::<AtomicUsize>::default();
        let mut taken = self.lock();
        if taken.len() >= self.max {
            evict(&mut taken);
        }
        taken.push(Taken {
            id,
            network: network(peer),
            received: received.clone(),
            evicted: evicted.clone(),
        });
        Place { id, places: self.clone(), received, evicted }
    }

    pub fn in_use(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Taken>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn evict(taken: &mut Vec<Taken>) {
    let mut counts: HashMap<IpAddr, usize> = HashMap::new();
    for place in taken.iter() {
        *counts.entry(place.network).or_default() += 1;
    }
    let most = counts.values().copied().max().unwrap_or_default();
    let crowd = |place: &Taken| counts.get(&place.network) == Some(&most);
    let begun = |place: &Taken| place.received.load(Ordering::Relaxed) >= BEGUN;
    let all_begun = taken.iter().filter(|place| crowd(place)).all(begun);
    let candidates: Vec<usize> = (0..taken.len())
        .filter(|i| taken.get(*i).is_some_and(|p| crowd(p) && (all_begun || !begun(p))))
        .collect();
    let Some(at) = candidates.get(rand::random_range(0..candidates.len().max(1))) else { return };
    taken.swap_remove(*at).evicted.cancel();
}

/// The /24 or /64 that an address lies in: what one party commonly has at its disposal.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(a) => Ipv4Addr::from_bits(a.to_bits() & !0xff).into(),
        IpAddr::V6(a) => Ipv6Addr::from_bits(a.to_bits() & !u128::from(u64::MAX)).into(),
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.lock().retain(|place| place.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(places: &Places, peer: &str) -> Place {
        places.take(peer.parse().unwrap())
    }

    #[test]
    fn there_are_never_more_than_the_maximum() {
        let places = Places::new(2);
        let mut held = Vec::new();
        for i in 0..50 {
            held.push(take(&places, &format!("::ffff:10.0.0.{i}")));
            assert!(places.in_use() <= 2);
            assert!(!held.last().unwrap().evicted.is_cancelled());
        }
        assert_eq!(held.iter().filter(|place| !place.evicted.is_cancelled()).count(), 2);
        drop(held);
        assert_eq!(places.in_use(), 0);
    }

    #[test]
    fn who_holds_most_places_gives_one() {
        let places = Places::new(8);
        let slow = take(&places, "10.9.0.1");
        let slow6 = take(&places, "fd00:9::1");
        let mut flood: Vec<Place> = Vec::new();
        for i in 0..100u8 {
            flood.push(take(&places, &format!("10.0.0.{i}")));
            flood.push(take(&places, &format!("fd00::{i}")));
            flood.retain(|place| !place.evicted.is_cancelled());
        }
        assert!(!slow.evicted.is_cancelled() && !slow6.evicted.is_cancelled());
        assert_eq!((places.in_use(), flood.len()), (8, 6));
    }

    #[test]
    fn who_has_said_something_stays_while_others_have_not() {
        let places = Places::new(8);
        let real = take(&places, "10.0.0.1");
        real.received.store(BEGUN, Ordering::Relaxed);
        let flood: Vec<Place> = (0..200).map(|_| take(&places, "10.0.0.2")).collect();
        assert!(!real.evicted.is_cancelled());
        for place in &flood {
            place.received.store(BEGUN, Ordering::Relaxed);
        }
        let _more: Vec<Place> = (0..2).map(|_| take(&places, "10.0.0.3")).collect();
        assert_eq!(places.in_use(), 8);
    }
}
