//! What master-agent counts as it happens, for all of its parts. What is read off a part when asked, that part registers
//! itself. All names begin with `master_agent_`, but for those that dashboards for others know.

mod certificates;
mod config;
mod front_end;
mod gauge;
mod konnectivity;
mod labels;
mod rules;

use std::sync::Arc;

use prometheus_client::{
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use proto::DialError;
use proto_net::stalls;

use crate::activity::NodeActivities;

pub use certificates::{Certificates, Expiry, X509Expiry};
pub use config::MetricsConfig;
pub use front_end::{Authentication, FrontEndMetrics, Handshake, Limited, RequestOutcome};
pub use gauge::signed;
pub use konnectivity::KonnectivityCounts;
pub use labels::{DOORS, Door, DoorDirection, Outcome, Reason};
pub use rules::Rules;

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// The agent's metrics.
#[derive(Clone)]
pub struct Metrics {
    /// Where what belongs to one node is counted.
    pub nodes: Arc<dyn NodeActivities>,
    pub dials: Family<Outcome, Counter>,
    pub dial_seconds: Histogram,
    pub dials_pending: Gauge,
    pub policy_refusals: Rules,
    pub streams: Family<Door, Gauge>,
    pub stream_seconds: Histograms<Door>,
    pub stream_size: Histograms<DoorDirection>,
    /// Waits of what is sent to nodes.
    pub stalls: stalls::ByDirection,
    pub bytes: Family<DoorDirection, Counter>,
    pub bad_requests: Family<Door, Counter>,
    pub tunnel_dials: Counter,
    pub tunnel_dials_failed: Counter,
    pub tunnels_established: Counter,
    pub tunnels_lost: Family<Reason, Counter>,
    pub node_absence_seconds: Histogram,
    /// Links and handshakes that did not become a tunnel, by reason.
    pub refused: Family<Reason, Counter>,
    pub joins: Family<Reason, Counter>,
    pub certificates_renewed: Counter,
    pub inventory_reloads: Family<Reason, Counter>,
    /// Audit records of the front end that could not be written.
    pub audit_lost: Counter,
    pub front_end: Arc<FrontEndMetrics>,
    pub konnectivity: KonnectivityCounts,
}

impl Metrics {
    pub fn new(nodes: Arc<dyn NodeActivities>) -> Self {
        Self {
            nodes,
            dials: Family::default(),
            dial_seconds: dial_seconds(),
            dials_pending: Gauge::default(),
            policy_refusals: Rules::default(),
            streams: Family::default(),
            stream_seconds: Family::new_with_constructor(stream_seconds),
            stream_size: Family::new_with_constructor(stream_size),
            stalls: stalls::ByDirection::default(),
            bytes: Family::default(),
            bad_requests: Family::default(),
            tunnel_dials: Counter::default(),
            tunnel_dials_failed: Counter::default(),
            tunnels_established: Counter::default(),
            tunnels_lost: Family::default(),
            node_absence_seconds: Histogram::new([
                0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0,
            ]),
            refused: Family::default(),
            joins: Family::default(),
            certificates_renewed: Counter::default(),
            inventory_reloads: Family::default(),
            audit_lost: Counter::default(),
            front_end: Arc::default(),
            konnectivity: KonnectivityCounts::default(),
        }
    }

    /// Counts a dial that failed.
    pub fn dial_failed(&self, egress: &'static str, error: &DialError) {
        let (result, fault) = (error.kind(), error.fault().to_string());
        self.dials.get_or_create(&Outcome { egress, result, fault }).inc();
        self.konnectivity.dial_failed(error);
        if let DialError::Policy { rule, .. } = error {
            self.policy_refusals.count(rule);
        }
    }

    /// Registers all but those of the front end and those under the names of Konnectivity, which have registers of their
    /// own.
    pub fn register(&self, r: &mut Registry) {
        r.register("dials", "Dials by egress listener, result and who is at fault", self.dials.clone());
        r.register("dial_duration_seconds", "Time to a successful dial", self.dial_seconds.clone());
        r.register("dials_pending", "Dials that are under way", self.dials_pending.clone());
        r.register(
            "policy_refusals",
            "Dials that a node's policy refused, by its rule",
            self.policy_refusals.family(),
        );
        r.register("streams", "Streams that are open, by egress listener", self.streams.clone());
        r.register("stream_duration_seconds", "How long ended streams lasted", self.stream_seconds.clone());
        r.register(
            "stream_size_bytes",
            "Bytes of each ended stream: up to targets, down from them",
            self.stream_size.clone(),
        );
        r.register_collector(Box::new(self.stalls.clone()));
        r.register(
            "stream_bytes",
            "Bytes of ended streams: up to targets, down from them",
            self.bytes.clone(),
        );
        r.register(
            "bad_requests",
            "Requests that no dial was made for, by egress listener",
            self.bad_requests.clone(),
        );
        self.register_tunnels(r);
    }

    /// Those of the front end.
    pub fn register_front_end(&self, r: &mut Registry) {
        r.register("audit_records_lost", "Audit records that could not be written", self.audit_lost.clone());
        self.front_end.register(r);
    }

    fn register_tunnels(&self, r: &mut Registry) {
        r.register("tunnel_dials", "Attempts to dial a node", self.tunnel_dials.clone());
        r.register(
            "tunnel_dials_failed",
            "Attempts to dial a node that gave no tunnel",
            self.tunnel_dials_failed.clone(),
        );
        r.register("tunnels_established", "Tunnels established", self.tunnels_established.clone());
        r.register("tunnels_lost", "Tunnels that ended, by reason", self.tunnels_lost.clone());
        r.register(
            "node_absence_seconds",
            "How long nodes that came back had been without a tunnel",
            self.node_absence_seconds.clone(),
        );
        r.register("tunnels_refused", "Links that did not become a tunnel, by reason", self.refused.clone());
        r.register("joins", "Join attempts, by result", self.joins.clone());
        r.register(
            "host_certificates_renewed",
            "Host certificates renewed",
            self.certificates_renewed.clone(),
        );
        r.register("inventory_reloads", "Inventory reloads, by result", self.inventory_reloads.clone());
    }
}

fn dial_seconds() -> Histogram {
    Histogram::new([0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0])
}

/// From a request to a watch that goes on for days.
fn stream_seconds() -> Histogram {
    Histogram::new([0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 21600.0, 86400.0, 604800.0])
}

/// From 64 bytes to 64 GiB.
fn stream_size() -> Histogram {
    Histogram::new(exponential_buckets(64.0, 8.0, 11))
}
