//! The limits on each caller: connections, requests in a second, concurrent requests, and failed attempts to
//! authenticate.

mod attempt;
mod config;
mod counts;
mod exceeded;
mod seats;
mod source;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{peer::Peer, rates::Rates};

pub use attempt::Attempt;
pub use config::LimitsConfig;
pub use counts::{Counted, Counts};
pub use exceeded::{Exceeded, Limit};
pub use seats::SeatLimits;
use seats::{Busy, Seat, Seats};
pub use source::Source;

/// The number of seconds of its rate that a caller may use at once.
const BURST: u32 = 2;

/// The time to another attempt if no better time is known.
const RETRY: Duration = Duration::from_secs(1);

/// Counts what callers use, and enforces the limits.
pub struct Limits {
    addresses: Rates<Source>,
    failures: Rates<Source>,
    users: Rates<str>,
    seats: Seats,
    long_running_per_user: Counts<str>,
    long_running: Arc<Semaphore>,
    max_long_running: usize,
    connections_per_address: Counts<Source>,
    connections_per_node: Counts<Source>,
}

/// The kind of a request, which decides how long it may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    Short,
    /// A watch, a followed log, an upgraded connection or the like.
    LongRunning,
}

/// The permit to serve one request, which is held until the response has been sent.
pub enum RequestPermit {
    Seat(Seat),
    LongRunning(LongRunning),
}

/// Counts as one of its user's long-running requests, and as one of all.
pub struct LongRunning {
    _of_user: Counted<str>,
    _of_all: OwnedSemaphorePermit,
}

/// The present numbers of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requests {
    /// The number of short requests that are served.
    pub in_flight: usize,
    /// The number of short requests that wait for a seat.
    pub queued: usize,
    pub long_running: usize,
}

impl RequestPermit {
    /// Records that the response begins.
    pub fn answered(&mut self) {
        if let Self::Seat(seat) = self {
            seat.answered();
        }
    }
}

impl Limits {
    pub fn new(config: &LimitsConfig, now: Instant) -> Self {
        let burst = |per_second: u32| per_second.saturating_mul(BURST);
        let (of_address, of_user) =
            (config.requests_per_second_per_address, config.requests_per_second_per_user);
        let failures = config.failures_per_second_per_address;
        Self {
            addresses: Rates::new(of_address, burst(of_address), now),
            failures: Rates::new(failures, burst(failures), now),
            users: Rates::new(of_user, burst(of_user), now),
            seats: Seats::new(config.seats),
            long_running_per_user: Counts::new(config.long_running_per_user),
            long_running: Arc::new(Semaphore::new(config.max_long_running)),
            max_long_running: config.max_long_running,
            connections_per_address: Counts::new(config.max_connections_per_address),
            connections_per_node: Counts::new(config.max_connections_per_node),
        }
    }

    /// Counts a connection until the result is dropped.
    pub fn connection(&self, peer: &Peer) -> Result<Counted<Source>, Exceeded> {
        let (counts, limit) = match peer {
            Peer::Address(_) | Peer::Local(_) => {
                (&self.connections_per_address, Limit::ConnectionsPerAddress)
            }
            Peer::Node { .. } => (&self.connections_per_node, Limit::ConnectionsPerNode),
        };
        counts.take(&Source::of(peer)).ok_or(Exceeded { limit, retry_after: RETRY })
    }

    /// Takes a request from the rate of its address, before anything is known of its caller.
    pub fn request(&self, peer: &Peer, now: Instant) -> Result<(), Exceeded> {
        let taken = self.addresses.take(&Source::of(peer), now);
        taken.map_err(|retry_after| Exceeded { limit: Limit::RequestsPerAddress, retry_after })
    }

