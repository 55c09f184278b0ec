//! Limits the connections whose peers have not authenticated yet.
//!
//! Peers that open connections and send nothing must not keep honest ones out. When all permits are in use, a newcomer
//! takes one from the network that holds the most, preferably from a peer that has sent little so far. A flood therefore
//! evicts mostly its own connections.
//!
//! A listener chooses what that means for a burst of honest peers. [`HandshakePermits::take`] never waits and picks the
//! victim at random, so that an honest peer that is evicted has a new chance whenever it connects again.
//! [`HandshakePermits::acquire`] lets a burst wait: it evicts peers that have had the time to get further, and others only
//! for a newcomer whose network holds fewer permits than theirs. It is for callers who do not try again.

use std::{
    collections::{BTreeSet, HashMap},
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
/// first bytes as soon as it is connected; there is time to send them again if they are lost.
const SILENCE: Duration = Duration::from_secs(1);
/// How long a handshake that has begun may take before [`HandshakePermits::acquire`] evicts it.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many times as many permits as a newcomer's network another one must hold for the newcomer to be no part of a crowd.
const CROWD: usize = 4;

/// How much room there is for a newcomer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    Enough,
    /// There are free permits, but the handshakes in progress are many.
    Little,
    /// There are no free permits, and the newcomer would take one of its own crowd.
    Exhausted,
}

/// A bounded number of permits, one of which is revoked when a newcomer finds all in use.
#[derive(Clone, Debug)]
pub struct HandshakePermits {
    max: usize,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    in_use: Mutex<InUse>,
    /// Held by the first of those who wait; the others queue for it.
    turn: tokio::sync::Mutex<()>,
    returned: Notify,
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
        Self { max: max.max(1), shared: Arc::default() }
    }

    /// A permit for a connection from `peer`.
    pub fn take(&self, peer: IpAddr) -> HandshakePermit {
        self.take_or_cancel(peer, CancellationToken::new())
    }

    /// A permit that cancels `evicted` when it is revoked, for a connection that holds several of them.
    pub fn take_or_cancel(&self, peer: IpAddr, evicted: CancellationToken) -> HandshakePermit {
        let mut in_use = self.lock();
        if in_use.total() >= self.max {
            in_use.evict_any();
        }
        self.grant(&mut in_use, network(peer), evicted)
    }

    /// A permit for a connection from `peer`. While all are in use by peers that are still within their time, this waits,
    /// and callers get permits in their order. Whoever comes from a network that holds fewer permits than another one does
    /// not wait: the oldest of the network with the most gives way. Cancel-safe.
    pub async fn acquire(&self, peer: IpAddr) -> HandshakePermit {
        let network = network(peer);
        if let Some(permit) = self.try_acquire(network, false) {
            return permit;
        }
        let _turn = self.shared.turn.lock().await;
        loop {
            let returned = self.shared.returned.notified();
            if let Some(permit) = self.try_acquire(network, true) {
                return permit;
            }
            let late = self.lock().next_late();
            let _ = timeout_at(late.unwrap_or_else(Instant::now), returned).await;
        }
    }

    pub fn in_use(&self) -> usize {
        self.lock().total()
    }

    /// How much room there is for a connection from `peer`, where `many` handshakes in progress are a burden. There is
    /// always enough for a network that holds few permits while another one holds many of them.
    pub fn room(&self, peer: IpAddr, many: usize) -> Room {
        let in_use = self.lock();
        let held = in_use.ids(Some(network(peer))).map_or(0, ByAge::len);
        let most = in_use.by_size.last().map_or(0, |(most, _, _)| *most);
        if in_use.total() < many.min(self.max) || (held + 1) * CROWD <= most {
            Room::Enough
        } else if in_use.total() < self.max {
            Room::Little
        } else {
            Room::Exhausted
        }
    }

    /// A permit that need not be waited for. `in_turn` says that nobody has been waiting for longer.
    fn try_acquire(&self, network: IpAddr, in_turn: bool) -> Option<HandshakePermit> {
        let mut in_use = self.lock();
        let holds_less = in_use.holds_less(network);
        let granted = (in_turn || holds_less)
            && (in_use.total() < self.max
                || in_use.evict_late(Instant::now())
                || (holds_less && in_use.evict_oldest()));
        granted.then(|| self.grant(&mut in_use, network, CancellationToken::new()))
    }

    fn grant(&self, in_use: &mut InUse, network: IpAddr, evicted: CancellationToken) -> HandshakePermit {
        let received = Arc::<AtomicUsize>::default();
        let entry =
            Entry { network, since: Instant::now(), received: received.clone(), evicted: evicted.clone() };
        HandshakePermit { id: in_use.insert(entry), permits: self.clone(), received, evicted }
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
        self.permits.lock().remove(self.id);
        self.permits.shared.returned.notify_one();
    }
}

