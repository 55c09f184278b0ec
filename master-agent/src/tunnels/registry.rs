//! The registry of nodes and their tunnels.
//!
//! A node has up to `connections` active tunnels, over which its streams are spread. Further tunnels that prove the
//! same identity stand by and take over when an active one ends. A registration is removed by its tunnel's id, so a
//! tunnel that ends late can't remove its successor.
//!
//! Each node has a lock of its own. The set of all nodes changes only with the inventory and is replaced as a whole, so
//! a visit of all nodes does not block dials.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Display,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use proto::{DialError, NodeName};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::{Instant, MissedTickBehavior, timeout_at},
};

use super::{
    absent::Absent,
    drain::{DRAINED, Drain},
    sampled_set::SampledSet,
    session::error::NotRegistered,
    status::{NodeFigures, tunnel_status, unix_seconds},
    tunnel::{Direction, Tunnel},
};
use crate::{
    activity::{self, NodeActivities, NodeActivity},
    admin_api::{Event, EventKind, NodeDetail, NodeStatus, state},
    identity::VerifiedHost,
};

/// The maximum number of standby tunnels of one node.
const STANDBY: usize = 2;
/// How long dials wait for a node that is about to have a tunnel: after the agent has started, and after the node has lost
/// its last one.
const PATIENCE: Duration = Duration::from_secs(2);
/// The number of nodes among which the least busy ones are chosen.
const SAMPLE: usize = 16;

type Nodes = BTreeMap<NodeName, Arc<Node>>;

/// The registry of all nodes.
pub struct Registry {
    nodes: RwLock<Arc<Nodes>>,
    /// The nodes that have a tunnel to a node-agent.
    agents: Mutex<SampledSet<NodeName, Arc<Node>>>,
    /// The number of nodes that have a tunnel. It changes only while the node is locked.
    connected: AtomicUsize,
    max_streams_per_node: usize,
    /// The nodes that commands of this host drain, known here or not.
    drains: RwLock<HashMap<NodeName, Drain>>,
    /// Since when callers are served.
    serves_since: Mutex<Instant>,
}

/// The entry of one node, which exists for as long as the node is expected.
struct Node {
    name: NodeName,
    streams: Arc<Semaphore>,
    activity: Arc<NodeActivity>,
    /// Wakes dials that wait for a tunnel.
    linked: Notify,
    state: Mutex<NodeState>,
}

#[derive(Clone)]
struct NodeState {
    /// The tunnels in the order of their registration.
    tunnels: Vec<Arc<Tunnel>>,
    absent: Absent,
    /// The maximum number of active tunnels.
    connections: usize,
    /// When the last tunnel ended. It is `None` while the node has a tunnel, and before the first one.
    away_since: Option<Instant>,
    /// The number of refused links that claimed to belong to this node.
    refused: u64,
    /// Whether the node is no longer expected.
    gone: bool,
}

/// The registration of a tunnel. Dropping it removes that tunnel and no other.
pub struct Registration {
    registry: Arc<Registry>,
    node: Arc<Node>,
    tunnel: Arc<Tunnel>,
    /// How long the node had no tunnel before this one. It is `None` for the first tunnel, and if there is another one.
    pub absence: Option<Duration>,
}

impl Registry {
    pub fn new(max_streams_per_node: usize) -> Self {
        Self {
            nodes: RwLock::default(),
            agents: Mutex::default(),
            connected: AtomicUsize::new(0),
            max_streams_per_node,
            drains: RwLock::default(),
            serves_since: Mutex::new(Instant::now()),
        }
    }

