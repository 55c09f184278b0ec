//! Limits the connections whose peers have not authenticated yet.
//!
//! Peers that open connections and send nothing must not keep honest ones out. When all permits are in use, a newcomer
//! takes one from the network that holds the most, preferably from a peer that has sent little so far. A flood therefore
//! evicts mostly its own connections.
//!
//! A listener chooses what that means for a burst of honest peers. [`HandshakePermits::take`] never waits and picks the
//! victim at random, so that an honest peer that is evicted has a new chance whenever it connects again.
//! [`HandshakePermits::acquire`] lets a burst wait, and evicts only peers that have had the time to get further: it is for
//! callers who do not try again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

/// The number of bytes received from which on a handshake counts as begun: an SSH peer has sent its version and its offer
/// of algorithms (RFC 4253 §7.1) by then.
pub const BEGUN: usize = 512;

/// How long a peer may take to begin its handshake before [`HandshakePermits::acquire`] evicts it. A TLS client sends its
/// first bytes as soon as it is connected.
const SILENCE: Duration = Duration::from_millis(250);
/// How long a handshake that has begun may take before [`HandshakePermits::acquire`] evicts it.
const PATIENCE: Duration = Duration::from_secs(5);

/// A bounded number of permits, one of which is revoked when a newcomer finds all in use.
#[derive(Clone, Debug)]
pub struct HandshakePermits {
    max: usize,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    in_use: Mutex<InUse>,
    returned: Notify,
}

/// The permit of one connection. Dropping it returns it.
#[derive(Debug)]
pub struct HandshakePermit {
    id: u64,
    network: IpAddr,
    permits: HandshakePermits,
    /// Bytes that the peer has sent, counted by whoever reads them.
    pub received: Arc<AtomicUsize>,
    /// Cancelled when the permit is revoked.
    pub evicted: CancellationToken,
}

impl HandshakePermits {
    pub fn new(max: usize) -> Self {
        Self { max: max.max(1), shared: Arc::default() }
    }

    /// A permit for a connection from `peer`.
    pub fn take(&self, peer: IpAddr) -> HandshakePermit {
        self.take_or_cancel(peer, CancellationToken::new())
    }

    /// A permit that cancels `evicted` when it is revoked, for a connection that holds several of them.
    pub fn take_or_cancel(&self, peer: IpAddr, evicted: CancellationToken) -> HandshakePermit {
        let mut in_use = self.lock();
        if in_use.total >= self.max {
            in_use.evict_any();
        }
        self.grant(&mut in_use, peer, evicted)
    }

    /// A permit for a connection from `peer`. While all are in use by peers that are still within their time, this waits:
    /// a listener that accepts nothing meanwhile leaves a burst in the kernel's queue. Cancel-safe.
    pub async fn acquire(&self, peer: IpAddr) -> HandshakePermit {
        loop {
            let returned = self.shared.returned.notified();
            let evictable = {
                let mut in_use = self.lock();
                if in_use.total < self.max || in_use.evict_late(Instant::now()) {
                    return self.grant(&mut in_use, peer, CancellationToken::new());
                }
                in_use.next_late()
            };
            let evictable = evictable.unwrap_or_else(|| Instant::now() + SILENCE);
            let _ = timeout_at(evictable, returned).await;
        }
    }

    pub fn in_use(&self) -> usize {
        self.lock().total
    }

    fn grant(&self, in_use: &mut InUse, peer: IpAddr, evicted: CancellationToken) -> HandshakePermit {
        let (network, received) = (network(peer), Arc::<AtomicUsize>::default());
        let entry = Entry { since: Instant::now(), received: received.clone(), evicted: evicted.clone() };
        let id = in_use.insert(network, entry);
        HandshakePermit { id, network, permits: self.clone(), received, evicted }
    }

    fn lock(&self) -> MutexGuard<'_, InUse> {
        self.shared.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HandshakePermit {
    /// Says that the peer has begun its handshake, where nobody counts its bytes.
    pub fn begun(&self) {
        self.received.store(BEGUN, Ordering::Relaxed);
    }
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        self.permits.lock().remove(self.network, self.id);
        self.permits.shared.returned.notify_one();
    }
}