/// The permits in use. All that is done for a connection takes logarithmic time.
#[derive(Debug, Default)]
struct InUse {
    last_id: u64,
    entries: HashMap<u64, Entry>,
    /// The ids of all entries.
    all: ByAge,
    networks: HashMap<IpAddr, Network>,
    /// The networks by the number of their permits, and those with the same number by rank.
    by_size: BTreeSet<(usize, u64, IpAddr)>,
}

#[derive(Debug)]
struct Entry {
    network: IpAddr,
    since: Instant,
    received: Arc<AtomicUsize>,
    evicted: CancellationToken,
}

#[derive(Debug)]
struct Network {
    ids: ByAge,
    /// Random, so that nobody can choose addresses that are evicted last.
    rank: u64,
}

/// Permits by id, and therefore by age.
#[derive(Debug, Default)]
struct ByAge {
    /// Those whose peers had sent little when they were last looked at.
    silent: BTreeSet<u64>,
    begun: BTreeSet<u64>,
}

impl InUse {
    fn total(&self) -> usize {
        self.entries.len()
    }

    fn insert(&mut self, entry: Entry) -> u64 {
        self.last_id += 1;
        let (id, address) = (self.last_id, entry.network);
        let network = self
            .networks
            .entry(address)
            .or_insert_with(|| Network { ids: ByAge::default(), rank: rand::random() });
        self.by_size.remove(&(network.ids.len(), network.rank, address));
        network.ids.silent.insert(id);
        self.by_size.insert((network.ids.len(), network.rank, address));
        self.all.silent.insert(id);
        self.entries.insert(id, entry);
        id
    }