    /// Callers are served from now on, although nodes may not have come back yet.
    pub fn serves_now(&self) {
        *self.serves_since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Returns until when dials wait for what comes back after a start.
    pub fn patient_until(&self) -> Instant {
        *self.serves_since.lock().unwrap_or_else(PoisonError::into_inner) + PATIENCE
    }

    /// Replaces the set of expected nodes. Each node comes with the number of tunnels that it may have active, and with
    /// its state before the first one. Returns the tunnels of nodes that are no longer expected.
    pub fn expect(&self, expected: &BTreeMap<NodeName, (usize, Absent)>) -> Vec<Arc<Tunnel>> {
        let before = self.nodes();
        let mut nodes = Nodes::new();
        for (name, (connections, absent)) in expected {
            let node = before.get(name).cloned().unwrap_or_else(|| self.new_node(name, absent));
            node.state().connections = *connections;
            nodes.insert(name.clone(), node);
        }
        let gone = before.values().filter(|node| !nodes.contains_key(&node.name));
        let gone: Vec<Arc<Node>> = gone.cloned().collect();
        *self.nodes.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(nodes);
        let mut tunnels = Vec::new();
        for node in gone {
            let mut state = node.state();
            state.gone = true;
            if !state.tunnels.is_empty() {
                self.connected.fetch_sub(1, Ordering::Relaxed);
            }
            tunnels.append(&mut state.tunnels);
            self.forget_agent(&node);
        }
        tunnels
    }

    fn new_node(&self, name: &NodeName, absent: &Absent) -> Arc<Node> {
        let state = NodeState {
            tunnels: Vec::new(),
            absent: absent.clone(),
            connections: 1,
            away_since: None,
            refused: 0,
            gone: false,
        };
        Arc::new(Node {
            name: name.clone(),
            streams: Arc::new(Semaphore::new(self.max_streams_per_node)),
            activity: Arc::default(),
            linked: Notify::new(),
            state: Mutex::new(state),
        })
    }

    /// Registers a tunnel. Also returns the node's other tunnels, which may be dead without anybody having noticed.
    pub fn register(
        self: &Arc<Self>,
        tunnel: Arc<Tunnel>,
    ) -> Result<(Registration, Vec<Arc<Tunnel>>), NotRegistered> {
        let unknown = || NotRegistered::Unknown(tunnel.node.clone());
        let node = self.node(&tunnel.node).ok_or_else(unknown)?;
        let mut state = node.state();
        if state.gone {
            return Err(unknown());
        }
        let was_connected = !state.tunnels.is_empty();
        state.remove(|other| other.has_ended());
        // Tunnels that take no new streams do not count.
        if state.tunnels.iter().filter(|t| t.is_usable()).count() >= state.connections + STANDBY {
            return Err(NotRegistered::Full(tunnel.node.clone()));
        }
        let others = state.tunnels.clone();
        state.tunnels.push(tunnel.clone());
        if !was_connected {
            self.connected.fetch_add(1, Ordering::Relaxed);
        }
        let absence = state.away_since.take().map(|since| since.elapsed());
        if tunnel.is_node_agent() {
            self.agents().insert(node.name.clone(), node.clone());
        }
        drop(state);
        node.linked.notify_waiters();
        node.activity.connected(&arrival(&tunnel), absence.is_some());
        Ok((Registration { registry: self.clone(), node, tunnel, absence }, others))
    }

    pub fn set_absent(&self, name: &NodeName, absent: Absent) {
        if let Some(node) = self.node(name) {
            node.state().absent = absent;
        }
    }

    /// Counts a refused link that claimed to belong to the node.
    pub fn count_refused(&self, name: &NodeName, why: &dyn Display) {
        if let Some(node) = self.node(name) {
            node.state().refused += 1;
            node.activity.event(EventKind::Impostor, &why.to_string());
        }
    }

    /// Returns the activity of a node, or `None` if the node is not known.
    pub fn activity(&self, name: &NodeName) -> Option<Arc<NodeActivity>> {
        self.node(name).map(|node| node.activity.clone())
    }

    /// Records an event in the history of a node, which the status shows.
    pub fn event(&self, name: &NodeName, kind: EventKind, text: &str) {
        if let Some(node) = self.node(name) {
            node.activity.event(kind, text);
        }
    }

    /// Records the round trip of every node at regular intervals. Never returns.
    pub async fn sample(self: Arc<Self>) {
        let mut interval = tokio::time::interval(activity::SAMPLE);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            // A visit of many nodes must not block the threads that serve streams.
            let registry = self.clone();
            let sampled = tokio::task::spawn_blocking(move || registry.sample_round_trips()).await;
            if let Err(error) = sampled {
                tracing::error!(%error, "can't sample round trips");
            }
        }
    }