    /// Begins an attempt to authenticate.
    pub fn attempt(&self, peer: &Peer, now: Instant) -> Attempt<'_> {
        Attempt::new(&self.failures, Source::of(peer), now)
    }

    /// Takes a request from the rate of its user, and waits for a seat if it is short.
    pub async fn admit(
        &self,
        user: &str,
        kind: RequestKind,
        now: Instant,
    ) -> Result<RequestPermit, Exceeded> {
        let taken = self.users.take(user, now);
        taken.map_err(|retry_after| Exceeded { limit: Limit::RequestsPerUser, retry_after })?;
        match kind {
            RequestKind::LongRunning => self.long_running(user),
            RequestKind::Short => {
                let seat = self.seats.take(user).await;
                seat.map(RequestPermit::Seat)
                    .map_err(|Busy| Exceeded { limit: Limit::InFlight, retry_after: RETRY })
            }
        }
    }

    /// Turns a permit into that of a long-running request, since the connection has been upgraded.
    pub fn upgrade(&self, permit: RequestPermit, user: &str) -> Result<RequestPermit, Exceeded> {
        match permit {
            RequestPermit::LongRunning(_) => Ok(permit),
            RequestPermit::Seat(_) => self.long_running(user),
        }
    }

    /// How many requests there are now.
    pub fn requests(&self) -> Requests {
        let (in_flight, queued) = self.seats.count();
        let long_running = self.max_long_running.saturating_sub(self.long_running.available_permits());
        Requests { in_flight, queued, long_running }
    }

    fn long_running(&self, user: &str) -> Result<RequestPermit, Exceeded> {
        let of_user = self.long_running_per_user.take(user);
        let of_all = self.long_running.clone().try_acquire_owned();
        match (of_user, of_all) {
            (Some(_of_user), Ok(_of_all)) => {
                Ok(RequestPermit::LongRunning(LongRunning { _of_user, _of_all }))
            }
            (None, _) | (_, Err(_)) => Err(Exceeded { limit: Limit::LongRunning, retry_after: RETRY }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use proto_config::{Source as Origin, parse};

    use super::*;

    fn limits(yaml: &str, now: Instant) -> Limits {
        let origin = Origin { origin: "test", base_dir: std::path::Path::new("/"), check_files: false };
        let config = parse(yaml, origin, |section| Some(LimitsConfig::read(section)));
        Limits::new(&config.unwrap_or_else(|errors| panic!("{errors}")), now)
    }

    #[tokio::test(start_paused = true)]
    async fn each_limit_is_named_when_it_is_exceeded() {
        let now = Instant::now();
        let limits = limits(
            "{max_connections_per_address: 1, max_connections_per_node: 1, long_running_per_user: 1, \
             max_in_flight: 1, requests_per_second_per_address: 1, requests_per_second_per_user: 2}",
            now,
        );
        let address = Peer::Address(SocketAddr::from(([192, 0, 2, 1], 1)));
        let node = Peer::Node { name: "n1".parse().unwrap(), address: None };
        for (peer, limit) in [(&address, Limit::ConnectionsPerAddress), (&node, Limit::ConnectionsPerNode)] {
            let _one = limits.connection(peer).ok().unwrap();
            assert_eq!(limits.connection(peer).err().unwrap().limit, limit);
        }
        assert!(limits.request(&address, now).is_ok() && limits.request(&address, now).is_ok());
        assert_eq!(limits.request(&address, now).unwrap_err().limit, Limit::RequestsPerAddress);

        let mut seat = limits.admit("a", RequestKind::Short, now).await.ok().unwrap();
        let _watch = limits.admit("a", RequestKind::LongRunning, now).await.ok().unwrap();
        let refused = |admitted: Result<RequestPermit, Exceeded>| admitted.err().unwrap().limit;
        assert_eq!(limits.requests(), Requests { in_flight: 1, queued: 0, long_running: 1 });
        assert_eq!(refused(limits.admit("b", RequestKind::Short, now).await), Limit::InFlight);
        assert_eq!(refused(limits.upgrade(seat, "a")), Limit::LongRunning);
        seat = limits.admit("c", RequestKind::Short, now).await.ok().unwrap();
        assert!(matches!(limits.upgrade(seat, "c"), Ok(RequestPermit::LongRunning(_))));
        for _ in 0..2 {
            let _ = limits.admit("a", RequestKind::LongRunning, now).await;
        }
        assert_eq!(refused(limits.admit("a", RequestKind::LongRunning, now).await), Limit::RequestsPerUser);
    }
}
