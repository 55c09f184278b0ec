//! The JSON of the admin socket: the types that the running agent serialises, and that `top`, `compare`, `node list`
//! and the page read.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use proto::{Fault, NodeName};
use serde::{Deserialize, Serialize};

/// The path of all nodes, which is answered with a list of [`NodeStatus`].
pub const NODES: &str = "/nodes";
/// The path of the state of the watches of the Kubernetes API.
pub const WATCHES: &str = "/watches";
/// The path of an [`Explanation`]. The query is the target.
pub const EXPLAIN: &str = "/explain";
/// The path at which `POST` returns a token with which a browser can log in to the page once.
pub const PAGE_TOKEN: &str = "/page/token";
/// The path to which `PUT` sends a comparison, which the page shows.
pub const COMPARISON: &str = "/comparison";

/// The listener of callers who come through a tunnel to the front end, as streams name it.
pub const FRONT_END_TUNNEL: &str = "front-end-tunnel";

/// Returns the path to which `POST` drains a node within the milliseconds in the body. It is answered with [`NodeDetail`].
pub fn drain_path(name: &str) -> String {
    format!("{}/drain", node_path(name))
}

/// Returns the path to which `POST` undoes that. It is answered with a line of text.
pub fn undrain_path(name: &str) -> String {
    format!("{}/undrain", node_path(name))
}

/// Returns the path of one node, which is answered with [`NodeDetail`].
pub fn node_path(name: &str) -> String {
    format!("{NODES}/{name}")
}

/// Returns the name in a [`node_path`].
pub fn node_of_path(path: &str) -> Option<&str> {
    path.strip_prefix(NODES)?.strip_prefix('/')
}

/// Returns the path and query for the explanation of a target.
pub fn explain_path(target: &str) -> String {
    format!("{EXPLAIN}?{}", utf8_percent_encode(target, NON_ALPHANUMERIC))
}

/// Returns the target in the query of an [`explain_path`].
pub fn target_of_query(query: &str) -> String {
    percent_decode_str(query).decode_utf8_lossy().into_owned()
}

/// A node and its tunnels.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    pub name: NodeName,
    pub state: String,
    pub reason: String,
    pub tunnels: Vec<TunnelStatus>,
    /// The number of links that claimed to be the node's and were refused.
    pub refused: u64,
    #[serde(default)]
    pub totals: Totals,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainStatus>,
}

/// A drain that is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainStatus {
    /// The deadline.
    pub until_unix_milliseconds: u64,
    pub by: DrainedBy,
    /// The number of streams that were cut at the deadline. It is `None` before that, and if the node has cut them.
    pub cut: Option<u64>,
}

/// The agent on which a node was drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainedBy {
    /// `master-agent node drain`.
    Master,
    /// `node-agent drain`.
    Node,
}

/// The states of a node that has a tunnel.
pub mod state {
    pub const CONNECTED: &str = "connected";
    /// It gets only the streams that no other node can carry.
    pub const DRAINING: &str = "draining";
    /// It gets no streams.
    pub const DRAINED: &str = "drained";

    /// Whether a node in this state has a tunnel.
    pub fn has_tunnel(state: &str) -> bool {
        [CONNECTED, DRAINING, DRAINED].contains(&state)
    }
}

/// A node with its streams and events.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeDetail {
    #[serde(flatten)]
    pub status: NodeStatus,
    #[serde(flatten)]
    pub detail: Detail,
}

/// A tunnel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TunnelStatus {
    pub role: String,
    pub direction: String,
    pub kind: String,
    pub peer: Option<SocketAddr>,
    pub since_unix_seconds: u64,
    pub streams: usize,
    /// The number of SSH connections, of which there are several while streams carry much.
    pub connections: usize,
    pub round_trip_microseconds: Option<u64>,
    pub host_key: String,
    pub certificate_expires_unix_seconds: Option<u64>,
}

/// The sums since the agent has known the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// The number of bytes to targets.
    pub up: u64,
    /// The number of bytes from targets.
    pub down: u64,
    pub streams: u64,
    /// The numbers of failed dials by the side at fault.
    pub failed: HashMap<String, u64>,
    /// The number of tunnels that have ended.
    pub lost: u64,
    /// When the node's state last changed.
    pub changed_unix_milliseconds: Option<u64>,
}

