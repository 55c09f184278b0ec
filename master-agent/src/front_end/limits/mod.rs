//! What one caller can take from the others.

mod config;
pub mod seats;

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hyper::StatusCode;
use prometheus_client::metrics::{counter::Counter, family::Family};
use proto::NodeName;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use self::seats::{Busy, Seat, Seats};
use super::{authn::Guard, peer::Peer};
use crate::{
    http::status::Failure,
    metrics::Limited,
    rate::{Rates, network},
};

pub use self::config::LimitsConfig;

/// Bursts are of so many seconds.
const BURST: u32 = 2;

/// Counts what callers take.
pub struct Limits {
    addresses: Rates<Source>,
    failures: Rates<Source>,
    users: Rates<String>,
    seats: Seats,
    long_running: Counts<String>,
    all_long_running: Arc<Semaphore>,
    connections: Counts<Source>,
    of_nodes: Counts<Source>,
    max_long_running: usize,
    limited: Family<Limited, Counter>,
}

/// Who shares one measure.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    Network(IpAddr),
    Node(NodeName),
    Local,
}

impl Source {
    fn of(peer: &Peer) -> Self {
        match peer {
            Peer::Address(address) => Self::Network(network(address.ip())),
            Peer::Node { name, .. } => Self::Node(name.clone()),
            Peer::Local(_) => Self::Local,
        }
    }
}

/// A request's place among those that are served, until its response has been passed on.
pub enum Place {
    Seat(Seat),
    LongRunning(LongRunning),
}

/// Counts as its user's, and among all.
pub struct LongRunning {
    _of_user: Counted<String>,
    _of_all: OwnedSemaphorePermit,
}

impl Place {
    /// The response begins.
    pub fn answered(&mut self) {
        if let Self::Seat(seat) = self {
            seat.answered();
        }
    }
}

impl Limits {
    pub fn new(config: &LimitsConfig, limited: Family<Limited, Counter>) -> Self {
        let now = Instant::now();
        let rates = |per_second: u32| (per_second, per_second.saturating_mul(BURST));
        let ((address, addresses), (failure, failures), (user, users)) = (
            rates(config.requests_per_second_per_address),
            rates(config.failures_per_second_per_address),
            rates(config.requests_per_second_per_user),
        );
        Self {
            addresses: Rates::new(address, addresses, now),
            failures: Rates::new(failure, failures, now),
            users: Rates::new(user, users, now),
            seats: Seats::new(config.seats),
            long_running: Counts::new(config.long_running_per_user),
            all_long_running: Arc::new(Semaphore::new(config.max_long_running)),
            connections: Counts::new(config.max_connections_per_address),
            of_nodes: Counts::new(config.max_connections_per_node),
            max_long_running: config.max_long_running,
            limited,
        }
    }

    /// One more connection of a peer; `None` where it has all that it may.
    pub fn connection(&self, peer: &Peer) -> Option<Counted<Source>> {
        let (counts, limit) = match peer {
            Peer::Address(_) | Peer::Local(_) => (&self.connections, "connections_per_address"),
            Peer::Node { .. } => (&self.of_nodes, "connections_per_node"),
        };
        let counted = counts.take(Source::of(peer));
        if counted.is_none() {
            self.count(limit);
        }
        counted
    }

    /// Counts what a limit turns away.
    pub fn count(&self, limit: &'static str) {
        self.limited.get_or_create(&Limited { limit }).inc();
    }

    /// Requests that are answered, that wait for that, and that are long-running.
    pub fn requests(&self) -> (usize, usize, usize) {
        let (in_flight, queued) = self.seats.count();
        let long_running = self.max_long_running.saturating_sub(self.all_long_running.available_permits());
        (in_flight, queued, long_running)
    }

    fn too_many(&self, limit: &'static str, after: Duration) -> Failure {
        self.count(limit);
        too_many(after)
    }

    /// A request from a peer, before anything is known of it.
    pub fn address(&self, peer: &Peer) -> Result<(), Failure> {
        let taken = self.addresses.take(Source::of(peer), Instant::now());
        taken.map_err(|after| self.too_many("requests_per_address", after))
    }

