//! The counters of links, tunnels, joins and inventory reloads, which count events as they happen.

use prometheus_client::{
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};
use proto_net::stalls;

use crate::metrics::ReasonLabel;

/// The handles of all counters. It is cheap to clone.
#[derive(Clone)]
pub struct TunnelMetrics {
    /// How often, and for how long, streams wait for room at the other agent.
    pub stalls: stalls::ByDirection,
    pub tunnel_dials: Counter,
    pub tunnel_dials_failed: Counter,
    pub tunnels_established: Counter,
    pub tunnels_lost: Family<ReasonLabel, Counter>,
    pub node_absence_seconds: Histogram,
    /// The links that did not become a tunnel, by reason.
    pub refused: Family<ReasonLabel, Counter>,
    pub joins: Family<ReasonLabel, Counter>,
    pub certificates_renewed: Counter,
    pub inventory_reloads: Family<ReasonLabel, Counter>,
}

impl Default for TunnelMetrics {
    fn default() -> Self {
        Self {
            stalls: stalls::ByDirection::default(),
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
        }
    }
}

impl TunnelMetrics {
    pub fn register(&self, r: &mut Registry) {
        r.register_collector(Box::new(self.stalls.clone()));
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
