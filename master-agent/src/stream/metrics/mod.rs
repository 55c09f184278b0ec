//! The metrics of dials and streams, whichever listener they come from.

mod konnectivity;
mod labels;
mod policy_rules;

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

use crate::activity::NodeActivities;
use proto_net::handover::DrainingGauges;

pub use konnectivity::KonnectivityCounts;
pub use labels::{DialLabels, DirectionLabels, LISTENERS, ListenerLabels};
pub use policy_rules::PolicyRules;

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// The handles of whoever dials and relays. Cheap to clone.
#[derive(Clone)]
pub struct StreamMetrics {
    /// Where the streams of each node are listed and counted.
    pub nodes: Arc<dyn NodeActivities>,
    pub dials: Family<DialLabels, Counter>,
    pub dial_seconds: Histogram,
    pub dials_pending: Gauge,
    pub policy_refusals: PolicyRules,
    pub open: Family<ListenerLabels, Gauge>,
    /// The former processes that still have callers.
    pub draining: DrainingGauges,
    pub seconds: Histograms<ListenerLabels>,
    pub size: Histograms<DirectionLabels>,
    pub bytes: Family<DirectionLabels, Counter>,
    pub bad_requests: Family<ListenerLabels, Counter>,
    pub konnectivity: KonnectivityCounts,
}

impl StreamMetrics {
    pub fn new(nodes: Arc<dyn NodeActivities>) -> Self {
        Self {
            nodes,
            dials: Family::default(),
            dial_seconds: dial_seconds(),
            dials_pending: Gauge::default(),
            policy_refusals: PolicyRules::default(),
            open: Family::default(),
            draining: DrainingGauges::default(),
            seconds: Family::new_with_constructor(seconds),
            size: Family::new_with_constructor(size),
            bytes: Family::default(),
            bad_requests: Family::default(),
            konnectivity: KonnectivityCounts::default(),
        }
    }

    /// Counts a dial that succeeded after so many seconds.
    pub fn dial_succeeded(&self, egress: &'static str, seconds: f64) {
        self.dials.get_or_create(&DialLabels { egress, result: "ok", fault: "none".to_owned() }).inc();
        self.dial_seconds.observe(seconds);
        self.konnectivity.dial_seconds.observe(seconds);
    }

    /// Counts a dial that failed.
    pub fn dial_failed(&self, egress: &'static str, error: &DialError) {
        let (result, fault) = (error.kind(), error.fault().to_string());
        self.dials.get_or_create(&DialLabels { egress, result, fault }).inc();
        self.konnectivity.dial_failed(error);
        if let DialError::Policy { rule, .. } = error {
            self.policy_refusals.count(rule);
        }
    }

    /// Counts a request that leads to no dial.
    pub fn bad_request(&self, egress: &'static str) {
        self.bad_requests.get_or_create(&ListenerLabels { egress }).inc();
    }

    /// Counts a stream that has been opened.
    pub fn opened(&self, egress: &'static str) {
        self.open.get_or_create(&ListenerLabels { egress }).inc();
    }

    /// Counts a stream that has ended after so many seconds, with the bytes that it carried up and down.
    pub fn ended(&self, egress: &'static str, seconds: f64, [up, down]: [u64; 2]) {
        self.open.get_or_create(&ListenerLabels { egress }).dec();
        for (direction, bytes) in [("up", up), ("down", down)] {
            let labels = DirectionLabels { egress, direction };
            self.bytes.get_or_create(&labels).inc_by(bytes);
            self.size.get_or_create(&labels).observe(bytes as f64);
        }
        self.seconds.get_or_create(&ListenerLabels { egress }).observe(seconds);
        self.konnectivity.stream_seconds.observe(seconds);
    }

    /// Registers all but those under the names of Konnectivity, which have a collector of their own.
    pub fn register(&self, r: &mut Registry) {
        r.register("dials", "Dials by egress listener, result and who is at fault", self.dials.clone());
        r.register("dial_duration_seconds", "Time to a successful dial", self.dial_seconds.clone());
        r.register("dials_pending", "Dials that are under way", self.dials_pending.clone());
        r.register(
            "policy_refusals",
            "Dials that a node's policy refused, by its rule",
            self.policy_refusals.family(),
        );
        r.register("streams", "Streams that are open, by egress listener", self.open.clone());
        r.register(
            "draining_processes",
            "Former processes of this agent, which end once their callers have",
            self.draining.processes.clone(),
        );
        r.register("draining_callers", "Callers of former processes", self.draining.streams.clone());
        r.register("stream_duration_seconds", "How long ended streams lasted", self.seconds.clone());
        r.register(
            "stream_size_bytes",
            "Bytes of each ended stream: up to targets, down from them",
            self.size.clone(),
        );
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
    }
}

fn dial_seconds() -> Histogram {
    Histogram::new([0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0])
}

/// From a short request to a watch that lasts for days.
fn seconds() -> Histogram {
    Histogram::new([0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 21600.0, 86400.0, 604800.0])
}

/// From 64 bytes to 64 GiB.
fn size() -> Histogram {
    Histogram::new(exponential_buckets(64.0, 8.0, 11))
}