/// The permits in use. All that is done for a connection takes logarithmic time.
#[derive(Debug, Default)]
struct InUse {
    last_id: u64,
    total: usize,
    networks: HashMap<IpAddr, Network>,
    /// The networks, by the number of their permits.
    by_size: BTreeSet<(usize, IpAddr)>,
}

/// The permits of one network by id, and therefore by age.
#[derive(Debug, Default)]
struct Network {
    /// Those whose peers had sent little when they were last looked at.
    silent: BTreeMap<u64, Entry>,
    begun: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    since: Instant,
    received: Arc<AtomicUsize>,
    evicted: CancellationToken,
}

impl InUse {
    fn insert(&mut self, address: IpAddr, entry: Entry) -> u64 {
        self.last_id += 1;
        let network = self.networks.entry(address).or_default();
        self.by_size.remove(&(network.len(), address));
        network.silent.insert(self.last_id, entry);
        self.by_size.insert((network.len(), address));
        self.total += 1;
        self.last_id
    }

    fn remove(&mut self, address: IpAddr, id: u64) -> Option<Entry> {
        let network = self.networks.get_mut(&address)?;
        let before = network.len();
        let entry = network.silent.remove(&id).or_else(|| network.begun.remove(&id))?;
        self.by_size.remove(&(before, address));
        if before > 1 {
            self.by_size.insert((before - 1, address));
        } else {
            self.networks.remove(&address);
        }
        self.total -= 1;
        Some(entry)
    }

    /// The network with the most permits.
    fn crowd(&mut self) -> Option<(IpAddr, &mut Network)> {
        let (_, address) = *self.by_size.last()?;
        self.networks.get_mut(&address).map(|network| (address, network))
    }

    fn evict(&mut self, address: IpAddr, id: u64) {
        if let Some(entry) = self.remove(address, id) {
            entry.evicted.cancel();
        }
    }

    /// Evicts a random one of the crowd.
    fn evict_any(&mut self) {
        let start = |of: &BTreeMap<u64, Entry>| match (of.first_key_value(), of.last_key_value()) {
            (Some((first, _)), Some((last, _))) => rand::random_range(*first..=*last),
            _ => 0,
        };
        let Some((address, network)) = self.crowd() else { return };
        let silent = network.silent_from(start(&network.silent));
        let id = silent.or_else(|| from(&network.begun, start(&network.begun)).map(|(id, _)| id));
        if let Some(id) = id {
            self.evict(address, id);
        }
    }

    /// Evicts the oldest of the crowd that has had its time; `false` if none has.
    fn evict_late(&mut self, now: Instant) -> bool {
        let Some((address, network)) = self.crowd() else { return false };
        let late = network.oldest().into_iter().flatten().find(|(_, at)| *at <= now);
        if let Some((id, _)) = late {
            self.evict(address, id);
        }
        late.is_some()
    }

    /// When the next one of the crowd will have had its time.
    fn next_late(&mut self) -> Option<Instant> {
        self.crowd()?.1.oldest().into_iter().flatten().map(|(_, at)| at).min()
    }
}

impl Network {
    fn len(&self) -> usize {
        self.silent.len() + self.begun.len()
    }

    /// The first silent permit from an id on, or else the first of all.
    fn silent_from(&mut self, start: u64) -> Option<u64> {
        loop {
            let (id, entry) = from(&self.silent, start)?;
            if entry.received.load(Ordering::Relaxed) < BEGUN {
                return Some(id);
            }
            let entry = self.silent.remove(&id)?;
            self.begun.insert(id, entry);
        }
    }

    /// The oldest permit of a silent peer and of one that has begun, with the time from which on each can be evicted.
    fn oldest(&mut self) -> [Option<(u64, Instant)>; 2] {
        let silent = self.silent_from(0);
        let silent = silent.and_then(|id| Some((id, self.silent.get(&id)?.since + SILENCE)));
        [silent, from(&self.begun, 0).map(|(id, entry)| (id, entry.since + PATIENCE))]
    }
}

