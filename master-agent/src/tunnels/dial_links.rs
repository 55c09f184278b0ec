//! Dials nodes, and keeps links to every node of the inventory that has an address to dial.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use proto::{NodeName, Target, backoff::Backoff, relink};
use proto_net::{socket, tasks::Tasks};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    absent::Absent,
    config::TunnelsConfig,
    counters::TunnelMetrics,
    login::MasterLogin,
    refusals::Refusals,
    registry::Registry,
    session::{
        error::TunnelError,
        handshake::{Credentials, SshClient},
        identity::HostIdentity,
    },
    supervision::{Linked, Supervisor},
    trust::Trust,
    tunnel::{Direction, Tunnel},
};
use crate::{
    admin_api::EventKind,
    identity::UserIdentity,
    routing::inventory::{Inventory, InventoryNode},
};

/// The longest time to connect to a node.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(2500);
/// The longest time to tell a node that its tunnel is retired.
const RETIRE_TIMEOUT: Duration = Duration::from_millis(1500);
/// A tunnel that lasts longer than this resets the back-off.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// Opens the byte streams of which links are made.
pub trait Connect: Send + Sync + 'static {
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Returns the stream and the address of its peer.
    fn connect(
        &self,
        address: &Target,
    ) -> impl Future<Output = io::Result<(Self::Io, Option<SocketAddr>)>> + Send;
}

/// Opens TCP connections.
pub struct Tcp;

impl Connect for Tcp {
    type Io = TcpStream;

    async fn connect(&self, address: &Target) -> io::Result<(TcpStream, Option<SocketAddr>)> {
        let stream = TcpStream::connect((address.host.to_string(), address.port)).await?;
        socket::tune_link(&stream);
        let peer = stream.peer_addr().ok();
        Ok((stream, peer))
    }
}

/// The parts of the agent that dialling a node takes.
pub struct Dialling<C> {
    pub connect: C,
    pub config: TunnelsConfig,
    pub client: Arc<SshClient>,
    pub trust: Arc<Trust>,
    pub login: Arc<MasterLogin>,
    pub registry: Arc<Registry>,
    pub refusals: Refusals,
    pub supervisor: Arc<Supervisor>,
    pub metrics: TunnelMetrics,
    /// Cancelled when the agent stops and must not establish new tunnels.
    pub draining: CancellationToken,
}

/// Runs the dial loops of all nodes that have an address to dial.
pub struct DialLinks<C> {
    nodes: watch::Receiver<Arc<Inventory>>,
    dialling: Arc<Dialling<C>>,
    tasks: Tasks,
    loops: HashMap<NodeName, (InventoryNode, Tasks)>,
}

impl<C: Connect> DialLinks<C> {
    /// Takes the group `tasks`, below which each node has a group for its loops.
    pub fn new(nodes: watch::Receiver<Arc<Inventory>>, dialling: Dialling<C>, tasks: Tasks) -> Self {
        Self { nodes, dialling: Arc::new(dialling), tasks, loops: HashMap::new() }
    }

