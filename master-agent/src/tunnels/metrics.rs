//! The metrics of nodes and their tunnels that are read from the registry whenever they are collected. A node that is
//! gone has no series.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use proto::Fault;

use super::{
    counters::TunnelMetrics,
    login::MasterLogin,
    registry::Registry,
    session::state::Loss,
    status::{NodeFigures, unix_seconds},
};
use crate::metrics::{Expiry, ReasonLabel, signed};

/// Registers the collector. `per_node` adds some series for each node.
pub fn register(
    registry: &Arc<Registry>,
    metrics: &TunnelMetrics,
    per_node: bool,
    r: &mut prometheus_client::registry::Registry,
) {
    for loss in Loss::ALL {
        let _ = metrics.tunnels_lost.get_or_create(&ReasonLabel { reason: loss.kind() });
    }
    r.register_collector(Box::new(NodeCollector { registry: registry.clone(), per_node }));
}

/// Returns when the SSH certificates in use expire: the master's own, and the first one among those of its nodes.
pub fn expiries(login: &MasterLogin, registry: &Registry) -> [Expiry; 2] {
    [
        Expiry::Ssh("ssh_user", login.current().expires().map(unix_seconds)),
        Expiry::Ssh("node_hosts", registry.first_certificate_to_expire()),
    ]
}

/// Collects the numbers of nodes and, if configured, some series for each node.
struct NodeCollector {
    registry: Arc<Registry>,
    per_node: bool,
}

impl fmt::Debug for NodeCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeCollector")
    }
}

impl Collector for NodeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (connected, known) = self.registry.count();
        for (name, help, value) in [
            ("nodes_connected", "Nodes with a tunnel.", connected),
            ("nodes", "Nodes that are known.", known),
            ("nodes_draining", "Nodes that are draining or drained.", self.registry.draining()),
        ] {
            let gauge = ConstGauge::new(signed(value));
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        if self.per_node { NodeSeries(&self.registry.figures()).encode(encoder) } else { Ok(()) }
    }
}

/// Encodes the series of each node.
struct NodeSeries<'a>(&'a [NodeFigures]);

impl NodeSeries<'_> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        self.gauges(&mut encoder)?;
        self.counters(&mut encoder)?;
        let help = "Bytes of a node's streams: up to targets, down from them.";
        let mut family = encoder.encode_descriptor("node_stream_bytes", help, None, MetricType::Counter)?;
        for node in self.0 {
            for (direction, bytes) in [("up", node.activity.up), ("down", node.activity.down)] {
                let labels = [("node", node.name.as_str()), ("direction", direction)];
                ConstCounter::new(bytes).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "Dials through a node that failed, by who is at fault.";
        let mut family = encoder.encode_descriptor("node_dials_failed", help, None, MetricType::Counter)?;
        for node in self.0 {
            // A dial without a route reaches no node.
            for (fault, times) in node.activity.failed.iter().filter(|(fault, _)| *fault != Fault::Route) {
                let fault = fault.to_string();
                let labels = [("node", node.name.as_str()), ("fault", &fault)];
                ConstCounter::new(*times).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn gauges(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        type Value = fn(&NodeFigures) -> Option<f64>;
        let gauges: [(&str, &str, Value); 4] = [
            ("node_connected", "Whether a node has a tunnel.", |node| {
                Some(f64::from(u8::from(node.connected)))
            }),
            ("node_streams", "Streams of a node that are open.", |node| Some(node.streams as f64)),
            ("node_round_trip_seconds", "A tunnel's round trip, as it was measured last.", |node| {
                node.round_trip.map(|time| time.as_secs_f64())
            }),
            (
                "node_host_certificate_expiry_timestamp_seconds",
                "When the host certificate that a node has shown expires.",
                |node| node.certificate_expires.map(|at| at as f64),
            ),
        ];
        for (name, help, value) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for node in self.0 {
                let Some(value) = value(node) else { continue };
                let labels = [("node", node.name.as_str())];
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn counters(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        type Value = fn(&NodeFigures) -> u64;
        let counters: [(&str, &str, Value); 3] = [
            ("node_tunnels_lost", "A node's tunnels that ended.", |node| node.activity.lost),
            ("node_reconnects", "How often a node that had no tunnel any more came back.", |node| {
                node.activity.reconnects
            }),
            ("node_impostors", "Links that claimed to be a node's and were refused.", |node| node.refused),
        ];
        for (name, help, value) in counters {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for node in self.0 {
                let labels = [("node", node.name.as_str())];
                ConstCounter::new(value(node)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use prometheus_client::{encoding::text::encode, registry::Registry as Metrics};
    use proto::{DialError, NodeName};

    use super::*;
    use crate::tunnels::absent::Absent;

    fn nodes(count: usize) -> BTreeMap<NodeName, (usize, Absent)> {
        (0..count).map(|i| (format!("node-{i}.example").parse().unwrap(), (1, Absent::New))).collect()
    }

    fn served(registry: &Arc<Registry>, per_node: bool) -> String {
        let mut metrics = Metrics::with_prefix("master_agent");
        metrics.register_collector(Box::new(NodeCollector { registry: registry.clone(), per_node }));
        let mut text = String::new();
        encode(&mut text, &metrics).unwrap();
        text
    }

    fn series_by_node(text: &str) -> HashMap<&str, usize> {
        let mut all = HashMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let node = line.split("node=\"").nth(1).map(|rest| rest.split('"').next().unwrap());
            *all.entry(node.unwrap_or_default()).or_default() += 1;
        }
        all
    }

    #[test]
    fn nodes_have_few_series_each_and_none_when_they_are_gone_or_not_wanted() {
        let registry = Arc::new(Registry::new(1));
        registry.expect(&nodes(5000));
        let name = "node-17.example".parse().unwrap();
        registry.count_refused(&name, &"another key");
        let policy = DialError::Policy { rule: "x".to_owned(), reason: String::new() };
        registry.activity(&name).unwrap().failed(&"n:1".parse().unwrap(), &policy);
        let text = served(&registry, true);
        let series = series_by_node(&text);
        assert_eq!(series.len(), 5001);
        // The series of the round trip and of the certificate need a tunnel.
        assert!(series.iter().all(|(node, count)| *count == if node.is_empty() { 3 } else { 11 }));
        for line in [
            "master_agent_node_impostors_total{node=\"node-17.example\"} 1\n",
            "master_agent_node_dials_failed_total{node=\"node-17.example\",fault=\"policy\"} 1\n",
            "master_agent_node_connected{node=\"node-17.example\"} 0.0\n",
            "master_agent_nodes 5000\n",
        ] {
            assert!(text.contains(line), "{line}");
        }
        assert!(series_by_node(&served(&registry, false)).keys().all(|node| node.is_empty()));
        registry.expect(&nodes(3));
        assert_eq!(series_by_node(&served(&registry, true)).len(), 1 + 3);
    }
}
