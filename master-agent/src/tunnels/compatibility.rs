//! Metrics under the names of other software, which existing dashboards use: those of kube-apiserver's own SSH
//! tunneler, and those of a Konnectivity server as far as they have the same meaning here. They lack the prefix of this
//! agent.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        gauge::{ConstGauge, Gauge},
    },
};

use proto_net::stalls::ByDirection;

use crate::{
    kubernetes::Watches,
    metrics::signed,
    stream::metrics::{LISTENERS, ListenerLabels, StreamMetrics},
    tunnels::{counters::TunnelMetrics, registry::Registry},
};

/// The type of counters with the names of other programs. In OpenMetrics, the name of a counter's samples ends in `_total`,
/// so these are of unknown type there; [`proto_net::exposition`] makes them counters in the text format.
const COUNTER: MetricType = MetricType::Unknown;

/// Registers the metrics of the SSH tunneler.
pub fn register_legacy(
    tunnels: &TunnelMetrics,
    watches: &Arc<Watches>,
    root: &mut prometheus_client::registry::Registry,
) {
    root.register_collector(Box::new(LegacyNames::new(tunnels, watches)));
}

/// Registers the metrics of a Konnectivity server.
pub fn register_konnectivity(
    streams: &StreamMetrics,
    tunnels: &TunnelMetrics,
    nodes: &Arc<Registry>,
    root: &mut prometheus_client::registry::Registry,
) {
    let (streams, stalls, nodes) = (streams.clone(), tunnels.stalls.clone(), nodes.clone());
    root.register_collector(Box::new(KonnectivityNames { streams, stalls, nodes }));
}

/// The metrics that kube-apiserver's own SSH tunneler had.
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
        for (name, help, kind, value) in [
            ("ssh_tunnel_open_count", "Attempts to dial a node.", COUNTER, self.dials.get()),
            (
                "ssh_tunnel_open_fail_count",
                "Attempts to dial a node that gave no tunnel.",
                COUNTER,
                self.failed.get(),
            ),
            (
                "apiserver_proxy_tunnel_sync_latency_secs",
                "Seconds since the API server last sent news of nodes.",
                MetricType::Gauge,
                stale,
            ),
        ] {
            let gauge = ConstGauge::new(signed(value));
            gauge.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        Ok(())
    }
}

/// The metrics of a Konnectivity server.
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
    /// Returns the number of open streams of the listeners that `matches` accepts.
    fn open(&self, matches: impl Fn(&str) -> bool) -> i64 {
        let listeners = LISTENERS.into_iter().filter(|listener| matches(listener));
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
            (
                name!("frontend_write_duration_seconds"),
                "Time until a gRPC client had room for a packet.",
                &counts.write_seconds,
            ),
            (name!("dial_duration_seconds"), "Time to a successful dial.", &counts.dial_seconds),
            (name!("connection_duration_seconds"), "How long ended streams lasted.", &counts.stream_seconds),
        ] {
            histogram.encode(encoder.encode_descriptor(name, help, None, MetricType::Histogram)?)?;
        }
        let (name, help) = (name!("dial_failure_count"), "Dials that failed, by reason.");
        let mut family = encoder.encode_descriptor(name, help, None, COUNTER)?;
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
        for (name, help, values) in [
            (
                name!("ready_backends"),
                "Nodes with a tunnel, as backends of the default strategy.",
                &[("proxy_strategy", "default", connected)][..],
            ),
            (
                name!("grpc_connections"),
                "Calls of gRPC clients, and nodes with a tunnel in place of agents.",
                &[("service_method", "Proxy", counts.calls.get()), ("service_method", "Connect", connected)],
            ),
            (
                name!("full_receive_channels"),
                "Streams that wait for a node to have room.",
                &[("service_method", "Proxy", signed(self.stalls.up.now()))],
            ),
        ] {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (label, of, value) in values {
                ConstGauge::new(*value).encode(family.encode_family(&[(*label, *of)])?)?;
            }
        }
        let (name, help) = (name!("stream_packets"), "Packets of gRPC clients, by direction and type.");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (segment, packets) in [("from_client", &counts.from_client), ("to_client", &counts.to_client)] {
            for (kind, times) in packets.by_type() {
                let labels = [("segment", segment), ("packet_type", kind)];
                ConstCounter::new(times).encode(family.encode_family(&labels)?)?;
            }
        }
        let (name, help) = (name!("stream_errors"), "Calls of gRPC clients that failed, by status code.");
        counts.errors.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
    }
}
