//! What node-agent counts. All names begin with `node_agent_`.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use proto_net::stalls;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Result {
    pub result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Rule {
    pub rule: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Direction {
    pub direction: &'static str,
}

/// The agent's metrics.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// SSH sessions that have authenticated and not ended.
    pub sessions: Gauge,
    /// SSH handshakes by outcome.
    pub handshakes: Family<Result, Counter>,
    /// Streams that have not ended.
    pub streams: Gauge,
    /// Dials by outcome: `ok` or the kind of error.
    pub dials: Family<Result, Counter>,
    /// Dials refused by policy, by rule.
    pub refusals: Family<Rule, Counter>,
    /// Bytes carried for streams that have ended.
    pub bytes: Family<Direction, Counter>,
    /// Callers of the local endpoint by outcome: `ok` or the kind of error.
    pub front_end_callers: Family<Result, Counter>,
    /// Their streams that have not ended.
    pub front_end_streams: Gauge,
    /// Bytes carried for those that have.
    pub front_end_bytes: Family<Direction, Counter>,
    /// Waits of what is sent to masters.
    pub stalls: stalls::ByDirection,
    /// When the host certificate expires, seconds since the epoch; 0 without one.
    pub certificate_expiry: Gauge<f64, AtomicU64>,
    /// Host certificates received by renewal.
    pub renewals: Family<Result, Counter>,
}

impl Metrics {
    pub fn register(&self) -> Registry {
        let mut r = Registry::with_prefix("node_agent");
        r.register("sessions", "SSH sessions that are authenticated", self.sessions.clone());
        r.register("handshakes", "SSH handshakes by result", self.handshakes.clone());
        r.register("streams", "Streams that are open", self.streams.clone());
        r.register("dials", "Dials by result", self.dials.clone());
        r.register("policy_refusals", "Dials refused by policy, by rule", self.refusals.clone());
        r.register(
            "stream_bytes",
            "Bytes of ended streams: up to targets, down from them",
            self.bytes.clone(),
        );
        r.register_collector(Box::new(self.stalls.clone()));
        r.register(
            "front_end_callers",
            "Callers of the local endpoint by result",
            self.front_end_callers.clone(),
        );
        r.register(
            "front_end_streams",
            "Streams to front ends that are open",
            self.front_end_streams.clone(),
        );
        r.register(
            "front_end_stream_bytes",
            "Bytes of ended streams: up to front ends, down from them",
            self.front_end_bytes.clone(),
        );
        r.register(
            "host_certificate_expiry_timestamp_seconds",
            "When the host certificate expires",
            self.certificate_expiry.clone(),
        );
        r.register("certificate_renewals", "Host certificates received, by result", self.renewals.clone());
        r
    }
}
