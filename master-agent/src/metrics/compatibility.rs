//! Names that dashboards for others know: those of kube-apiserver's own SSH tunneler, and of a Konnectivity server as
//! far as there is something that is the same here. They go without a prefix of this agent's.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        MetricType,
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
};
use proto::DialError;

use super::{Door, Metrics, Reason, signed};
use crate::kubernetes::Watches;

/// The names that kube-apiserver's own SSH tunneler had.
pub struct LegacyNames {
    dials: Counter,
    failed: Counter,
    watches: Arc<Watches>,
}

impl LegacyNames {
    pub fn new(metrics: &Metrics, watches: &Arc<Watches>) -> Self {
        let Metrics { tunnel_dials, tunnel_dials_failed, .. } = metrics;
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

/// What only Konnectivity's names need: its buckets, and its reasons of failed dials.
#[derive(Clone, Debug)]
pub struct KonnectivityCounts {
    pub dial_seconds: Histogram,
    pub stream_seconds: Histogram,
    failures: Family<Reason, Counter>,
}

impl Default for KonnectivityCounts {
    fn default() -> Self {
        Self {
            dial_seconds: Histogram::new([0.000_001, 0.000_01, 0.0001, 0.005, 0.025, 0.1, 0.5, 2.5, 12.5]),
            stream_seconds: Histogram::new([
                1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 14400.0, 43200.0, 86400.0,
            ]),
            failures: Family::default(),
        }
    }
}

/// Konnectivity's reasons that a dial can fail for here.
const REASONS: [&str; 5] =
    ["no_agent", "error_response", "backend_close", "backend_dial_timeout", "frontend_close"];

impl KonnectivityCounts {
    pub fn dial_failed(&self, error: &DialError) {
        let reason = match error {
            DialError::NoRoute(_) | DialError::NoTunnel { .. } => "no_agent",
            DialError::BadTarget(_)
            | DialError::TooManyStreams(_)
            | DialError::Policy { .. }
            | DialError::Refused(_)
            | DialError::Resolve(_)
            | DialError::Unreachable(_) => "error_response",
            DialError::TunnelLost { .. } => "backend_close",
            DialError::TimedOut(_) => "backend_dial_timeout",
            DialError::Cancelled => "frontend_close",
        };
        self.failures.get_or_create(&Reason { reason }).inc();
    }
}

/// The names of a Konnectivity server.
pub struct KonnectivityNames(pub Metrics);

impl fmt::Debug for KonnectivityNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KonnectivityNames")
    }
}

impl KonnectivityNames {
    fn streams(&self, of: impl Fn(&str) -> bool) -> i64 {
        let doors = crate::front_door::DOORS.into_iter().filter(|door| of(door));
        doors.map(|front_door| self.0.streams.get(&Door { front_door }).map_or(0, |open| open.get())).sum()
    }
}

macro_rules! name {
    ($name:literal) => {
        concat!("konnectivity_network_proxy_server_", $name)
    };
}

impl Collector for KonnectivityNames {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Metrics { konnectivity: counts, nodes, dials_pending, stalls, .. } = &self.0;
        for (name, help, histogram) in [
            (name!("dial_duration_seconds"), "Time to a successful dial.", &counts.dial_seconds),
            (name!("connection_duration_seconds"), "How long ended streams lasted.", &counts.stream_seconds),
        ] {
            histogram.encode(encoder.encode_descriptor(name, help, None, MetricType::Histogram)?)?;
        }
        // A counter's name would get another ending.
        let (name, help) = (name!("dial_failure_count"), "Dials that failed, by reason.");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Unknown)?;
        for reason in REASONS {
            let times = counts.failures.get(&Reason { reason }).map_or(0, |count| count.get());
            ConstGauge::new(signed(times)).encode(family.encode_family(&[("reason", reason)])?)?;
        }
        let connected = signed(nodes.count().0);
        for (name, help, value) in [
            (name!("ready_backend_connections"), "Nodes with a tunnel.", connected),
            (name!("pending_backend_dials"), "Dials that are under way.", Gauge::get(dials_pending)),
            (name!("established_connections"), "Streams that are open.", self.streams(|_| true)),
            (
                name!("http_connections"),
                "Streams of HTTP CONNECT that are open.",
                self.streams(|door| door.starts_with("connect-")),
            ),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let (name, help) = (name!("full_receive_channels"), "Streams that wait for a node to have room.");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        let waiting = ConstGauge::new(signed(stalls.up.now()));
        waiting.encode(family.encode_family(&[("service_method", "Proxy")])?)
    }
}
