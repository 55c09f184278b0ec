//! The metrics of the node-agent. All names begin with `node_agent_`.

use std::{sync::atomic::AtomicU64, time::SystemTime};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use proto_net::{handover::DrainingGauges, stalls, telemetry::LinesLost};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ResultLabel {
    pub result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RuleLabel {
    pub rule: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DirectionLabel {
    pub direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabel {
    role: &'static str,
}

/// SSH sessions that have authenticated and have not ended.
#[derive(Clone, Debug)]
pub struct Sessions {
    pub masters: Gauge,
    pub people: Gauge,
    by_role: Family<RoleLabel, Gauge>,
}

impl Sessions {
    pub fn count(&self) -> i64 {
        self.masters.get() + self.people.get()
    }
}

impl Default for Sessions {
    /// Both roles have a sample from the beginning, so that an alert notices that no master has come yet.
    fn default() -> Self {
        let by_role = Family::<RoleLabel, Gauge>::default();
        let [masters, people] =
            ["master", "person"].map(|role| by_role.get_or_create_owned(&RoleLabel { role }));
        Self { masters, people, by_role }
    }
}

/// The agent's metrics.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub sessions: Sessions,
    /// SSH handshakes by outcome.
    pub handshakes: Family<ResultLabel, Counter>,
    /// Streams that have not ended.
    pub streams: Gauge,
    /// The streams of former processes.
    pub draining: DrainingGauges,
    /// Dials by outcome: `ok` or the kind of error.
    pub dials: Family<ResultLabel, Counter>,
    /// Dials refused by policy, by rule.
    pub refusals: Family<RuleLabel, Counter>,
    /// Bytes carried for streams that have ended.
    pub bytes: Family<DirectionLabel, Counter>,
    /// Callers of the local endpoint by outcome: `ok` or the kind of error.
    pub front_end_callers: Family<ResultLabel, Counter>,
    /// Streams of callers of the local endpoint that have not ended.
    pub front_end_streams: Gauge,
    /// Bytes carried for streams of such callers that have ended.
    pub front_end_bytes: Family<DirectionLabel, Counter>,
    /// How often, and how long, senders of streams wait for the master's windows.
    pub stalls: stalls::ByDirection,
    /// When the host certificate expires, in seconds since the epoch; 0 without one.
    pub certificate_expiry: Gauge<f64, AtomicU64>,
    /// Host certificates that masters have sent, by outcome.
    pub renewals: Family<ResultLabel, Counter>,
    /// Lines that are missing in the log.
    pub log_lines_lost: LinesLost,
}

impl Metrics {
    pub fn set_certificate_expiry(&self, not_after: Option<SystemTime>) {
        let seconds = not_after.and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
        self.certificate_expiry.set(seconds.unwrap_or_default().as_secs_f64());
    }

    pub fn register(&self) -> Registry {
        let mut r = Registry::with_prefix("node_agent");
        r.register("sessions", "SSH sessions that are authenticated, by role", self.sessions.by_role.clone());
        r.register("handshakes", "SSH handshakes by result", self.handshakes.clone());
        r.register("streams", "Streams that are open", self.streams.clone());
        r.register(
            "draining_processes",
            "Former processes of this agent, which end once their streams have",
            self.draining.processes.clone(),
        );
        r.register("draining_streams", "Streams of former processes", self.draining.streams.clone());
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
        self.log_lines_lost.register(&mut r);
        r
    }
}