    fn sample_round_trips(&self) {
        for node in self.nodes().values() {
            let usable = node.state().tunnels.iter().find(|t| t.is_usable()).cloned();
            node.activity.sample(usable.and_then(|tunnel| tunnel.round_trip()));
        }
    }

    pub fn is_connected(&self, name: &NodeName) -> bool {
        self.node(name).is_some_and(|node| node.state().tunnels.iter().any(|t| t.is_usable()))
    }

    /// Whether a later tunnel has replaced this one.
    pub fn has_newer(&self, tunnel: &Tunnel) -> bool {
        let Some(node) = self.node(&tunnel.node) else { return false };
        node.state().tunnels.iter().any(|other| other.id > tunnel.id && other.is_usable())
    }

    /// Returns up to `count` nodes that run a node-agent and accept streams, the least busy first, and draining ones last. In
    /// a large cluster, they are the least busy ones of a random sample.
    pub fn least_busy_agents(&self, count: usize) -> Vec<NodeName> {
        let random = rand::random();
        let usable = |most: usize, draining: bool| -> Vec<Arc<Node>> {
            let visited: Vec<_> = self.agents().walk(random).take(most).cloned().collect();
            let is_wanted = |node: &Arc<Node>| {
                let is_of_kind = match self.drain_of(node) {
                    Some(drain) => draining && !drain.is_over(),
                    None => !draining,
                };
                is_of_kind && node.state().has_usable_agent()
            };
            visited.into_iter().filter(is_wanted).take(SAMPLE).collect()
        };
        let least_busy = |sample: Vec<Arc<Node>>| {
            let mut found: Vec<_> =
                sample.iter().map(|node| (node.open_streams(), node.name.clone())).collect();
            found.sort();
            found.into_iter().map(|(_, name)| name)
        };
        // Few nodes take no new streams, but for a moment these may be all nodes of the sample.
        let mut sample = usable(4 * SAMPLE, false);
        if sample.is_empty() {
            sample = usable(usize::MAX, false);
        }
        let mut found: Vec<_> = least_busy(sample).take(count).collect();
        if found.len() < count {
            let missing = count - found.len();
            found.extend(least_busy(usable(usize::MAX, true)).take(missing));
        }
        found
    }

    /// Replaces the set of nodes that commands of this host drain, each with its deadline.
    pub(super) fn set_drains(&self, drains: HashMap<NodeName, SystemTime>) {
        let mut present = self.drains.write().unwrap_or_else(PoisonError::into_inner);
        let former = std::mem::take(&mut *present);
        let drain = |name: &NodeName, until: SystemTime| {
            let same = former.get(name).copied().filter(|drain| drain.until == until);
            same.unwrap_or_else(|| Drain::by_master(until))
        };
        *present = drains
            .into_iter()
            .map(|(name, until)| {
                let drain = drain(&name, until);
                (name, drain)
            })
            .collect();
    }

    /// Resets the streams through nodes whose drain has reached its deadline. Returns the next deadline.
    pub(super) fn cut_drained(&self) -> Option<Instant> {
        let now = Instant::now();
        let (over, waiting): (Vec<_>, Vec<_>) = {
            let drains = self.drains.read().unwrap_or_else(PoisonError::into_inner);
            let uncut = drains.iter().filter(|(_, drain)| drain.cut.is_none());
            uncut.map(|(name, drain)| (name.clone(), *drain)).partition(|(_, drain)| drain.ends <= now)
        };
        for (name, drain) in over {
            let tunnels = self.tunnels_of(&name);
            let cut: usize = tunnels.iter().map(|tunnel| tunnel.reset_streams(DRAINED)).sum();
            tracing::info!(node = %name, cut, "node is drained");
            let mut drains = self.drains.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(present) = drains.get_mut(&name).filter(|present| present.until == drain.until) {
                present.cut = Some(cut);
            }
        }
        waiting.iter().map(|(_, drain)| drain.ends).min()
    }

