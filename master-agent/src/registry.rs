//! Which nodes have which tunnels, and what a person is told about each.
//!
//! A node has up to `connections` active tunnels, over which its streams are spread; further ones that prove
//! the same identity stand by and take over when an active one ends. A registration is undone by the tunnel's
//! own id, so an old one that ends late can't remove its successor.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use proto::{DialError, NodeName};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    activity::{self, Figures, NodeActivities, NodeActivity},
    admin_api::{Event, EventKind, NodeDetail, NodeStatus, TunnelStatus},
    tunnel::{Direction, NotRegistered, Tunnel},
};

/// Tunnels that may stand by for one node.
const STANDBY: usize = 2;

/// The state of a node without a tunnel. A node with one is connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Absent {
    /// The master has not tried yet.
    New,
    Connecting,
    /// The last attempt failed; another follows.
    Retrying {
        error: String,
        at: SystemTime,
    },
    WaitingForCallHome,
    /// The last tunnel ended and the node has to call again.
    Lost {
        reason: String,
        since: SystemTime,
    },
}

impl std::fmt::Display for Absent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::New => f.write_str("not tried yet"),
            Self::Connecting => f.write_str("connecting"),
            Self::Retrying { error, .. } => write!(f, "retrying; last error: {error}"),
            Self::WaitingForCallHome => f.write_str("waiting for the node to call home"),
            Self::Lost { reason, .. } => write!(f, "lost: {reason}"),
        }
    }
}

#[derive(Clone)]
struct Node {
    tunnels: Vec<Arc<Tunnel>>,
    absent: Absent,
    connections: usize,
    streams: Arc<Semaphore>,
    /// Since its last tunnel ended; `None` while it has one, and before the first.
    away_since: Option<Instant>,
    /// Connections that claimed this node and were refused.
    refused: u64,
    activity: Arc<NodeActivity>,
}

/// All nodes. Cheap to share.
pub struct Registry {
    nodes: Mutex<BTreeMap<NodeName, Node>>,
    max_streams_per_node: usize,
}

/// A tunnel's place in the registry; dropping it removes that tunnel and no other.
pub struct Registration {
    registry: Arc<Registry>,
    tunnel: Arc<Tunnel>,
    /// How long the node had been without a tunnel, if this one brings it back.
    pub absence: Option<Duration>,
}

/// What metrics tell of a node.
#[derive(Clone, Debug)]
pub struct NodeFigures {
    pub name: NodeName,
    pub connected: bool,
    pub round_trip: Option<Duration>,
    pub streams: usize,
    /// Of the certificates in use, the first.
    pub certificate_expires: Option<u64>,
    pub refused: u64,
    pub activity: Figures,
}

impl Registry {
    pub fn new(max_streams_per_node: usize) -> Self {
        Self { nodes: Mutex::default(), max_streams_per_node }
    }

    fn nodes(&self) -> MutexGuard<'_, BTreeMap<NodeName, Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the inventory's nodes known, and forgets those that are gone. Gives the tunnels of the latter.
    pub fn expect(&self, expected: &BTreeMap<NodeName, (usize, Absent)>) -> Vec<Arc<Tunnel>> {
        let mut nodes = self.nodes();
        for (name, (connections, absent)) in expected {
            let node = nodes.entry(name.clone()).or_insert_with(|| self.node(absent.clone()));
            node.connections = *connections;
        }
        let gone: Vec<_> = nodes.keys().filter(|name| !expected.contains_key(*name)).cloned().collect();
        gone.iter().filter_map(|name| nodes.remove(name)).flat_map(|node| node.tunnels).collect()
    }

    fn node(&self, absent: Absent) -> Node {
        Node {
            tunnels: Vec::new(),
            absent,
            connections: 1,
            streams: Arc::new(Semaphore::new(self.max_streams_per_node)),
            away_since: None,
            refused: 0,
            activity: Arc::default(),
        }
    }

    /// Adds a tunnel. Also gives the node's other tunnels, which may be dead without anybody knowing yet.
    pub fn register(
        self: &Arc<Self>,
        tunnel: Arc<Tunnel>,
    ) -> Result<(Registration, Vec<Arc<Tunnel>>), NotRegistered> {
        let mut nodes = self.nodes();
        let node = nodes.get_mut(&tunnel.node).ok_or_else(|| NotRegistered::Unknown(tunnel.node.clone()))?;
        let had = !node.tunnels.is_empty();
        node.tunnels.retain(|t| !t.has_ended());
        if had && node.tunnels.is_empty() {
            node.away_since = Some(Instant::now());
        }
        // Those that take no new streams are no use to the node any more.
        if node.tunnels.iter().filter(|t| t.is_usable()).count() >= node.connections + STANDBY {
            return Err(NotRegistered::Full(tunnel.node.clone()));
        }
        let others = node.tunnels.clone();
        node.tunnels.push(tunnel.clone());
        let absence = node.away_since.take().map(|since| since.elapsed());
        node.activity.connected(&connected(&tunnel), absence.is_some());
        Ok((Registration { registry: self.clone(), tunnel, absence }, others))
    }

