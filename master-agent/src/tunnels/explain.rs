//! Explains a target: which way it would be reached, why, and what happens when it is dialled.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use proto::{Host, NodeName, Target};
use proto_net::dialer::{Dialer as _, Origin};

use crate::{
    admin_api::{ExplainedCandidate, Explanation},
    agent::Agent,
};

/// Finds the ways to a target, then takes them: the time of each hop, and the verdict of the node's policy,
/// are those of a real dial, whose connection is closed at once.
pub async fn explain(agent: &Agent, target: &str, origin: Origin) -> Result<Explanation, String> {
    let target: Target = target.parse().map_err(|e| format!("{target:?} is no target: {e}"))?;
    tracing::info!(%target, %origin, "somebody has a target explained, and dialled");
    let mut explanation = Explanation { target: target.to_string(), ..Explanation::default() };
    let began = Instant::now();
    let route = match agent.routes.read(|routes| routes.find(&target)) {
        Ok(route) => route,
        Err(e) => {
            explanation.verdict = e.to_string();
            return Ok(explanation);
        }
    };
    explanation.route_microseconds = micros(began.elapsed());
    explanation.reason = route.reason.clone();
    let candidates = match agent.dialer.candidates(&route) {
        Ok(candidates) => candidates,
        Err(e) => {
            explanation.verdict = e.to_string();
            return Ok(explanation);
        }
    };
    let status = agent.registry.status();
    explanation.candidates = candidates
        .into_iter()
        .map(|candidate| ExplainedCandidate {
            state: status.iter().find(|s| s.name == candidate.node).map(|s| s.state.clone()),
            round_trip_microseconds: agent.registry.round_trip(&candidate.node).map(micros),
            addresses: addresses(agent, &candidate.node),
            node: candidate.node,
            target: candidate.target.to_string(),
        })
        .collect();
    let began = Instant::now();
    match agent.dialer.dial(&target, &origin).await {
        Ok(connection) => {
            explanation.dial_microseconds = Some(micros(began.elapsed()));
            explanation.node = connection.node;
            "the node allows it and the target answers".clone_into(&mut explanation.verdict);
        }
        Err(e) => explanation.verdict = format!("{} is at fault: {e}", e.fault()),
    }
    Ok(explanation)
}

/// A node's own addresses, as the inventory or the cluster has them; else that which is dialled.
fn addresses(agent: &Agent, node: &NodeName) -> Vec<IpAddr> {
    let inventory = agent.inventory();
    let Some(node) = inventory.node(node) else { return Vec::new() };
    let dialled = node.dial.as_ref().and_then(|dial| match dial.host {
        Host::Addr(address) => Some(address),
        Host::Name(_) => None,
    });
    if node.addresses.is_empty() { dialled.into_iter().collect() } else { node.addresses.clone() }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