    /// A peer's request begins to authenticate.
    pub fn attempt(&self, peer: &Peer) -> Attempt<'_> {
        Attempt { failures: &self.failures, source: Source::of(peer), counted: AtomicBool::new(false) }
    }

    /// Waits for a user's turn.
    pub async fn place(&self, user: &str, long_running: bool) -> Result<Place, Failure> {
        let taken = self.users.take(user.to_owned(), Instant::now());
        taken.map_err(|after| self.too_many("requests_per_user", after))?;
        if long_running {
            return self.long_running(user);
        }
        let seat = self.seats.take(user).await;
        seat.map(Place::Seat).map_err(|Busy| self.too_many("in_flight", Duration::from_secs(1)))
    }

    /// The place of a request whose connection has changed to another protocol, however short it was to be.
    pub fn upgraded(&self, place: Place, user: &str) -> Result<Place, Failure> {
        match place {
            Place::LongRunning(_) => Ok(place),
            Place::Seat(_) => self.long_running(user),
        }
    }

    fn long_running(&self, user: &str) -> Result<Place, Failure> {
        let of_user = self.long_running.take(user.to_owned());
        let of_all = self.all_long_running.clone().try_acquire_owned();
        match (of_user, of_all) {
            (Some(_of_user), Ok(_of_all)) => Ok(Place::LongRunning(LongRunning { _of_user, _of_all })),
            (None, _) | (_, Err(_)) => Err(self.too_many("long_running", Duration::from_secs(1))),
        }
    }
}

/// A try to authenticate. From when it costs something it counts as a failure until it is known to be none: guesses at
/// once are no more than guesses one after the other, and one whose caller leaves before its end was one.
#[derive(Debug)]
pub struct Attempt<'a> {
    failures: &'a Rates<Source>,
    source: Source,
    counted: AtomicBool,
}

impl Guard for Attempt<'_> {
    fn pass(&self) -> Result<(), Duration> {
        if !self.counted.load(Ordering::Relaxed) {
            self.failures.take(self.source.clone(), Instant::now())?;
            self.counted.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Attempt<'_> {
    /// The caller is recognised, or could not be for no fault of its own.
    pub fn forgive(self) {
        if self.counted.into_inner() {
            self.failures.give_back(self.source, Instant::now());
        }
    }

    /// An error where there were too many failures before this one.
    pub fn fail(self) -> Result<(), Failure> {
        match self.counted.into_inner() {
            true => Ok(()),
            false => self.failures.take(self.source, Instant::now()).map_err(too_many),
        }
    }
}

pub(super) fn too_many(after: Duration) -> Failure {
    let seconds = after.as_secs_f64().ceil().max(1.0);
    let failure = Failure::new(StatusCode::TOO_MANY_REQUESTS, "too many requests, please try again later");
    failure.retry_after(seconds as u32)
}

/// How many of something each key holds.
pub struct Counts<K> {
    max: usize,
    held: Arc<Mutex<HashMap<K, usize>>>,
}

/// One of them; dropping it takes it off the count.
pub struct Counted<K: std::hash::Hash + Eq> {
    key: K,
    held: Arc<Mutex<HashMap<K, usize>>>,
}

impl<K: std::hash::Hash + Eq + Clone> Counts<K> {
    pub fn new(max: usize) -> Self {
        Self { max, held: Arc::default() }
    }

    /// `None` when the key holds all that one may.
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

impl<K: std::hash::Hash + Eq> Drop for Counted<K> {
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
    fn counts() {
        let counts = Counts::new(2);
        let (a, b) = (counts.take("a").unwrap(), counts.take("a").unwrap());
        assert!(counts.take("a").is_none() && counts.take("b").is_some());
        drop(a);
        assert!(counts.take("a").is_some());
        drop(b);
        assert!(counts.held.lock().unwrap().is_empty());
    }

    #[test]
    fn an_attempt_counts_from_when_it_costs_until_it_is_forgiven() {
        let failures = Rates::new(1, 2, Instant::now() + Duration::from_secs(60));
        let attempt =
            || Attempt { failures: &failures, source: Source::Local, counted: AtomicBool::new(false) };
        for _ in 0..10 {
            attempt().forgive();
            let good = attempt();
            assert_eq!((good.pass(), good.pass()), (Ok(()), Ok(())), "it is one, whatever it asks");
            good.forgive();
        }
        let (one, two, three) = (attempt(), attempt(), attempt());
        assert!(one.pass().is_ok() && two.pass().is_ok() && three.pass().is_err());
        three.forgive();
        assert!(attempt().fail().is_err());
        assert!(one.fail().is_ok(), "it has been counted");
        // Its caller has left before it was known what it is.
        drop(two);
        assert!(attempt().pass().is_err());
    }
}
