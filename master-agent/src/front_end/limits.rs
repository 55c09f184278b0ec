//! The limits of [`access::limits`], with what they turn away counted in metrics and answered.

use std::time::{Duration, Instant};

use access::{
    limits::{self, Exceeded, RequestKind},
    peer::Peer,
};
use hyper::StatusCode;
use prometheus_client::metrics::{counter::Counter, family::Family};

use super::counters::Limited;
use crate::http::status::Failure;

pub use access::limits::{Attempt, Counted, LimitsConfig, RequestPermit, Source};

/// Counts what callers take, and what is turned away.
pub struct Limits {
    limits: limits::Limits,
    limited: Family<Limited, Counter>,
}

impl Limits {
    pub fn new(config: &LimitsConfig, limited: Family<Limited, Counter>) -> Self {
        Self { limits: limits::Limits::new(config, Instant::now()), limited }
    }

    /// One more connection of a peer. `None` if it has all that it may.
    pub fn connection(&self, peer: &Peer) -> Option<Counted<Source>> {
        self.limits.connection(peer).inspect_err(|exceeded| self.count(exceeded.limit.name())).ok()
    }

    /// Counts what a limit turns away.
    pub fn count(&self, limit: &'static str) {
        self.limited.get_or_create(&Limited { limit }).inc();
    }

    /// Requests that are served, that wait for a seat, and that are long-running.
    pub fn requests(&self) -> (usize, usize, usize) {
        let limits::Requests { in_flight, queued, long_running } = self.limits.requests();
        (in_flight, queued, long_running)
    }

    /// A request from a peer, before anything is known of it.
    pub fn address(&self, peer: &Peer) -> Result<(), Failure> {
        self.limits.request(peer, Instant::now()).map_err(|exceeded| self.turned_away(exceeded))
    }

    /// A peer's request begins to authenticate.
    pub fn attempt(&self, peer: &Peer) -> Attempt<'_> {
        self.limits.attempt(peer, Instant::now())
    }

    /// Waits for a user's turn.
    pub async fn place(&self, user: &str, long_running: bool) -> Result<RequestPermit, Failure> {
        let kind = if long_running { RequestKind::LongRunning } else { RequestKind::Short };
        let admitted = self.limits.admit(user, kind, Instant::now()).await;
        admitted.map_err(|exceeded| self.turned_away(exceeded))
    }

    /// The permit of a request whose connection has been upgraded.
    pub fn upgraded(&self, permit: RequestPermit, user: &str) -> Result<RequestPermit, Failure> {
        self.limits.upgrade(permit, user).map_err(|exceeded| self.turned_away(exceeded))
    }

    fn turned_away(&self, exceeded: Exceeded) -> Failure {
        self.count(exceeded.limit.name());
        exceeded.into()
    }
}

impl From<Exceeded> for Failure {
    fn from(exceeded: Exceeded) -> Self {
        too_many(exceeded.retry_after)
    }
}

/// The answer 429, with the time after which trying again may help.
pub(super) fn too_many(after: Duration) -> Failure {
    let seconds = after.as_secs_f64().ceil().max(1.0);
    let failure = Failure::new(StatusCode::TOO_MANY_REQUESTS, "too many requests, please try again later");
    failure.retry_after(seconds as u32)
}