    pub fn set_absent(&self, name: &NodeName, absent: Absent) {
        if let Some(node) = self.nodes().get_mut(name) {
            node.absent = absent;
        }
    }

    /// Counts a connection that claimed to be the node and was refused.
    pub fn count_refused(&self, name: &NodeName, why: &dyn std::fmt::Display) {
        if let Some(node) = self.nodes().get_mut(name) {
            node.refused += 1;
            node.activity.event(EventKind::Impostor, &why.to_string());
        }
    }

    /// What a node carries and did; `None` of one that is not known.
    pub fn activity(&self, name: &NodeName) -> Option<Arc<NodeActivity>> {
        self.nodes().get(name).map(|node| node.activity.clone())
    }

    /// Keeps something that happened to a node, for people.
    pub fn event(&self, name: &NodeName, kind: EventKind, text: &str) {
        if let Some(activity) = self.activity(name) {
            activity.event(kind, text);
        }
    }

    /// Keeps every node's round trip, from time to time.
    pub async fn sample(self: Arc<Self>) {
        let mut interval = tokio::time::interval(activity::SAMPLE);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            for node in self.nodes().values() {
                let round_trip = node.tunnels.iter().find(|t| t.is_usable()).and_then(|t| t.round_trip());
                node.activity.sample(round_trip);
            }
        }
    }

    pub fn is_connected(&self, name: &NodeName) -> bool {
        self.nodes().get(name).is_some_and(|node| node.tunnels.iter().any(|t| t.is_usable()))
    }

    /// Whether a tunnel that came later has taken the place of this one.
    pub fn has_newer(&self, tunnel: &Tunnel) -> bool {
        let nodes = self.nodes();
        let tunnels = nodes.get(&tunnel.node).map(|node| &node.tunnels);
        tunnels.is_some_and(|tunnels| tunnels.iter().any(|other| other.id > tunnel.id && other.is_usable()))
    }

    /// Nodes that run a node-agent and can be asked for streams, the least busy first.
    pub fn least_busy_agents(&self) -> Vec<NodeName> {
        let nodes = self.nodes();
        let mut found: Vec<(usize, &NodeName)> = nodes
            .iter()
            .filter(|(_, node)| node.tunnels.iter().any(|t| t.is_usable() && t.is_node_agent()))
            .map(|(name, node)| (node.tunnels.iter().map(|t| t.streams()).sum(), name))
            .collect();
        found.sort();
        found.into_iter().map(|(_, name)| name.clone()).collect()
    }

    pub fn round_trip(&self, name: &NodeName) -> Option<Duration> {
        self.round_trips(std::iter::once(name)).pop()??
    }

    /// For each node: `None` when it is not connected, else its measured round trip if there is one.
    pub fn round_trips<'a>(
        &self,
        names: impl Iterator<Item = &'a NodeName>,
    ) -> Vec<Option<Option<Duration>>> {
        let nodes = self.nodes();
        let round_trip = |name| {
            let tunnel = nodes.get(name)?.tunnels.iter().find(|t| t.is_usable())?;
            Some(tunnel.round_trip())
        };
        names.map(round_trip).collect()
    }

    /// The least busy of the node's active tunnels, and the right to one stream to that node. A tunnel that
    /// did not answer when it was last asked is the last choice.
    pub fn pick(&self, name: &NodeName) -> Result<(Arc<Tunnel>, OwnedSemaphorePermit), DialError> {
        let nodes = self.nodes();
        let none = |state: String| DialError::NoTunnel { node: name.to_string(), state };
        let node = nodes.get(name).ok_or_else(|| none("the node is not known".to_owned()))?;
        let usable =
            |suspect| node.tunnels.iter().filter(move |t| t.is_usable() && t.is_suspect() == suspect);
        let tunnel = usable(false)
            .take(node.connections)
            .min_by_key(|t| t.streams())
            .or_else(|| usable(true).next())
            .ok_or_else(|| none(node.absent.to_string()))?;
        let permit = node.streams.clone().try_acquire_owned().map_err(|_| {
            DialError::TooManyStreams(format!(
                "node {name} carries {} streams already (max_streams_per_node)",
                self.max_streams_per_node
            ))
        })?;
        Ok((tunnel.clone(), permit))
    }

    pub fn tunnels_of(&self, name: &NodeName) -> Vec<Arc<Tunnel>> {
        self.nodes().get(name).map(|node| node.tunnels.clone()).unwrap_or_default()
    }

    pub fn tunnels(&self) -> Vec<Arc<Tunnel>> {
        self.nodes().values().flat_map(|node| node.tunnels.clone()).collect()
    }

    /// Nodes with a tunnel, and all nodes.
    pub fn count(&self) -> (usize, usize) {
        let nodes = self.nodes();
        let connected = nodes.values().filter(|n| n.tunnels.iter().any(|t| !t.has_ended())).count();
        (connected, nodes.len())
    }

    /// Of the host certificates in use, when the first one expires, in seconds since 1970.
    pub fn first_certificate_to_expire(&self) -> Option<u64> {
        let tunnels = self.tunnels();
        let alive = tunnels.iter().filter(|tunnel| !tunnel.has_ended());
        alive.filter_map(|tunnel| tunnel.certificate_expires()).min().map(unix_seconds)
    }

    /// What metrics tell of each node. The nodes are looked at when nobody has to wait for it any more.
    pub fn figures(&self) -> Vec<NodeFigures> {
        let all: Vec<_> = {
            let nodes = self.nodes();
            nodes
                .iter()
                .map(|(name, node)| (name.clone(), node.tunnels.clone(), node.refused, node.activity.clone()))
                .collect()
        };
        let figures = all.into_iter().map(|(name, tunnels, refused, activity)| {
            let mut alive = tunnels.iter().filter(|tunnel| !tunnel.has_ended()).peekable();
            NodeFigures {
                name,
                connected: alive.peek().is_some(),
                round_trip: tunnels.iter().find(|t| t.is_usable()).and_then(|t| t.round_trip()),
                streams: tunnels.iter().map(|tunnel| tunnel.streams()).sum(),
                certificate_expires: alive.filter_map(|t| t.certificate_expires()).min().map(unix_seconds),
                refused,
                activity: activity.figures(),
            }
        });
        figures.collect()
    }

    pub fn status(&self) -> Vec<NodeStatus> {
        // Dials wait for the lock, and texts take a while.
        let nodes: Vec<_> = self.nodes().iter().map(|(name, node)| (name.clone(), node.clone())).collect();
        nodes.iter().map(|(name, node)| node_status(name, node)).collect()
    }

    /// The last refusals of all nodes, at most so many, the newest first.
    pub fn refusals(&self, most: usize) -> Vec<(NodeName, Event)> {
        let nodes: Vec<_> =
            self.nodes().iter().map(|(name, node)| (name.clone(), node.activity.clone())).collect();
        let mut refusals: Vec<_> = nodes
            .into_iter()
            .flat_map(|(name, activity)| activity.refusals().into_iter().map(move |e| (name.clone(), e)))
            .collect();
        refusals.sort_by_key(|(_, event)| std::cmp::Reverse(event.unix_milliseconds));
        refusals.truncate(most);
        refusals
    }

    /// One node with its streams and what happened to it; `None` of one that is not known.
    pub fn detail(&self, name: &NodeName) -> Option<NodeDetail> {
        let node = self.nodes().get(name)?.clone();
        Some(NodeDetail { status: node_status(name, &node), detail: node.activity.detail() })
    }
}