    /// Returns the drain of a node that is in force, if there is one. Of two, it is the one with the earlier deadline.
    pub fn drain(&self, name: &NodeName) -> Option<Drain> {
        let node = self.node(name)?;
        self.drain_of(&node)
    }

    fn drain_of(&self, node: &Node) -> Option<Drain> {
        let by_master = self.drains.read().unwrap_or_else(PoisonError::into_inner).get(&node.name).copied();
        let state = node.state();
        let by_node = state.tunnels.iter().filter_map(|t| t.drain().filter(|_| t.is_usable()));
        by_node.chain(by_master).min_by_key(|drain| drain.ends)
    }

    /// Fails if the drain of a node has reached its deadline.
    pub fn check_drain(&self, name: &NodeName) -> Result<(), DialError> {
        self.node(name).map_or(Ok(()), |node| self.check_drain_of(&node))
    }

    fn check_drain_of(&self, node: &Node) -> Result<(), DialError> {
        match self.drain_of(node) {
            Some(drain) if drain.is_over() => {
                Err(DialError::NoTunnel { node: node.name.to_string(), state: drain.refusal(&node.name) })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Returns the number of nodes that are draining or drained.
    pub fn draining(&self) -> usize {
        self.nodes().values().filter(|node| self.drain_of(node).is_some()).count()
    }

    /// Returns the round trip of a node, or `None` if the node is not connected or its round trip is not measured.
    pub fn round_trip(&self, name: &NodeName) -> Option<Duration> {
        self.round_trips(std::iter::once(name)).pop()??
    }

    /// Returns one item for each node, which is `None` if the node is not connected. Otherwise the item holds the
    /// measured round trip, if there is one.
    pub fn round_trips<'a>(
        &self,
        names: impl Iterator<Item = &'a NodeName>,
    ) -> Vec<Option<Option<Duration>>> {
        let round_trip = |name: &NodeName| {
            let node = self.node(name)?;
            let usable = node.state().tunnels.iter().find(|t| t.is_usable()).cloned()?;
            Some(usable.round_trip())
        };
        names.map(round_trip).collect()
    }

    /// Returns the least busy of the node's active tunnels, and the permit for one stream to that node. A tunnel that
    /// left the last ping unanswered is the last choice.
    pub fn pick(&self, name: &NodeName) -> Result<(Arc<Tunnel>, OwnedSemaphorePermit), DialError> {
        let none = |state: String| DialError::NoTunnel { node: name.to_string(), state };
        let node = self.node(name).ok_or_else(|| none("the node is not known".to_owned()))?;
        self.check_drain_of(&node)?;
        let tunnel = node.state().pick().map_err(|absent| none(absent.to_string()))?;
        let permit = node.streams.clone().try_acquire_owned().map_err(|_| {
            DialError::TooManyStreams(format!(
                "node {name} carries {} streams already (max_streams_per_node)",
                self.max_streams_per_node
            ))
        })?;
        Ok((tunnel, permit))
    }

    /// Picks as [`Self::pick`] does, and waits for a node that is about to have a tunnel.
    pub async fn pick_soon(&self, name: &NodeName) -> Result<(Arc<Tunnel>, OwnedSemaphorePermit), DialError> {
        loop {
            let Some(node) = self.node(name) else { return self.pick(name) };
            let linked = node.linked.notified();
            tokio::pin!(linked);
            // A tunnel that comes from now on is not missed.
            linked.as_mut().enable();
            let picked = self.pick(name);
            let lost = node.state().away_since.map(|since| since + PATIENCE);
            let until = lost.map_or(self.patient_until(), |until| until.max(self.patient_until()));
            if !matches!(picked, Err(DialError::NoTunnel { .. }))
                || self.check_drain_of(&node).is_err()
                || timeout_at(until, linked).await.is_err()
            {
                return picked;
            }
        }
    }

    /// Returns the tunnel of a node that was asked for a further connection, which it has perhaps dialled now. Only the node
    /// knows whether a link is that.
    pub(super) fn calling(&self, host: &VerifiedHost) -> Option<Arc<Tunnel>> {
        let node = self.node(&host.node)?;
        let tunnels = node.state().tunnels.clone();
        tunnels
            .into_iter()
            .find(|tunnel| tunnel.host.key == host.key && tunnel.is_usable() && tunnel.takes_call())
    }

    /// Returns the tunnel that [`Self::pick`] picks, for a stream that already has a permit.
    pub fn pick_again(&self, name: &NodeName) -> Option<Arc<Tunnel>> {
        let node = self.node(name)?;
        self.check_drain_of(&node).ok()?;
        node.state().pick().ok()
    }

    pub fn tunnels_of(&self, name: &NodeName) -> Vec<Arc<Tunnel>> {
        self.node(name).map(|node| node.state().tunnels.clone()).unwrap_or_default()
    }

    pub fn tunnels(&self) -> Vec<Arc<Tunnel>> {
        self.nodes().values().flat_map(|node| node.state().tunnels.clone()).collect()
    }

    /// Returns the names of all nodes with a tunnel that takes new streams.
    pub fn connected(&self) -> Vec<NodeName> {
        let nodes = self.nodes();
        let connected = |node: &&Arc<Node>| node.state().tunnels.iter().any(|tunnel| tunnel.is_usable());
        nodes.values().filter(connected).map(|node| node.name.clone()).collect()
    }

    /// Returns the number of nodes with a tunnel, and the number of all nodes.
    pub fn count(&self) -> (usize, usize) {
        (self.connected.load(Ordering::Relaxed), self.nodes().len())
    }

    /// Returns when the first of the host certificates in use expires, in seconds since 1970.
    pub fn first_certificate_to_expire(&self) -> Option<u64> {
        let tunnels = self.tunnels();
        let alive = tunnels.iter().filter(|tunnel| !tunnel.has_ended());
        alive.filter_map(|tunnel| tunnel.certificate_expires()).min().map(unix_seconds)
    }

    /// Returns every node as metrics show it.
    pub fn figures(&self) -> Vec<NodeFigures> {
        self.nodes().values().map(|node| node.figures()).collect()
    }

    /// Returns the status of every node.
    pub fn status(&self) -> Vec<NodeStatus> {
        self.nodes().values().map(|node| node.status(self.drain_of(node))).collect()
    }

    /// Returns the latest refusals of all nodes, at most `most` of them, the newest first.
    pub fn refusals(&self, most: usize) -> Vec<(NodeName, Event)> {
        let nodes = self.nodes();
        let of_node = |node: &Arc<Node>| {
            let name = node.name.clone();
            node.activity.refusals().into_iter().map(move |event| (name.clone(), event))
        };
        let mut refusals: Vec<_> = nodes.values().flat_map(of_node).collect();
        refusals.sort_by_key(|(_, event)| std::cmp::Reverse(event.unix_milliseconds));
        refusals.truncate(most);
        refusals
    }

    /// Returns the name of a node's state, or `None` if the node is not known.
    pub fn state(&self, name: &NodeName) -> Option<&'static str> {
        let node = self.node(name)?;
        let drain = self.drain_of(&node);
        Some(node.state().name(drain))
    }

    /// Returns the status of a node with its streams and history, or `None` if the node is not known.
    pub fn detail(&self, name: &NodeName) -> Option<NodeDetail> {
        let node = self.node(name)?;
        Some(NodeDetail { status: node.status(self.drain_of(&node)), detail: node.activity.detail() })
    }

    fn nodes(&self) -> Arc<Nodes> {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn node(&self, name: &NodeName) -> Option<Arc<Node>> {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Removes a node from those that have a tunnel to a node-agent. The caller must have locked the node.
    fn forget_agent(&self, node: &Arc<Node>) {
        let mut agents = self.agents();
        if agents.get(&node.name).is_some_and(|present| Arc::ptr_eq(present, node)) {
            agents.remove(&node.name);
        }
    }

    /// Locks the nodes with a node-agent. This lock may be taken while a node is locked, so no node may be locked while
    /// it is held.
    fn agents(&self) -> MutexGuard<'_, SampledSet<NodeName, Arc<Node>>> {
        self.agents.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut state = self.node.state();
        let was_connected = !state.tunnels.is_empty();
        state.remove(|tunnel| tunnel.id == self.tunnel.id);
        if was_connected && state.tunnels.is_empty() {
            self.registry.connected.fetch_sub(1, Ordering::Relaxed);
        }
        if !state.tunnels.iter().any(|tunnel| tunnel.is_node_agent()) {
            self.registry.forget_agent(&self.node);
        }
    }
}

impl Node {
    fn state(&self) -> MutexGuard<'_, NodeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_streams(&self) -> usize {
        self.state().tunnels.iter().map(|tunnel| tunnel.streams()).sum()
    }

    fn figures(&self) -> NodeFigures {
        let state = self.state().clone();
        let mut alive = state.tunnels.iter().filter(|tunnel| !tunnel.has_ended()).peekable();
        NodeFigures {
            name: self.name.clone(),
            connected: alive.peek().is_some(),
            round_trip: state.tunnels.iter().find(|t| t.is_usable()).and_then(|t| t.round_trip()),
            streams: state.tunnels.iter().map(|tunnel| tunnel.streams()).sum(),
            certificate_expires: alive.filter_map(|t| t.certificate_expires()).min().map(unix_seconds),
            refused: state.refused,
            activity: self.activity.figures(),
        }
    }

    fn status(&self, drain: Option<Drain>) -> NodeStatus {
        let state = self.state().clone();
        let alive: Vec<_> = state.tunnels.iter().filter(|tunnel| !tunnel.has_ended()).collect();
        let reason = if alive.is_empty() {
            state.absent.to_string()
        } else {
            drain.map_or_else(String::new, |drain| drain.reason())
        };
        let tunnels = alive.iter().enumerate();
        NodeStatus {
            name: self.name.clone(),
            state: state.name(drain).to_owned(),
            reason,
            tunnels: tunnels.map(|(i, tunnel)| tunnel_status(tunnel, i < state.connections)).collect(),
            refused: state.refused,
            totals: self.activity.totals(),
            drain: drain.map(|drain| drain.status()),
        }
    }
}

impl NodeState {
    /// Removes tunnels. The node's absence begins when its last one goes.
    fn remove(&mut self, which: impl Fn(&Tunnel) -> bool) {
        let had = !self.tunnels.is_empty();
        self.tunnels.retain(|tunnel| !which(tunnel));
        if had && self.tunnels.is_empty() {
            self.away_since = Some(Instant::now());
        }
    }

