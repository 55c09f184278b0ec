//! The limits of [`access::limits`]. A caller that exceeds one gets an answer, and metrics count it.

use std::time::{Duration, Instant};

use access::{
    limits::{self, Exceeded, RequestKind},
    peer::Peer,
};
use hyper::StatusCode;
use prometheus_client::metrics::{counter::Counter, family::Family};

use super::counters::LimitLabel;
use crate::http::status::StatusError;

pub use access::limits::{Attempt, Counted, LimitsConfig, RequestPermit, Source};

/// Enforces limits, and counts how often each of them is exceeded.
pub struct Limits {
    limits: limits::Limits,
    limited: Family<LimitLabel, Counter>,
}

impl Limits {
    pub fn new(config: &LimitsConfig, limited: Family<LimitLabel, Counter>) -> Self {
        Self { limits: limits::Limits::new(config, Instant::now()), limited }
    }

    /// Counts a connection of a peer until the result is dropped. Returns `None` if the peer has too many.
    pub fn connection(&self, peer: &Peer) -> Option<Counted<Source>> {
        self.limits.connection(peer).inspect_err(|exceeded| self.count(exceeded.limit.name())).ok()
    }

    /// Counts that a limit was exceeded.
    pub fn count(&self, limit: &'static str) {
        self.limited.get_or_create(&LimitLabel { limit }).inc();
    }

    /// Returns the numbers of requests that are served, that wait for a seat, and that are long-running.
    pub fn requests(&self) -> (usize, usize, usize) {
        let limits::Requests { in_flight, queued, long_running } = self.limits.requests();
        (in_flight, queued, long_running)
    }

    /// Takes a request from the rate of its address, before the caller is authenticated.
    pub fn request(&self, peer: &Peer) -> Result<(), StatusError> {
        self.limits.request(peer, Instant::now()).map_err(|exceeded| self.exceeded(exceeded))
    }

    /// Begins an attempt of a peer to authenticate.
    pub fn attempt(&self, peer: &Peer) -> Attempt<'_> {
        self.limits.attempt(peer, Instant::now())
    }

    /// Takes a request from the rate of its user, and waits for a seat.
    pub async fn admit(&self, user: &str, long_running: bool) -> Result<RequestPermit, StatusError> {
        let kind = if long_running { RequestKind::LongRunning } else { RequestKind::Short };
        let admitted = self.limits.admit(user, kind, Instant::now()).await;
        admitted.map_err(|exceeded| self.exceeded(exceeded))
    }

    /// Exchanges the permit of a request whose connection has been upgraded for that of a long-running request.
    pub fn upgraded(&self, permit: RequestPermit, user: &str) -> Result<RequestPermit, StatusError> {
        self.limits.upgrade(permit, user).map_err(|exceeded| self.exceeded(exceeded))
    }

    fn exceeded(&self, exceeded: Exceeded) -> StatusError {
        self.count(exceeded.limit.name());
        exceeded.into()
    }
}

impl From<Exceeded> for StatusError {
    fn from(exceeded: Exceeded) -> Self {
        too_many(exceeded.retry_after)
    }
}

/// Returns the answer 429 with the time after which another attempt may succeed.
pub(super) fn too_many(after: Duration) -> StatusError {
    let seconds = after.as_secs_f64().ceil().max(1.0);
    let failure =
        StatusError::new(StatusCode::TOO_MANY_REQUESTS, "too many requests, please try again later");
    failure.retry_after(seconds as u32)
}