/// The part of [`NodeDetail`] that [`NodeStatus`] lacks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Detail {
    /// The oldest 500 streams, the oldest first.
    pub streams: Vec<StreamStatus>,
    /// The events, the newest first.
    pub events: Vec<Event>,
    /// The round trips, one every `sample_seconds`, the oldest first. It is `None` while no tunnel could be measured.
    pub round_trips_microseconds: Vec<Option<u32>>,
    pub sample_seconds: u64,
}

/// An open stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamStatus {
    pub id: u64,
    pub egress: String,
    pub origin: String,
    pub target: String,
    pub reason: String,
    pub seconds: f64,
    pub up: u64,
    pub down: u64,
}

/// Something that happened to a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The time at which it last happened.
    pub unix_milliseconds: u64,
    pub kind: EventKind,
    pub text: String,
    /// The rule of the node's policy that refused the dial.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// How many times in a row it happened.
    pub times: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A tunnel was established.
    Connected,
    /// A tunnel ended.
    Lost,
    /// An attempt to establish a tunnel failed.
    Retrying,
    /// A peer that claimed to be the node was refused.
    Impostor,
    /// The node's policy refused a dial.
    Policy,
    DialFailed,
}

/// How a target is reached, why, and the result of a dial.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Explanation {
    pub target: String,
    /// The reason for which these nodes are candidates.
    pub reason: String,
    /// The candidates in the order in which they are tried.
    pub candidates: Vec<ExplainedCandidate>,
    /// The node that reached the target.
    pub node: Option<NodeName>,
    pub verdict: String,
    /// The time to find the route.
    pub route_microseconds: u64,
    /// The time from the request for a stream to the target's answer, including the tunnel's round trip.
    pub dial_microseconds: Option<u64>,
}

/// A node that a target may be reached through.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExplainedCandidate {
    pub node: NodeName,
    /// The node's own addresses.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// The target that the node is asked to dial.
    pub target: String,
    pub state: Option<String>,
    /// The round trip of the node's tunnel.
    pub round_trip_microseconds: Option<u64>,
}

impl Explanation {
    /// Returns whether one of the candidates has a tunnel that takes streams.
    pub fn has_tunnel(&self) -> bool {
        let takes_streams = |state: &str| [state::CONNECTED, state::DRAINING].contains(&state);
        self.candidates.iter().any(|candidate| candidate.state.as_deref().is_some_and(takes_streams))
    }
}

impl NodeStatus {
    /// Returns the number of open streams on all tunnels.
    pub fn streams(&self) -> usize {
        self.tunnels.iter().map(|tunnel| tunnel.streams).sum()
    }

    /// Returns the number of failed dials, impostors and lost tunnels.
    pub fn errors(&self) -> u64 {
        self.totals.failed.values().sum::<u64>() + self.refused + self.totals.lost
    }

    /// Returns the number of impostors, and of dials that the node's policy refused.
    pub fn refusals(&self) -> u64 {
        self.totals.failed.get(&Fault::Policy.to_string()).copied().unwrap_or_default() + self.refused
    }
}

impl EventKind {
    /// Whether the event leaves the node's state as it is.
    pub fn is_refusal_or_failure(self) -> bool {
        matches!(self, Self::Policy | Self::Impostor | Self::DialFailed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_as_they_are_written() {
        assert_eq!(node_of_path(&node_path("n1.example")), Some("n1.example"));
        let drain = drain_path("n1.example");
        assert_eq!(node_of_path(&drain).and_then(|path| path.strip_suffix("/drain")), Some("n1.example"));
        for path in ["/nodes", "/nodesn1", "/watches"] {
            assert_eq!(node_of_path(path), None, "{path}");
        }
        for target in ["n1:10250", "[fd00::1]:443", "web.default.svc:http?a=b&c#d e"] {
            let (path, query) =
                explain_path(target).split_once('?').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
            assert_eq!((path.as_str(), target_of_query(&query).as_str()), (EXPLAIN, target));
        }
    }
}
