//! What master-agent counts. All names begin with `master_agent_`.

use std::sync::Arc;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::Registry,
};

use crate::registry::Registry as Nodes;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    pub front_door: &'static str,
    pub result: &'static str,
    /// Who must act: `none`, or as in `DialError::fault`.
    pub fault: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Door {
    pub front_door: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DoorDirection {
    pub front_door: &'static str,
    pub direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    pub reason: &'static str,
}

/// The agent's metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub dials: Family<Outcome, Counter>,
    pub dial_seconds: Histogram,
    pub streams: Family<Door, Gauge>,
    pub bytes: Family<DoorDirection, Counter>,
    pub bad_requests: Family<Door, Counter>,
    pub tunnels_established: Counter,
    pub tunnels_lost: Counter,
    /// Links and handshakes that did not become a tunnel, by reason.
    pub refused: Family<Reason, Counter>,
    pub joins: Family<Reason, Counter>,
    pub certificates_renewed: Counter,
    pub inventory_reloads: Family<Reason, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            dials: Family::default(),
            dial_seconds: Histogram::new([
                0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
            ]),
            streams: Family::default(),
            bytes: Family::default(),
            bad_requests: Family::default(),
            tunnels_established: Counter::default(),
            tunnels_lost: Counter::default(),
            refused: Family::default(),
            joins: Family::default(),
            certificates_renewed: Counter::default(),
            inventory_reloads: Family::default(),
        }
    }
}

impl Metrics {
    pub fn register(&self, nodes: Arc<Nodes>) -> Registry {
        let mut r = Registry::with_prefix("master_agent");
        r.register("dials", "Dials by front door, result and who is at fault", self.dials.clone());
        r.register("dial_duration_seconds", "Time to a successful dial", self.dial_seconds.clone());
        r.register("streams", "Streams that are open, by front door", self.streams.clone());
        r.register(
            "stream_bytes",
            "Bytes of ended streams: up to targets, down from them",
            self.bytes.clone(),
        );
        r.register(
            "bad_requests",
            "Requests that no dial was made for, by front door",
            self.bad_requests.clone(),
        );
        r.register("tunnels_established", "Tunnels established", self.tunnels_established.clone());
        r.register("tunnels_lost", "Tunnels that ended", self.tunnels_lost.clone());
        r.register("tunnels_refused", "Links that did not become a tunnel, by reason", self.refused.clone());
        r.register("joins", "Join attempts, by result", self.joins.clone());
        r.register(
            "host_certificates_renewed",
            "Host certificates renewed",
            self.certificates_renewed.clone(),
        );
        r.register("inventory_reloads", "Inventory reloads, by result", self.inventory_reloads.clone());
        r.register_collector(Box::new(NodeGauges(nodes)));
        r
    }
}

/// Gauges that are read off the registry when asked.
struct NodeGauges(Arc<Nodes>);

impl std::fmt::Debug for NodeGauges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NodeGauges")
    }
}

impl Collector for NodeGauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (connected, known) = self.0.count();
        for (name, help, value) in
            [("nodes_connected", "Nodes with a tunnel", connected), ("nodes", "Nodes that are known", known)]
        {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}
