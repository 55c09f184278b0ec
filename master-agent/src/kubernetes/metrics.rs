//! Metrics about the watches, collected when they are scraped.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
    registry::Registry,
};

use super::{WatchStatus, Watches};
use crate::metrics::signed;

pub fn register(watches: &Arc<Watches>, r: &mut Registry) {
    r.register_collector(Box::new(WatchCollector(watches.clone())));
}

struct WatchCollector(Arc<Watches>);

impl fmt::Debug for WatchCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WatchCollector")
    }
}

impl Collector for WatchCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        type Value = fn(&WatchStatus) -> u64;
        let gauges: [(&str, &str, Value); 3] = [
            ("kubernetes_objects", "Objects known from the Kubernetes API, by kind.", |s| s.objects as u64),
            (
                "kubernetes_stale_seconds",
                "For how long the Kubernetes API has not been heard, by kind.",
                |s| s.stale_seconds.unwrap_or_default(),
            ),
            ("kubernetes_errors", "Lists and watches that failed, by kind.", |s| s.errors),
        ];
        let status = self.0.status();
        for (name, help, value) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for kind in &status {
                let labels = [("kind", kind.kind)];
                ConstGauge::new(signed(value(kind))).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