    fn remove(&mut self, id: u64) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.all.remove(id);
        let network = self.networks.get_mut(&entry.network)?;
        self.by_size.remove(&(network.ids.len(), network.rank, entry.network));
        network.ids.remove(id);
        if network.ids.len() > 0 {
            self.by_size.insert((network.ids.len(), network.rank, entry.network));
        } else {
            self.networks.remove(&entry.network);
        }
        Some(entry)
    }

    /// The network with the most permits.
    fn crowd(&self) -> Option<IpAddr> {
        self.by_size.last().map(|(_, _, address)| *address)
    }

    /// Whether another network holds more permits than this one will with one more.
    fn holds_less(&self, address: IpAddr) -> bool {
        let held = self.ids(Some(address)).map_or(0, ByAge::len);
        self.by_size.last().is_some_and(|(most, _, _)| *most > held + 1)
    }

    /// Evicts a random one of the crowd, if possible one that is silent.
    fn evict_any(&mut self) {
        let crowd = self.crowd();
        let start = self.ids(crowd).map_or(0, |ids| random(&ids.silent));
        let id = self.silent_from(crowd, start).or_else(|| {
            let begun = &self.ids(crowd)?.begun;
            from(begun, random(begun))
        });
        self.evict(id);
    }

    /// Evicts the oldest that has had its time, if possible one of the crowd; `false` if none has.
    fn evict_late(&mut self, now: Instant) -> bool {
        let crowd = self.crowd();
        let oldest = [self.oldest(crowd), self.oldest(None)];
        let late = oldest.into_iter().flatten().flatten().find(|(_, at)| *at <= now);
        self.evict(late.map(|(id, _)| id))
    }

    /// Evicts the oldest of the crowd, if possible one that is silent.
    fn evict_oldest(&mut self) -> bool {
        let crowd = self.crowd();
        let oldest = self.oldest(crowd).into_iter().flatten().next();
        self.evict(oldest.map(|(id, _)| id))
    }

    fn evict(&mut self, id: Option<u64>) -> bool {
        let entry = id.and_then(|id| self.remove(id));
        entry.inspect(|entry| entry.evicted.cancel()).is_some()
    }

    /// When the next one will have had its time.
    fn next_late(&mut self) -> Option<Instant> {
        self.oldest(None).into_iter().flatten().map(|(_, at)| at).min()
    }

    /// The oldest permit of a silent peer and of one that has begun, of a network or of all. Each has the time from which
    /// on it is late.
    fn oldest(&mut self, of: Option<IpAddr>) -> [Option<(u64, Instant)>; 2] {
        let silent = self.silent_from(of, 0);
        let begun = self.ids(of).and_then(|ids| from(&ids.begun, 0));
        let late = |id: u64, time: Duration| Some((id, self.entries.get(&id)?.since + time));
        [silent.and_then(|id| late(id, SILENCE)), begun.and_then(|id| late(id, PATIENCE))]
    }

    /// The first silent permit from an id on, or else the first silent one, of a network or of all.
    fn silent_from(&mut self, of: Option<IpAddr>, start: u64) -> Option<u64> {
        loop {
            let id = from(&self.ids(of)?.silent, start)?;
            let entry = self.entries.get(&id)?;
            if entry.received.load(Ordering::Relaxed) < BEGUN {
                return Some(id);
            }
            self.all.begin(id);
            self.networks.get_mut(&entry.network)?.ids.begin(id);
        }
    }

    /// The permits of a network, or of all.
    fn ids(&self, of: Option<IpAddr>) -> Option<&ByAge> {
        match of {
            Some(address) => self.networks.get(&address).map(|network| &network.ids),
            None => Some(&self.all),
        }
    }
}

impl ByAge {
    fn len(&self) -> usize {
        self.silent.len() + self.begun.len()
    }

    fn begin(&mut self, id: u64) {
        self.silent.remove(&id);
        self.begun.insert(id);
    }

    fn remove(&mut self, id: u64) {
        if !self.silent.remove(&id) {
            self.begun.remove(&id);
        }
    }
}

/// The first id from a number on, or else the first of all.
fn from(ids: &BTreeSet<u64>, start: u64) -> Option<u64> {
    ids.range(start..).next().or_else(|| ids.first()).copied()
}