    /// Returns the tunnel for the next stream, or the reason why there is none.
    fn pick(&self) -> Result<Arc<Tunnel>, &Absent> {
        let usable =
            |suspect| self.tunnels.iter().filter(move |t| t.is_usable() && t.is_suspect() == suspect);
        let active = usable(false).take(self.connections).min_by_key(|tunnel| tunnel.streams());
        active.or_else(|| usable(true).next()).cloned().ok_or(&self.absent)
    }

    fn has_usable_agent(&self) -> bool {
        self.tunnels.iter().any(|tunnel| tunnel.is_usable() && tunnel.is_node_agent())
    }

    /// Returns the name of the state, as the status shows it.
    fn name(&self, drain: Option<Drain>) -> &'static str {
        if self.tunnels.iter().all(|tunnel| tunnel.has_ended()) {
            return self.absent.name();
        }
        drain.map_or(state::CONNECTED, |drain| drain.state())
    }
}

/// Describes for the history of a node how a tunnel was established.
fn arrival(tunnel: &Tunnel) -> String {
    let peer = tunnel.peer.map_or_else(|| "a peer without an address".to_owned(), |peer| peer.to_string());
    match tunnel.direction {
        Direction::Dialled => format!("dialled {peer}"),
        Direction::CallHome => format!("called home from {peer}"),
        Direction::CallHomeHttps => format!("called home over HTTPS from {peer}"),
    }
}