impl NodeActivities for Registry {
    fn activity(&self, name: &NodeName) -> Option<Arc<NodeActivity>> {
        Self::activity(self, name)
    }
}

impl Registration {
    pub fn tunnel(&self) -> &Arc<Tunnel> {
        &self.tunnel
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(node) = self.registry.nodes().get_mut(&self.tunnel.node) {
            let had = !node.tunnels.is_empty();
            node.tunnels.retain(|t| t.id != self.tunnel.id);
            if had && node.tunnels.is_empty() {
                node.away_since = Some(Instant::now());
            }
        }
    }
}

fn node_status(name: &NodeName, node: &Node) -> NodeStatus {
    let alive: Vec<_> = node.tunnels.iter().filter(|t| !t.has_ended()).collect();
    let (state, reason) = match (alive.is_empty(), &node.absent) {
        (false, _) => ("connected", String::new()),
        (true, absent @ (Absent::New | Absent::Connecting)) => ("connecting", absent.to_string()),
        (true, absent @ Absent::Retrying { .. }) => ("retrying", absent.to_string()),
        (true, absent @ Absent::WaitingForCallHome) => ("waiting", absent.to_string()),
        (true, absent @ Absent::Lost { .. }) => ("lost", absent.to_string()),
    };
    let tunnels = alive.iter().enumerate().map(|(i, tunnel)| TunnelStatus {
        role: if i < node.connections { "active" } else { "standby" }.to_owned(),
        direction: match tunnel.direction {
            Direction::Dialled => "dialled",
            Direction::CallHome => "call-home",
            Direction::CallHomeHttps => "call-home-https",
        }
        .to_owned(),
        kind: if tunnel.is_node_agent() { "node-agent" } else { "sshd" }.to_owned(),
        peer: tunnel.peer,
        since_unix_seconds: unix_seconds(tunnel.since),
        streams: tunnel.streams(),
        round_trip_microseconds: tunnel.round_trip().map(micros),
        host_key: tunnel.host.key.fingerprint(Default::default()).to_string(),
        certificate_expires_unix_seconds: tunnel.certificate_expires().map(unix_seconds),
    });
    NodeStatus {
        name: name.clone(),
        state: state.to_owned(),
        reason,
        tunnels: tunnels.collect(),
        refused: node.refused,
        totals: node.activity.totals(),
    }
}

fn connected(tunnel: &Tunnel) -> String {
    let peer = tunnel.peer.map_or_else(|| "a peer without an address".to_owned(), |peer| peer.to_string());
    match tunnel.direction {
        Direction::Dialled => format!("dialled {peer}"),
        Direction::CallHome => format!("called home from {peer}"),
        Direction::CallHomeHttps => format!("called home over HTTPS from {peer}"),
    }
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