/// A random number between the first and the last id.
fn random(ids: &BTreeSet<u64>) -> u64 {
    match (ids.first(), ids.last()) {
        (Some(first), Some(last)) => rand::random_range(*first..=*last),
        _ => 0,
    }
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
        assert!(in_use.networks.is_empty() && in_use.by_size.is_empty() && in_use.all.len() == 0);
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
    fn a_crowd_finds_little_room_and_others_enough() {
        let permits = HandshakePermits::new(8);
        let room = |peer: &str| permits.room(peer.parse().unwrap(), 4);
        let mut held: Vec<_> = (0..3).map(|i| take(&permits, &format!("10.0.{i}.1"))).collect();
        assert_eq!(room("10.0.0.1"), Room::Enough);
        held.push(take(&permits, "10.0.3.1"));
        // Each comes from a network of its own, and so none is a crowd that others have to be protected from.
        assert_eq!([room("10.0.0.1"), room("10.0.9.1")], [Room::Little; 2]);
        held.truncate(1);
        held.extend((0..7).map(|i| take(&permits, &format!("10.0.0.{i}"))));
        assert_eq!(room("10.0.0.9"), Room::Exhausted);
        assert_eq!([room("10.0.9.1"), room("fd00::1")], [Room::Enough; 2]);
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
        alone.begun();
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

    /// Permits of peers that have begun their handshakes.
    async fn begun(permits: &HandshakePermits, peers: impl Iterator<Item = String>) -> Vec<HandshakePermit> {
        let mut held = Vec::new();
        for peer in peers {
            held.push(acquire(permits, &peer).await);
        }
        for permit in &held {
            permit.begun();
        }
        held
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_of_one_network_who_have_begun_make_only_each_other_wait() {
        let permits = HandshakePermits::new(8);
        let strangers = begun(&permits, (0..8).map(|i| format!("10.0.0.{i}"))).await;
        let start = Instant::now();
        let others = async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let arrived = Instant::now();
            let others = begun(&permits, (0..4).map(|_| "10.1.0.1".to_owned())).await;
            assert_eq!(arrived.elapsed(), Duration::ZERO);
            let given_way: Vec<_> = strangers.iter().map(|permit| permit.evicted.is_cancelled()).collect();
            assert_eq!(given_way, [[true; 4], [false; 4]].concat());
            others
        };
        // A stranger is the first to wait, and both networks have the same share afterwards.
        let (waited, others) = tokio::join!(acquire(&permits, "10.0.0.9"), others);
        assert_eq!(start.elapsed(), PATIENCE);
        assert_eq!((waited.evicted.is_cancelled(), evicted(&others)), (false, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_networks_with_one_permit_each_the_late_give_way() {
        let permits = HandshakePermits::new(64);
        let mut silent = Vec::new();
        for i in 0..64 {
            silent.push(acquire(&permits, &format!("2001:db8:0:{i:x}::1")).await);
        }
        tokio::time::advance(SILENCE).await;
        let start = Instant::now();
        // One of them always connects anew, so its own permit is never late.
        let restless = "2001:db8:0:ffff::1";
        let mut anew = acquire(&permits, restless).await;
        let mut honest = Vec::new();
        for i in 0..32 {
            drop(std::mem::replace(&mut anew, acquire(&permits, restless).await));
            honest.push(acquire(&permits, &format!("2001:db8:1:{i:x}::1")).await);
        }
        assert_eq!((start.elapsed(), evicted(&honest)), (Duration::ZERO, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_begun_in_one_of_many_networks_has_a_bounded_time() {
        let permits = HandshakePermits::new(64);
        let strangers = begun(&permits, (0..64).map(|i| format!("2001:db8:0:{i:x}::1"))).await;
        let start = Instant::now();
        let _honest = acquire(&permits, "2001:db8:1::1").await;
        assert_eq!((start.elapsed(), evicted(&strangers)), (PATIENCE, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_wait_get_permits_in_their_order() {
        let permits = HandshakePermits::new(1);
        let first = acquire(&permits, "10.0.0.1").await;
        let order = Mutex::new(Vec::new());
        let wait = async |number: u8| {
            let permit = acquire(&permits, "10.0.0.1").await;
            order.lock().unwrap().push(number);
            permit.begun();
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let give_back = async { drop(first) };
        tokio::join!(wait(1), wait(2), wait(3), give_back, wait(4));
        assert_eq!(order.into_inner().unwrap(), [1, 2, 3, 4]);
    }

    #[test]
    fn no_address_is_evicted_last() {
        let evicts_the_higher = || {
            let permits = HandshakePermits::new(2);
            let (lower, higher) = (take(&permits, "10.0.0.1"), take(&permits, "10.1.0.1"));
            let _newcomer = take(&permits, "10.2.0.1");
            assert_ne!(lower.evicted.is_cancelled(), higher.evicted.is_cancelled());
            higher.evicted.is_cancelled()
        };
        let times = (0..200).filter(|_| evicts_the_higher()).count();
        assert!((1..200).contains(&times), "{times}");
    }
}