#[cfg(test)]
mod tests {
    use proto::Target;

    use super::*;
    use crate::tunnels::testing::{Master, n1};

    const HOUR: Duration = Duration::from_secs(3600);

    fn expect(registry: &Registry, names: &[&str], connections: usize) -> Vec<Arc<Tunnel>> {
        let expected = names.iter().map(|name| (name.parse().unwrap(), (connections, Absent::New)));
        registry.expect(&expected.collect())
    }

    fn target() -> Target {
        "10.0.0.1:80".parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_disconnect_does_not_remove_the_successor() {
        let mut master = Master::new(HOUR, 8);
        let registry = master.registry.clone();
        expect(&registry, &["n1"], 1);
        let [former, successor] = [master.tunnel().await, master.tunnel().await].map(|t| Arc::new(t.0));
        let (former, others) = registry.register(former).unwrap();
        assert_eq!((others.len(), former.absence), (0, None));
        let (successor, others) = registry.register(successor).unwrap();
        assert_eq!(others.iter().map(|t| t.id).collect::<Vec<_>>(), [former.tunnel().id]);
        drop(former);
        assert_eq!(registry.pick(&n1()).unwrap().0.id, successor.tunnel().id);
        assert_eq!((registry.count(), registry.least_busy_agents(3)), ((1, 1), vec![n1()]));
        drop(successor);
        assert!(matches!(registry.pick(&n1()), Err(DialError::NoTunnel { .. })));
        assert_eq!((registry.count(), registry.least_busy_agents(3)), ((0, 1), vec![]));
        tokio::time::advance(Duration::from_secs(7)).await;
        let (back, _) = registry.register(Arc::new(master.tunnel().await.0)).unwrap();
        assert!(back.absence.is_some_and(|absence| absence >= Duration::from_secs(7)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_least_busy_active_tunnel_is_picked_and_a_suspect_one_last() {
        let mut master = Master::new(HOUR, 8);
        let registry = master.registry.clone();
        expect(&registry, &["n1"], 2);
        let mut registered = Vec::new();
        for _ in 0..3 {
            registered.push(registry.register(Arc::new(master.tunnel().await.0)).unwrap().0);
        }
        let picked = || registry.pick(&n1()).unwrap().0.id;
        let [first, second, standby] = [0, 1, 2].map(|i| registered[i].tunnel().clone());
        let _stream = first.open(&target(), "test", HOUR).await.unwrap();
        assert_eq!(picked(), second.id);
        second.set_suspect(true);
        assert_eq!(picked(), standby.id, "it takes the place of the suspect one");
        standby.set_suspect(true);
        assert_eq!(picked(), first.id);
        first.set_suspect(true);
        assert_eq!(picked(), first.id, "a suspect one is better than none");
    }

    fn drain(registry: &Registry, seconds: u64) {
        let until = SystemTime::now() + Duration::from_secs(seconds);
        registry.set_drains(HashMap::from([(n1(), until), ("unknown".parse().unwrap(), until)]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_drained_node_is_the_last_choice_until_its_deadline_and_none_after_it() {
        let mut master = Master::new(HOUR, 8);
        let registry = master.registry.clone();
        drain(&registry, 60);
        // It may become known later.
        expect(&registry, &["n1"], 1);
        let (registered, _) = registry.register(Arc::new(master.tunnel().await.0)).unwrap();
        let tunnel = registered.tunnel().clone();
        assert_eq!((registry.state(&n1()), registry.draining()), (Some("draining"), 1));
        assert_eq!(registry.least_busy_agents(3), [n1()]);
        let mut stream = tunnel.open(&target(), "test", HOUR).await.unwrap();
        assert!(registry.pick(&n1()).is_ok());
        let deadline = registry.cut_drained().unwrap();
        assert_eq!(tunnel.streams(), 1);

        tokio::time::sleep_until(deadline).await;
        assert_eq!((registry.state(&n1()), registry.least_busy_agents(3)), (Some("drained"), vec![]));
        let began = Instant::now();
        for picked in [registry.pick(&n1()), registry.pick_soon(&n1()).await] {
            let error = picked.map(drop).unwrap_err().to_string();
            assert!(error.contains("`master-agent node undrain n1`"), "{error}");
        }
        assert!(registry.pick_again(&n1()).is_none());
        assert_eq!(began.elapsed(), Duration::ZERO, "nothing is waited for");
        assert_eq!(registry.cut_drained(), None);
        assert!(stream.reader.fill().await.is_err_and(|error| error.0 == DRAINED));
        let status = registry.detail(&n1()).unwrap().status;
        assert_eq!(status.drain.unwrap().cut, Some(1));
        assert!(status.reason.starts_with("since "), "{}", status.reason);

        drain(&registry, 60);
        assert_eq!(registry.state(&n1()), Some("draining"), "a new deadline takes the place of the former");
        registry.set_drains(HashMap::new());
        assert_eq!((registry.state(&n1()), registry.draining()), (Some("connected"), 0));
        assert!(registry.pick(&n1()).is_ok());
        drop(registered);
        drain(&registry, 60);
        assert_eq!(registry.state(&n1()), Some("connecting"), "it has no tunnel");
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_says_on_each_tunnel_whether_it_drains() {
        let mut master = Master::new(HOUR, 8);
        let registry = master.registry.clone();
        expect(&registry, &["n1"], 2);
        let mut registered = Vec::new();
        for _ in 0..2 {
            registered.push(registry.register(Arc::new(master.tunnel().await.0)).unwrap().0);
        }
        let [first, second] = [0, 1].map(|i| registered[i].tunnel().clone());
        first.on_drain(Duration::from_millis(u64::MAX));
        assert_eq!(registry.state(&n1()), Some("draining"));
        first.on_drain(Duration::from_millis(1));
        tokio::time::sleep(Duration::from_millis(2)).await;
        let error = registry.pick(&n1()).map(drop).unwrap_err().to_string();
        assert!(error.contains("`node-agent undrain`"), "{error}");
        // The earlier deadline counts, and a tunnel that takes no streams does not.
        drain(&registry, 60);
        assert_eq!(registry.state(&n1()), Some("drained"));
        first.retire("a successor is there").await;
        assert_eq!(registry.state(&n1()), Some("draining"));
        registry.set_drains(HashMap::new());
        assert_eq!(registry.state(&n1()), Some("connected"));
        second.on_drain(Duration::from_secs(1));
        second.on_drain(Duration::ZERO);
        assert_eq!(registry.drain(&n1()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_has_limits_of_tunnels_and_of_streams() {
        let mut master = Master::new(HOUR, 2);
        let registry = master.registry.clone();
        let unknown = registry.register(Arc::new(master.tunnel().await.0));
        assert!(matches!(unknown, Err(NotRegistered::Unknown(node)) if node == n1()));
        expect(&registry, &["n1"], 1);
        let mut registered = Vec::new();
        for _ in 0..=STANDBY {
            registered.push(registry.register(Arc::new(master.tunnel().await.0)).unwrap().0);
        }
        let more = Arc::new(master.tunnel().await.0);
        assert!(matches!(registry.register(more.clone()), Err(NotRegistered::Full(node)) if node == n1()));
        registered[0].tunnel().retire("a successor is there").await;
        registered.push(registry.register(more).unwrap().0);
        let permits = [registry.pick(&n1()).unwrap().1, registry.pick(&n1()).unwrap().1];
        assert!(matches!(registry.pick(&n1()), Err(DialError::TooManyStreams(_))));
        drop(permits);
        assert!(registry.pick(&n1()).is_ok());
        // The registrations of a removed node do not affect the new entry of that node.
        assert_eq!(expect(&registry, &["n2"], 1).len(), 4);
        assert_eq!((registry.count(), registry.least_busy_agents(1)), ((0, 1), vec![]));
        expect(&registry, &["n1"], 1);
        let (present, _) = registry.register(Arc::new(master.tunnel().await.0)).unwrap();
        drop(registered);
        assert_eq!(registry.pick(&n1()).unwrap().0.id, present.tunnel().id);
        assert_eq!(registry.least_busy_agents(1), [n1()]);
    }
}
