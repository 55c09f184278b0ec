//! Limits the connections whose peers have not authenticated yet.
//!
//! Peers that open connections and send nothing must not keep honest ones out. When all permits are in use, a newcomer
//! takes one from the network that holds the most, preferably from a peer that has sent little so far, picked at random.
//! A flood therefore evicts mostly its own connections, and an honest peer that is evicted has a new chance whenever it
//! connects again.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use tokio_util::sync::CancellationToken;

/// The number of bytes received from which on a handshake counts as begun: an SSH peer has sent its version and its offer
/// of algorithms (RFC 4253 §7.1) by then.
pub const BEGUN: usize = 512;

/// A bounded number of permits, one of which is revoked when a newcomer finds all in use.
#[derive(Clone, Debug)]
pub struct HandshakePermits {
    max: usize,
    in_use: Arc<Mutex<Vec<InUse>>>,
    counter: Arc<AtomicU64>,
}

#[derive(Debug)]
struct InUse {
    id: u64,
    network: IpAddr,
    received: Arc<AtomicUsize>,
    evicted: CancellationToken,
}

/// The permit of one connection. Dropping it returns it.
#[derive(Debug)]
pub struct HandshakePermit {
    id: u64,
    permits: HandshakePermits,
    /// Bytes that the peer has sent, counted by whoever reads them.
    pub received: Arc<AtomicUsize>,
    /// Cancelled when the permit is revoked.
    pub evicted: CancellationToken,
}

impl HandshakePermits {
    pub fn new(max: usize) -> Self {
        Self { max: max.max(1), in_use: Arc::default(), counter: Arc::default() }
    }

    /// A permit for a connection from `peer`.
    pub fn take(&self, peer: IpAddr) -> HandshakePermit {
        self.take_or_cancel(peer, CancellationToken::new())
    }

    /// A permit that cancels `evicted` when it is revoked, for a connection that holds several of them.
    pub fn take_or_cancel(&self, peer: IpAddr, evicted: CancellationToken) -> HandshakePermit {
        let id = self.counter.fetch_add(1, Ordering::Relaxed);
        let received = Arc::<AtomicUsize>::default();
        let mut in_use = self.lock();
        if in_use.len() >= self.max {
            evict(&mut in_use);
        }
        in_use.push(InUse {
            id,
            network: network(peer),
            received: received.clone(),
            evicted: evicted.clone(),
        });
        HandshakePermit { id, permits: self.clone(), received, evicted }
    }

    pub fn in_use(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<InUse>> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn evict(in_use: &mut Vec<InUse>) {
    let mut counts: HashMap<IpAddr, usize> = HashMap::new();
    for permit in in_use.iter() {
        *counts.entry(permit.network).or_default() += 1;
    }
    let most = counts.values().copied().max().unwrap_or_default();
    let crowd = |permit: &InUse| counts.get(&permit.network) == Some(&most);
    let begun = |permit: &InUse| permit.received.load(Ordering::Relaxed) >= BEGUN;
    let all_begun = in_use.iter().filter(|permit| crowd(permit)).all(begun);
    let candidates: Vec<usize> = (0..in_use.len())
        .filter(|i| in_use.get(*i).is_some_and(|p| crowd(p) && (all_begun || !begun(p))))
        .collect();
    let Some(at) = candidates.get(rand::random_range(0..candidates.len().max(1))) else { return };
    in_use.swap_remove(*at).evicted.cancel();
}

/// The /24 or /64 network of an address, which is what one party commonly has at its disposal.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(a) => Ipv4Addr::from_bits(a.to_bits() & !0xff).into(),
        IpAddr::V6(a) => Ipv6Addr::from_bits(a.to_bits() & !u128::from(u64::MAX)).into(),
    }
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        self.permits.lock().retain(|permit| permit.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(permits: &HandshakePermits, peer: &str) -> HandshakePermit {
        permits.take(peer.parse().unwrap())
    }

    #[test]
    fn there_are_never_more_permits_than_the_maximum() {
        let permits = HandshakePermits::new(2);
        let mut held = Vec::new();
        for i in 0..50 {
            held.push(take(&permits, &format!("::ffff:10.0.0.{i}")));
            assert!(permits.in_use() <= 2);
            assert!(!held.last().unwrap().evicted.is_cancelled());
        }
        assert_eq!(held.iter().filter(|permit| !permit.evicted.is_cancelled()).count(), 2);
        drop(held);
        assert_eq!(permits.in_use(), 0);
    }

    #[test]
    fn a_newcomer_takes_the_permit_of_the_largest_network() {
        let permits = HandshakePermits::new(8);
        let slow = take(&permits, "10.9.0.1");
        let slow6 = take(&permits, "fd00:9::1");
        let mut flood: Vec<HandshakePermit> = Vec::new();
        for i in 0..100u8 {
            flood.push(take(&permits, &format!("10.0.0.{i}")));
            flood.push(take(&permits, &format!("fd00::{i}")));
            flood.retain(|permit| !permit.evicted.is_cancelled());
        }
        assert!(!slow.evicted.is_cancelled() && !slow6.evicted.is_cancelled());
        assert_eq!((permits.in_use(), flood.len()), (8, 6));
    }

    #[test]
    fn a_peer_that_has_sent_something_stays_while_others_have_not() {
        let permits = HandshakePermits::new(8);
        let real = take(&permits, "10.0.0.1");
        real.received.store(BEGUN, Ordering::Relaxed);
        let flood: Vec<HandshakePermit> = (0..200).map(|_| take(&permits, "10.0.0.2")).collect();
        assert!(!real.evicted.is_cancelled());
        for permit in &flood {
            permit.received.store(BEGUN, Ordering::Relaxed);
        }
        let _more: Vec<HandshakePermit> = (0..2).map(|_| take(&permits, "10.0.0.3")).collect();
        assert_eq!(permits.in_use(), 8);
    }
}
