//! The metrics of the front end: its counters, and its present state, which is read whenever metrics are collected.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use super::server::FrontEnd;
use crate::metrics::signed;

pub fn register(front_end: &Arc<FrontEnd>, r: &mut Registry) {
    front_end.metrics.register(r);
    r.register_collector(Box::new(StateCollector(front_end.clone())));
}

/// Collects the present state of the front end.
struct StateCollector(Arc<FrontEnd>);

impl fmt::Debug for StateCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StateCollector")
    }
}

impl Collector for StateCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let load = self.0.load_now();
        for (name, help, value) in [
            ("front_end_connections", "Connections to the front end that are open.", load.connections),
            ("front_end_requests_in_flight", "Requests that are being answered.", load.in_flight),
            ("front_end_requests_queued", "Requests that wait for their turn.", load.queued),
            (
                "front_end_requests_long_running",
                "Watches, followed logs, upgrades and the like that are open.",
                load.long_running,
            ),
        ] {
            let gauge = ConstGauge::new(signed(value));
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let upstreams = self.0.upstreams_now();
        let help = "Whether an API server behind the front end works.";
        let mut family =
            encoder.encode_descriptor("front_end_upstream_healthy", help, None, MetricType::Gauge)?;
        for upstream in &upstreams {
            let labels = [("server", &*upstream.server)];
            ConstGauge::new(i64::from(upstream.healthy)).encode(family.encode_family(&labels)?)?;
        }
        let help = "Connections, requests and checks of an API server that failed.";
        let mut family =
            encoder.encode_descriptor("front_end_upstream_failures", help, None, MetricType::Counter)?;
        for upstream in &upstreams {
            let labels = [("server", &*upstream.server)];
            ConstCounter::new(upstream.failures).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
