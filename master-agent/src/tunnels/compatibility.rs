//! Names that dashboards for others know: those of kube-apiserver's own SSH tunneler, and of a Konnectivity server as
//! far as there is something that is the same here. They go without a prefix of this agent's.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        MetricType,
        counter::Counter,
        gauge::{ConstGauge, Gauge},
    },
};

use proto_net::stalls::ByDirection;

use crate::{
    agent::Agent,
    kubernetes::Watches,
    metrics::signed,
    registry::Registry,
    stream::metrics::{LISTENERS, ListenerLabels, StreamMetrics},
    tunnels::counters::TunnelMetrics,
};

/// Those that are configured.
pub fn register(agent: &Agent, streams: &StreamMetrics, root: &mut prometheus_client::registry::Registry) {
    let legacy = agent.config.kubernetes.as_ref().is_some_and(|config| config.legacy_names);
    if let Some(watches) = agent.watches.as_ref().filter(|_| legacy) {
        root.register_collector(Box::new(LegacyNames::new(&agent.metrics, watches)));
    }
    if agent.config.metrics.konnectivity_names {
        root.register_collector(Box::new(KonnectivityNames {
            streams: streams.clone(),
            stalls: agent.metrics.stalls.clone(),
            nodes: agent.registry.clone(),
        }));
    }
}

/// The names that kube-apiserver's own SSH tunneler had.
struct LegacyNames {
    dials: Counter,
    failed: Counter,
    watches: Arc<Watches>,
}

impl LegacyNames {
    fn new(metrics: &TunnelMetrics, watches: &Arc<Watches>) -> Self {
        let TunnelMetrics { tunnel_dials, tunnel_dials_failed, .. } = metrics;
        Self { dials: tunnel_dials.clone(), failed: tunnel_dials_failed.clone(), watches: watches.clone() }
    }
}

impl fmt::Debug for LegacyNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LegacyNames")
    }
}

impl Collector for LegacyNames {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let nodes = self.watches.status().into_iter().next();
        let stale = nodes.and_then(|nodes| nodes.stale_seconds).unwrap_or_default();
        for (name, help, value) in [
            ("ssh_tunnel_open_count", "Attempts to dial a node.", self.dials.get()),
            ("ssh_tunnel_open_fail_count", "Attempts to dial a node that gave no tunnel.", self.failed.get()),
            (
                "apiserver_proxy_tunnel_sync_latency_secs",
                "For how long the API server has not been heard about nodes.",
                stale,
            ),
        ] {
            // As gauges, since a counter's name would get another ending.
            let gauge = ConstGauge::new(signed(value));
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }
}

/// The names of a Konnectivity server.
struct KonnectivityNames {
    streams: StreamMetrics,
    stalls: ByDirection,
    nodes: Arc<Registry>,
}

impl fmt::Debug for KonnectivityNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KonnectivityNames")
    }
}

impl KonnectivityNames {
    /// Open streams of the listeners that `of` names.
    fn open(&self, of: impl Fn(&str) -> bool) -> i64 {
        let listeners = LISTENERS.into_iter().filter(|listener| of(listener));
        let open = |egress| self.streams.open.get(&ListenerLabels { egress }).map_or(0, |open| open.get());
        listeners.map(open).sum()
    }
}

macro_rules! name {
    ($name:literal) => {
        concat!("konnectivity_network_proxy_server_", $name)
    };
}

impl Collector for KonnectivityNames {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let StreamMetrics { konnectivity: counts, dials_pending, .. } = &self.streams;
        for (name, help, histogram) in [
            (name!("dial_duration_seconds"), "Time to a successful dial.", &counts.dial_seconds),
            (name!("connection_duration_seconds"), "How long ended streams lasted.", &counts.stream_seconds),
        ] {
            histogram.encode(encoder.encode_descriptor(name, help, None, MetricType::Histogram)?)?;
        }
        // A counter's name would get another ending.
        let (name, help) = (name!("dial_failure_count"), "Dials that failed, by reason.");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Unknown)?;
        for (reason, times) in counts.failures() {
            ConstGauge::new(signed(times)).encode(family.encode_family(&[("reason", reason)])?)?;
        }
        let connected = signed(self.nodes.count().0);
        for (name, help, value) in [
            (name!("ready_backend_connections"), "Nodes with a tunnel.", connected),
            (name!("pending_backend_dials"), "Dials that are under way.", Gauge::get(dials_pending)),
            (name!("established_connections"), "Streams that are open.", self.open(|_| true)),
            (
                name!("http_connections"),
                "Streams of HTTP CONNECT that are open.",
                self.open(|listener| listener.starts_with("connect-")),
            ),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let (name, help) = (name!("full_receive_channels"), "Streams that wait for a node to have room.");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        let waiting = ConstGauge::new(signed(self.stalls.up.now()));
        waiting.encode(family.encode_family(&[("service_method", "Proxy")])?)
    }
}