    /// Follows the nodes until their sender is gone.
    pub async fn run(mut self) {
        loop {
            self.follow();
            if self.nodes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Starts loops for new nodes, ends those of nodes that are gone, and restarts those that changed.
    fn follow(&mut self) {
        let nodes = self.nodes.borrow_and_update().clone();
        self.loops.retain(|name, (was, tasks)| {
            let stays = nodes.node(name).is_some_and(|node| is_same_link(node, was));
            if !stays {
                tasks.cancel();
                // A node that has lost its address may still call home.
                self.dialling.registry.set_absent(name, Absent::WaitingForCallHome);
            }
            stays
        });
        for node in nodes.nodes() {
            let Some(address) = &node.dial else { continue };
            if self.loops.contains_key(&node.name) {
                continue;
            }
            let tasks = self.tasks.child();
            for _ in 0..node.connections {
                let dial_loop = DialLoop {
                    dialling: self.dialling.clone(),
                    node: node.clone(),
                    address: address.clone(),
                    tasks: tasks.clone(),
                };
                tasks.spawn(dial_loop.run());
            }
            self.loops.insert(node.name.clone(), (node.clone(), tasks));
        }
    }
}

/// Whether both entries of the inventory lead to the same links, so that existing links can stay.
fn is_same_link(a: &InventoryNode, b: &InventoryNode) -> bool {
    let link = |n: &InventoryNode| {
        (
            n.dial.clone(),
            n.user.clone(),
            n.trust.clone(),
            n.key_file.clone(),
            n.connections,
            n.front_end_listen,
        )
    };
    link(a) == link(b)
}

/// The dial loop of one link. A node has as many of them as it has `connections`.
struct DialLoop<C> {
    dialling: Arc<Dialling<C>>,
    node: InventoryNode,
    address: Target,
    /// The group of the node's tasks.
    tasks: Tasks,
}

impl<C: Connect> DialLoop<C> {
    /// Dials, supervises the tunnel until it ends, and dials again. The pauses grow while dials fail.
    async fn run(self) {
        let Dialling { config, registry, draining, .. } = &*self.dialling;
        let name = &self.node.name;
        let mut backoff = Backoff::new(config.backoff_min, config.backoff_max);
        while !draining.is_cancelled() {
            if !registry.is_connected(name) {
                registry.set_absent(name, Absent::Connecting);
            }
            let error = match self.dial().await {
                Ok(first) => {
                    let (began, reason) = self.supervise_and_replace(first).await;
                    if began.elapsed() > STABLE_AFTER {
                        backoff.reset();
                    }
                    reason
                }
                Err(error) => error.to_string(),
            };
            registry.set_absent(name, Absent::Retrying { error, at: SystemTime::now() });
            sleep(backoff.next_delay(rand::random())).await;
        }
    }

    /// Supervises a tunnel, and replaces it before the master's certificate that authenticated it expires. A replaced
    /// tunnel keeps its streams. Returns when the last tunnel was established and why it ended.
    async fn supervise_and_replace(&self, mut linked: Linked) -> (Instant, String) {
        loop {
            let tunnel = linked.0.tunnel().clone();
            let mut supervised = Box::pin(self.dialling.supervisor.clone().supervise(linked));
            linked = tokio::select! {
                reason = &mut supervised => return (tunnel.established, reason),
                next = self.dial_successor(&tunnel) => next,
            };
            let told = tunnel.retire("the master has made another link to this node");
            let _ = timeout(RETIRE_TIMEOUT, told).await;
            self.tasks.spawn(supervised);
        }
    }

    /// Dials again in time. Never completes if the tunnel needs no successor.
    async fn dial_successor(&self, tunnel: &Tunnel) -> Linked {
        let Dialling { config, draining, .. } = &*self.dialling;
        // A plain sshd checks certificates in handshakes only.
        let Some(expires) = tunnel.user_expires().filter(|_| tunnel.is_node_agent()) else {
            return std::future::pending().await;
        };
        let left = expires.duration_since(SystemTime::now()).unwrap_or_default();
        sleep(relink::due(left, rand::random())).await;
        let mut backoff = Backoff::new(config.backoff_min, config.backoff_max);
        loop {
            if draining.is_cancelled() {
                return std::future::pending().await;
            }
            if let Ok(next) = self.dial().await {
                return next;
            }
            sleep(backoff.next_delay(rand::random())).await;
        }
    }

    /// Establishes and registers a tunnel. A failure is counted and logged.
    async fn dial(&self) -> Result<Linked, TunnelError> {
        let Dialling { metrics, registry, .. } = &*self.dialling;
        metrics.tunnel_dials.inc();
        self.link().await.inspect_err(|error| {
            metrics.tunnel_dials_failed.inc();
            tracing::warn!(node = %self.node.name, address = %self.address, %error, "no tunnel");
            registry.event(&self.node.name, EventKind::Retrying, &error.to_string());
        })
    }

    async fn link(&self) -> Result<Linked, TunnelError> {
        let Dialling { config, client, trust, refusals, supervisor, .. } = &*self.dialling;
        let (link, peer) = self.connect().await.inspect_err(|_| refusals.count("connect"))?;
        let user = self.user().await?;
        let credentials = Credentials {
            verify: trust.dialled(&self.node, &self.address),
            login: &self.node.user,
            user: &user,
            permit: None,
        };
        let session = client.authenticate(link, credentials, &self.tasks).await;
        let session = session.inspect_err(|error| refusals.handshake(error))?;
        let HostIdentity::Verified(host) = session.identity.clone() else {
            return Err(TunnelError::Ssh(russh::Error::UnknownKey));
        };
        let established = Tunnel::establish(session, host, Direction::Dialled, peer, config).await;
        let (tunnel, events) = established.inspect_err(|error| refusals.handshake(error))?;
        Ok((supervisor.register(tunnel).await?, events))
    }

    async fn connect(&self) -> Result<(C::Io, Option<SocketAddr>), TunnelError> {
        let address = &self.address;
        let failed =
            |why: &dyn std::fmt::Display| TunnelError::Connect(format!("can't connect to {address}: {why}"));
        match timeout(CONNECT_TIMEOUT, self.dialling.connect.connect(address)).await {
            Ok(Ok(connected)) => Ok(connected),
            Ok(Err(error)) => Err(failed(&error)),
            Err(_) => Err(failed(&"no answer")),
        }
    }

    /// Returns the key to log in with, which is the node's own if the inventory names one.
    async fn user(&self) -> Result<Arc<UserIdentity>, TunnelError> {
        let Some(path) = self.node.key_file.clone() else { return Ok(self.dialling.login.current()) };
        let user = UserIdentity::load(path).await;
        user.map(Arc::new).map_err(|error| TunnelError::Connect(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use proto_net::mux::Notice;

    use super::*;
    use crate::tunnels::testing::{Master, MemoryNode, NodeSide, n1};

    const HOUR: Duration = Duration::from_secs(3600);

    fn links(master: &Master) -> DialLinks<MemoryNode> {
        master.registry.expect(&[(n1(), (1, Absent::New))].into_iter().collect());
        let dialling = Dialling {
            connect: master.node.clone(),
            config: master.config.clone(),
            client: master.client.clone(),
            trust: master.trust.clone(),
            login: master.login.clone(),
            registry: master.registry.clone(),
            refusals: master.refusals.clone(),
            supervisor: master.supervisor.clone(),
            metrics: master.metrics.clone(),
            draining: CancellationToken::new(),
        };
        DialLinks::new(master.nodes.subscribe(), dialling, master.tasks.clone())
    }

    async fn registered(master: &Master, count: usize) {
        while master.registry.tunnels_of(&n1()).len() != count {
            sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_while_dials_fail_and_shrink_after_a_steady_tunnel() {
        let mut master = Master::new(HOUR, 8);
        *master.node.failures.lock().unwrap() = 6;
        master.tasks.spawn(links(&master).run());
        let first = master.tunnels.recv().await.unwrap();
        registered(&master, 1).await;
        let pauses = |from: usize| -> Vec<Duration> {
            let dials = master.node.dials.lock().unwrap();
            dials[from..].windows(2).map(|pair| pair[1] - pair[0]).collect()
        };
        let (min, max) = (master.config.backoff_min, master.config.backoff_max);
        for (i, pause) in pauses(0).iter().enumerate() {
            let ceiling = (min * 2u32.pow(i as u32)).min(max);
            // The runtime's timer has a resolution of a millisecond.
            let slack = Duration::from_millis(2);
            assert!((ceiling / 2..=ceiling + slack).contains(pause), "{i}: {pause:?} of {ceiling:?}");
        }
        assert_eq!(pauses(0).len(), 6);
        assert_eq!(master.metrics.tunnel_dials_failed.get(), 6);
        sleep(2 * STABLE_AFTER).await;
        let ended = Instant::now();
        master.registry.tunnels_of(&n1())[0].close("the test ends it").await;
        drop(first);
        let second = master.tunnels.recv().await.unwrap();
        assert!(second.connected - ended < 2 * min, "{:?}", second.connected - ended);
    }

    #[tokio::test(start_paused = true)]
    async fn a_successor_is_linked_before_the_former_link_retires() {
        let life = Duration::from_secs(600);
        let mut master = Master::new(life, 8);
        master.tasks.spawn(links(&master).run());
        let mut former = master.tunnels.recv().await.unwrap();
        registered(&master, 1).await;
        let (tunnel, _) = master.registry.pick(&n1()).unwrap();
        let stream = tunnel.open(&"10.0.0.1:80".parse().unwrap(), "test", HOUR).await.unwrap();
        let successor: NodeSide = master.tunnels.recv().await.unwrap();
        let after = successor.connected - former.connected;
        assert!(life * 2 / 5 - Duration::from_secs(1) <= after && after < life * 2 / 3, "{after:?}");
        let Some(Notice::GoAway(_)) = former.notices.recv().await else { panic!("no GOAWAY") };
        // The new one is there, and the old one keeps its stream.
        registered(&master, 2).await;
        assert_ne!(master.registry.pick(&n1()).unwrap().0.id, tunnel.id);
        sleep(Duration::from_secs(30)).await;
        assert!(tunnel.is_retired() && !tunnel.has_ended());
        drop(stream);
        let reason = tunnel.ended().await;
        assert_eq!(reason, "another link has taken its place, and its streams have ended");
        registered(&master, 1).await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_loops_of_a_node_end_with_its_entry_and_begin_with_it() {
        let mut master = Master::new(HOUR, 8);
        let entry = master.entry();
        master.tasks.spawn(links(&master).run());
        let first = master.tunnels.recv().await.unwrap();
        registered(&master, 1).await;
        master.nodes.send_replace(Arc::default());
        registered(&master, 0).await;
        sleep(HOUR).await;
        assert_eq!(master.node.dials.lock().unwrap().len(), 1);
        drop(first);
        master.nodes.send_replace(Arc::new(Inventory::new(vec![entry], Vec::new())));
        master.tunnels.recv().await.unwrap();
        registered(&master, 1).await;
    }
}
