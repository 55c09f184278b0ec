//! Explains how a target is reached: its route, the reason for it, and the result of a dial.

use std::{net::IpAddr, sync::Arc, time::Instant};

use proto::{Host, NodeName, Target};
use proto_net::dialer::{Dialer as _, Origin};
use tokio::sync::watch;

use super::{
    dialer::{Candidate, TunnelDialer},
    registry::Registry,
    status::micros,
};
use crate::{
    admin_api::{ExplainedCandidate, Explanation},
    routing::{inventory::Inventory, shared::SharedRoutes},
};

/// Explains how targets are reached.
pub struct Explainer {
    pub routes: Arc<SharedRoutes>,
    pub dialer: Arc<TunnelDialer>,
    pub registry: Arc<Registry>,
    pub nodes: watch::Receiver<Arc<Inventory>>,
}

impl Explainer {
    /// Finds the candidates for a target and then dials it. The times and the verdict of the node's policy come from a
    /// real dial, whose connection is closed at once. Fails if the text is not a target.
    pub async fn explain(&self, target: &str, origin: Origin) -> Result<Explanation, String> {
        let target: Target = target.parse().map_err(|e| format!("{target:?} is no target: {e}"))?;
        tracing::info!(%target, %origin, "explain requested");
        let mut explanation = Explanation { target: target.to_string(), ..Explanation::default() };
        let began = Instant::now();
        let route = match self.routes.read(|routes| routes.find(&target)) {
            Ok(route) => route,
            Err(error) => {
                explanation.verdict = error.to_string();
                return Ok(explanation);
            }
        };
        explanation.route_microseconds = micros(began.elapsed());
        explanation.reason = route.reason.clone();
        match self.dialer.candidates(&route) {
            Ok(candidates) => {
                explanation.candidates = candidates.into_iter().map(|found| self.explained(found)).collect();
            }
            Err(error) => {
                explanation.verdict = error.to_string();
                return Ok(explanation);
            }
        }
        let began = Instant::now();
        match self.dialer.dial(&target, &origin).await {
            Ok(connection) => {
                explanation.dial_microseconds = Some(micros(began.elapsed()));
                explanation.node = connection.node;
                "the node allows it and the target answers".clone_into(&mut explanation.verdict);
            }
            Err(error) => explanation.verdict = format!("{} is at fault: {error}", error.fault()),
        }
        Ok(explanation)
    }

    fn explained(&self, candidate: Candidate) -> ExplainedCandidate {
        let Candidate { node, target, .. } = candidate;
        ExplainedCandidate {
            addresses: self.addresses(&node),
            target: target.to_string(),
            state: self.registry.state(&node).map(str::to_owned),
            round_trip_microseconds: self.registry.round_trip(&node).map(micros),
            node,
        }
    }

    /// Returns a node's own addresses from the inventory or the cluster. Without any, returns the address that is
    /// dialled.
    fn addresses(&self, node: &NodeName) -> Vec<IpAddr> {
        let nodes = self.nodes.borrow();
        let Some(node) = nodes.node(node) else { return Vec::new() };
        let dialled = node.dial.as_ref().and_then(|dial| match dial.host {
            Host::Addr(address) => Some(address),
            Host::Name(_) => None,
        });
        if node.addresses.is_empty() { dialled.into_iter().collect() } else { node.addresses.clone() }
    }
}
