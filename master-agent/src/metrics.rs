//! What master-agent counts. All names begin with `master_agent_`.

use std::sync::Arc;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::Registry,
};

use crate::{
    agent::Agent,
    kubernetes::{WatchStatus, Watches},
    registry::Registry as Nodes,
};

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
#[derive(Clone)]
pub struct Metrics {
    /// Where what belongs to one node is counted.
    pub nodes: Arc<Nodes>,
    pub dials: Family<Outcome, Counter>,
    pub dial_seconds: Histogram,
    pub streams: Family<Door, Gauge>,
    pub bytes: Family<DoorDirection, Counter>,
    pub bad_requests: Family<Door, Counter>,
    pub tunnel_dials: Counter,
    pub tunnel_dials_failed: Counter,
    pub tunnels_established: Counter,
    pub tunnels_lost: Counter,
    /// Links and handshakes that did not become a tunnel, by reason.
    pub refused: Family<Reason, Counter>,
    pub joins: Family<Reason, Counter>,
    pub certificates_renewed: Counter,
    pub inventory_reloads: Family<Reason, Counter>,
    /// Audit records of the front end that could not be written.
    pub audit_lost: Counter,
}

impl Metrics {
    pub fn new(nodes: Arc<Nodes>) -> Self {
        Self {
            nodes,
            dials: Family::default(),
            dial_seconds: Histogram::new([
                0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
            ]),
            streams: Family::default(),
            bytes: Family::default(),
            bad_requests: Family::default(),
            tunnel_dials: Counter::default(),
            tunnel_dials_failed: Counter::default(),
            tunnels_established: Counter::default(),
            tunnels_lost: Counter::default(),
            refused: Family::default(),
            joins: Family::default(),
            certificates_renewed: Counter::default(),
            inventory_reloads: Family::default(),
            audit_lost: Counter::default(),
        }
    }

    pub fn register(&self, agent: &Arc<Agent>) -> Registry {
        let mut root = Registry::default();
        let r = root.sub_registry_with_prefix("master_agent");
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
        r.register("audit_records_lost", "Audit records that could not be written", self.audit_lost.clone());
        r.register("tunnel_dials", "Attempts to dial a node", self.tunnel_dials.clone());
        r.register(
            "tunnel_dials_failed",
            "Those of them that gave no tunnel",
            self.tunnel_dials_failed.clone(),
        );
        r.register_collector(Box::new(NodeGauges(agent.registry.clone())));
        if let (Some(watches), Some(config)) = (&agent.watches, &agent.config.kubernetes) {
            r.register_collector(Box::new(WatchGauges(watches.clone())));
            if config.legacy_names {
                root.register_collector(Box::new(LegacyNames(self.clone(), watches.clone())));
            }
        }
        root
    }
}

/// How the API server is followed, read off the watches when asked.
struct WatchGauges(Arc<Watches>);

impl std::fmt::Debug for WatchGauges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WatchGauges")
    }
}

impl Collector for WatchGauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        type Value = fn(&WatchStatus) -> u64;
        let gauges: [(&str, &str, Value); 3] = [
            ("kubernetes_objects", "Objects known from the Kubernetes API, by kind", |s| s.objects as u64),
            (
                "kubernetes_stale_seconds",
                "For how long the Kubernetes API has not been heard, by kind",
                |s| s.stale_seconds.unwrap_or_default(),
            ),
            ("kubernetes_errors", "Lists and watches that failed, by kind", |s| s.errors),
        ];
        let status = self.0.status();
        for (name, help, value) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for kind in &status {
                let labels = [("kind", kind.kind)];
                let gauge = ConstGauge::new(i64::try_from(value(kind)).unwrap_or(i64::MAX));
                gauge.encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// The names that kube-apiserver's own SSH tunneler had.
struct LegacyNames(Metrics, Arc<Watches>);

impl std::fmt::Debug for LegacyNames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LegacyNames")
    }
}

impl Collector for LegacyNames {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Self(metrics, watches) = self;
        let nodes = watches.status().into_iter().next();
        let stale = nodes.and_then(|nodes| nodes.stale_seconds).unwrap_or_default();
        for (name, help, value) in [
            (
                "ssh_tunnel_open_count",
                "Counter of ssh tunnel total open attempts",
                metrics.tunnel_dials.get(),
            ),
            (
                "ssh_tunnel_open_fail_count",
                "Counter of ssh tunnel failed open attempts",
                metrics.tunnel_dials_failed.get(),
            ),
            (
                "apiserver_proxy_tunnel_sync_latency_secs",
                "The time since the last successful synchronization of the SSH tunnels for proxy requests",
                stale,
            ),
        ] {
            // As gauges, since a counter's name would get another ending.
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
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