/// The first entry from an id on, or else the first of all.
fn from(entries: &BTreeMap<u64, Entry>, start: u64) -> Option<(u64, &Entry)> {
    entries.range(start..).next().or_else(|| entries.first_key_value()).map(|(id, entry)| (*id, entry))
}

/// The /24 or /64 network of an address, which is what one party commonly has at its disposal.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(a) => Ipv4Addr::from_bits(a.to_bits() & !0xff).into(),
        IpAddr::V6(a) => Ipv6Addr::from_bits(a.to_bits() & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::Tasks;

    fn take(permits: &HandshakePermits, peer: &str) -> HandshakePermit {
        permits.take(peer.parse().unwrap())
    }

    async fn acquire(permits: &HandshakePermits, peer: &str) -> HandshakePermit {
        permits.acquire(peer.parse().unwrap()).await
    }

    fn evicted(permits: &[HandshakePermit]) -> usize {
        permits.iter().filter(|permit| permit.evicted.is_cancelled()).count()
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
        assert_eq!(evicted(&held), 48);
        drop(held);
        assert_eq!(permits.in_use(), 0);
        let in_use = permits.lock();
        assert!(in_use.networks.is_empty() && in_use.by_size.is_empty());
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
        real.begun();
        let flood: Vec<HandshakePermit> = (0..200).map(|_| take(&permits, "10.0.0.2")).collect();
        assert!(!real.evicted.is_cancelled());
        for permit in &flood {
            permit.begun();
        }
        let _more: Vec<HandshakePermit> = (0..2).map(|_| take(&permits, "10.0.0.3")).collect();
        assert_eq!(permits.in_use(), 8);
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_waits_for_those_before_it_and_evicts_nobody() {
        const TAKES: Duration = Duration::from_secs(1);
        let (permits, tasks) = (HandshakePermits::new(16), Tasks::new());
        let (began, done) = (Instant::now(), Arc::<AtomicUsize>::default());
        for _ in 0..160 {
            let (permit, done) = (acquire(&permits, "10.0.0.1").await, done.clone());
            permit.begun();
            tasks.spawn(async move {
                tokio::select! {
                    () = tokio::time::sleep(TAKES) => done.fetch_add(1, Ordering::Relaxed),
                    () = permit.evicted.cancelled() => panic!("an honest peer is evicted"),
                }
            });
        }
        tasks.drain(TAKES * 2).await;
        assert_eq!((done.load(Ordering::Relaxed), began.elapsed().as_secs()), (160, 10));
    }

    #[tokio::test(start_paused = true)]
    async fn a_permit_that_comes_back_ends_the_wait() {
        let permits = HandshakePermits::new(1);
        let first = acquire(&permits, "10.0.0.1").await;
        first.begun();
        let began = Instant::now();
        let give_back = async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            drop(first);
        };
        let (second, ()) = tokio::join!(acquire(&permits, "10.0.0.1"), give_back);
        assert_eq!((began.elapsed(), second.evicted.is_cancelled()), (Duration::from_millis(10), false));
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_silent_peer_of_the_crowd_gives_way_first() {
        let permits = HandshakePermits::new(4);
        let alone = acquire(&permits, "10.9.0.1").await;
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(acquire(&permits, "10.0.0.1").await);
            tokio::time::advance(SILENCE).await;
        }
        held[0].begun();
        for expected in [[false, true, false], [false, true, true], [false, true, true]] {
            held.push(acquire(&permits, "10.0.0.1").await);
            assert_eq!([0, 1, 2].map(|i| held[i].evicted.is_cancelled()), expected);
        }
        // Nobody was left who had been silent for long enough.
        assert!(held[3].evicted.is_cancelled() && !alone.evicted.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_that_stalls_gives_way_once_it_has_had_its_time() {
        let permits = HandshakePermits::new(1);
        let stalled = acquire(&permits, "10.0.0.1").await;
        stalled.begun();
        let began = Instant::now();
        let _next = acquire(&permits, "10.0.0.1").await;
        assert!(stalled.evicted.is_cancelled());
        assert_eq!(began.elapsed(), PATIENCE);
    }
}
