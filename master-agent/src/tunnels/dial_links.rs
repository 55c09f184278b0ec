//! Dials nodes, and keeps links to every node of the inventory that has an address to dial.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use proto::{NodeName, Target, backoff::Backoff, relink};
use proto_net::{clock::Clock, socket, tasks::Tasks};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    absent::Absent,
    config::TunnelsConfig,
    counters::TunnelMetrics,
    further::Attempts,
    login::MasterLogin,
    refusals::Refusals,
    registry::Registry,
    session::{
        error::TunnelError,
        handshake::{Credentials, Session, SshClient},
        identity::HostIdentity,
    },
    supervision::{Linked, Supervisor},
    trust::Trust,
    tunnel::{Direction, Tunnel},
};
use crate::{
    admin_api::EventKind,
    identity::{UserIdentity, VerifiedHost},
    routing::inventory::{Inventory, InventoryNode},
};

/// The longest time to connect to a node.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(2500);
/// The longest time to tell a node that its tunnel is retired.
const RETIRE_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long a tunnel has to last until it is replaced because its node asks for that.
const RELINK_AFTER: Duration = Duration::from_secs(1);
/// How long the tunnel goes on then, unless the node itself ends it.
const HELD: Duration = Duration::from_secs(60);
/// A tunnel that lasts longer than this resets the back-off.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// The maximum number of handshakes in progress. After a restart, all nodes are dialled at once, and each handshake takes
/// a millisecond or two of a thread that also carries streams.
const MAX_HANDSHAKES: usize = 64;
/// How long the links of a node may take to end when the node's entry in the inventory has changed.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a failure that stays the same is logged as a warning.
const REMINDER: Duration = Duration::from_secs(600);

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
    pub clock: Clock,
    /// Cancelled when the agent stops and must not establish new tunnels.
    pub draining: CancellationToken,
}

/// Runs the dial loops of all nodes that have an address to dial.
pub struct DialLinks<C> {
    nodes: watch::Receiver<Arc<Inventory>>,
    dialling: Arc<Dialling<C>>,
    /// Has one permit for each handshake that may be in progress.
    turns: Arc<Semaphore>,
    tasks: Tasks,
    loops: HashMap<NodeName, NodeLoops>,
}

/// The dial loops of one node.
struct NodeLoops {
    entry: InventoryNode,
    /// The group of the loops and of the sessions that they establish.
    tasks: Tasks,
    /// Cancelled when the entry is no longer that of the inventory.
    superseded: CancellationToken,
}

impl<C: Connect> DialLinks<C> {
    /// Takes the group `tasks`, below which each node has a group for its loops.
    pub fn new(nodes: watch::Receiver<Arc<Inventory>>, dialling: Dialling<C>, tasks: Tasks) -> Self {
        let turns = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        Self { nodes, dialling: Arc::new(dialling), turns, tasks, loops: HashMap::new() }
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
        let stays = |name: &NodeName, loops: &NodeLoops| {
            nodes.node(name).is_some_and(|node| is_same_link(node, &loops.entry))
        };
        for (name, loops) in self.loops.extract_if(|name, loops| !stays(name, loops)) {
            loops.superseded.cancel();
            // A node that has lost its address may still call home.
            self.dialling.registry.set_absent(&name, Absent::WaitingForCallHome);
            // The loops close their links and end. Nothing of them may stay, whoever holds a tunnel.
            self.tasks.spawn(async move { loops.tasks.drain(END_TIMEOUT).await });
        }
        for node in nodes.nodes() {
            let Some(address) = &node.dial else { continue };
            if self.loops.contains_key(&node.name) {
                continue;
            }
            let (tasks, superseded) = (self.tasks.child(), CancellationToken::new());
            for _ in 0..node.connections {
                let dial_loop = DialLoop {
                    dialling: self.dialling.clone(),
                    node: node.clone(),
                    address: address.clone(),
                    turns: self.turns.clone(),
                    tasks: tasks.clone(),
                    superseded: superseded.clone(),
                    failure: LastFailure::default(),
                };
                tasks.spawn(dial_loop.run());
            }
            self.loops.insert(node.name.clone(), NodeLoops { entry: node.clone(), tasks, superseded });
        }
    }
}

/// Whether both entries of the inventory lead to the same links, so that existing links can stay.
fn is_same_link(a: &InventoryNode, b: &InventoryNode) -> bool {
    let InventoryNode {
        name: _,
        dial,
        user,
        addresses: _,
        cidrs: _,
        default_route: _,
        connections,
        trust,
        key_file,
        front_end_listen,
    } = a;
    *dial == b.dial
        && *user == b.user
        && *connections == b.connections
        && *trust == b.trust
        && *key_file == b.key_file
        && *front_end_listen == b.front_end_listen
}

/// The dial loop of one link. A node has as many of them as it has `connections`.
struct DialLoop<C> {
    dialling: Arc<Dialling<C>>,
    node: InventoryNode,
    address: Target,
    turns: Arc<Semaphore>,
    /// The group of the node's tasks.
    tasks: Tasks,
    superseded: CancellationToken,
    failure: LastFailure,
}

impl<C: Connect> DialLoop<C> {
    /// Dials, supervises the tunnel until it ends, and dials again. The pauses grow while dials fail. Returns when the
    /// node's entry is superseded.
    async fn run(self) {
        let Dialling { config, registry, draining, .. } = &*self.dialling;
        let name = &self.node.name;
        let mut backoff = Backoff::new(config.backoff_min, config.backoff_max);
        // The first dials are spread, too, since the loops of all nodes begin together.
        let mut pause = config.backoff_min.mul_f64(rand::random());
        while self.superseded.run_until_cancelled(sleep(pause)).await.is_some() && !draining.is_cancelled() {
            if !registry.is_connected(name) {
                registry.set_absent(name, Absent::Connecting);
            }
            let Some(dialled) = self.superseded.run_until_cancelled(self.dial()).await else { return };
            let error = match dialled {
                Ok(first) => {
                    let (began, reason) = self.supervise_and_replace(first).await;
                    if began.elapsed() > STABLE_AFTER {
                        backoff.reset();
                    }
                    reason
                }
                Err(error) => error.to_string(),
            };
            if self.superseded.is_cancelled() {
                return;
            }
            registry.set_absent(name, Absent::Retrying { error, at: SystemTime::now() });
            pause = backoff.next_delay(rand::random());
        }
    }

    /// Supervises a tunnel, and replaces it when its node asks for that, or before the master's certificate that
    /// authenticated it expires. A replaced tunnel keeps its streams. Returns when the last tunnel was established and why it ended.
    async fn supervise_and_replace(&self, mut linked: Linked) -> (Instant, String) {
        loop {
            let tunnel = linked.0.tunnel().clone();
            let supervisor = self.dialling.supervisor.clone();
            let mut supervised = Box::pin(supervise(supervisor, linked, self.superseded.clone()));
            let (next, hold) = tokio::select! {
                reason = &mut supervised => return (tunnel.established, reason),
                never = self.keep_further(&tunnel) => match never {},
                next = self.dial_successor(&tunnel) => next,
            };
            linked = next;
            self.tasks.spawn(async move {
                let retire = async {
                    sleep(hold).await;
                    let told = tunnel.retire("the master has made another link to this node");
                    let _ = timeout(RETIRE_TIMEOUT, told).await;
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    _ = supervised => {}
                    () = retire => {}
                }
            });
        }
    }

    /// Dials again in time, and also returns how long the tunnel goes on. Never completes if the tunnel needs no successor.
    async fn dial_successor(&self, tunnel: &Tunnel) -> (Linked, Duration) {
        let Dialling { config, clock, draining, .. } = &*self.dialling;
        let expiring = async {
            match tunnel.user_expires() {
                // A plain sshd checks certificates in handshakes only.
                Some(expires) if tunnel.is_node_agent() => successor_due(*clock, expires).await,
                _ => std::future::pending().await,
            }
        };
        let asked = async {
            tokio::join!(tunnel.relink_asked(), tokio::time::sleep_until(tunnel.established + RELINK_AFTER));
        };
        let hold = tokio::select! {
            () = expiring => Duration::ZERO,
            () = asked => HELD,
        };
        let mut backoff = Backoff::new(config.backoff_min, config.backoff_max);
        loop {
            if draining.is_cancelled() {
                return std::future::pending().await;
            }
            if let Ok(next) = self.dial().await {
                return (next, hold);
            }
            sleep(backoff.next_delay(rand::random())).await;
        }
    }

    /// Establishes and registers a tunnel. A failure is counted and logged.
    async fn dial(&self) -> Result<Linked, TunnelError> {
        let Dialling { metrics, registry, .. } = &*self.dialling;
        metrics.tunnel_dials.inc();
        let linked = self.link().await;
        match &linked {
            Ok(_) => self.failure.clear(),
            Err(error) => {
                metrics.tunnel_dials_failed.inc();
                let (node, address, text) = (&self.node.name, &self.address, error.to_string());
                if self.failure.is_news(&text) {
                    tracing::warn!(%node, %address, %error, "no tunnel");
                } else {
                    tracing::debug!(%node, %address, %error, "no tunnel");
                }
                registry.event(node, EventKind::Retrying, &text);
            }
        }
        linked
    }

    /// Makes further connections of a tunnel whenever they are worth having.
    async fn keep_further(&self, tunnel: &Tunnel) -> Infallible {
        let mut attempts = Attempts::default();
        loop {
            tunnel.wants_further().await;
            attempts.after(tunnel, self.dial_further(tunnel).await).await;
        }
    }

    /// Makes a further connection of a tunnel, with the key by which the node knows the tunnel's master.
    async fn dial_further(&self, tunnel: &Tunnel) -> Result<(), TunnelError> {
        let (link, _) = self.connect().await?;
        let _turn = self.turns.acquire().await;
        let (session, host) = self.authenticate(link, &tunnel.session.user).await?;
        if host.key != tunnel.host.key {
            return Err(TunnelError::NotJoined);
        }
        tunnel.join(session).await
    }

    /// Performs the handshake. Returns the session and its verified host.
    async fn authenticate(
        &self,
        link: C::Io,
        user: &Arc<UserIdentity>,
    ) -> Result<(Session, VerifiedHost), TunnelError> {
        let Dialling { client, trust, refusals, .. } = &*self.dialling;
        let verify = trust.dialled(&self.node, &self.address);
        let credentials = Credentials { verify, login: &self.node.user, user, permit: None };
        let session = client.authenticate(link, credentials, &self.tasks).await;
        let session = session.inspect_err(|error| refusals.handshake(error))?;
        match session.identity.clone() {
            HostIdentity::Verified(host) => Ok((session, host)),
            HostIdentity::Unknown(..) => Err(TunnelError::Ssh(russh::Error::UnknownKey)),
        }
    }

    async fn link(&self) -> Result<Linked, TunnelError> {
        let Dialling { config, refusals, supervisor, .. } = &*self.dialling;
        let (link, peer) = self.connect().await.inspect_err(|_| refusals.count("connect"))?;
        // A node that can't be connected to takes no turn. The limit of the handshake begins with the turn.
        let turn = self.turns.acquire().await;
        let user = self.user().await?;
        let (session, host) = self.authenticate(link, &user).await?;
        let (to, callers) = ((Direction::Dialled, peer), supervisor.max_callers());
        let established = Tunnel::establish(session, host, to, config, callers, None).await;
        let established = established.inspect_err(|error| refusals.handshake(error))?;
        let (tunnel, notices) = established.ok_or(TunnelError::NotJoined)?;
        drop(turn);
        Ok((supervisor.register(tunnel).await?, notices))
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

/// Supervises a tunnel until it ends, and returns the reason. Closes it when the node's entry is superseded.
async fn supervise(supervisor: Arc<Supervisor>, linked: Linked, superseded: CancellationToken) -> String {
    let tunnel = linked.0.tunnel().clone();
    let mut supervised = pin!(supervisor.clone().supervise(linked));
    tokio::select! {
        reason = supervised.as_mut() => return reason,
        () = superseded.cancelled() => {}
    }
    let reason = match supervisor.nodes.borrow().node(&tunnel.node) {
        Some(_) => "the node's entry in the inventory has changed",
        None => "the node is no longer in the inventory",
    };
    let ((), reason) = tokio::join!(tunnel.close(reason), supervised);
    reason
}

/// Waits until a link needs a successor, since the certificate that authenticated the master expires at `expires`.
async fn successor_due(clock: Clock, expires: SystemTime) {
    let now = clock.now();
    let due = relink::due(expires.duration_since(now).unwrap_or_default(), rand::random());
    // The clock tells if time has passed that the timer does not count, as while a host is suspended, and the timer goes
    // on if the clock was set back.
    tokio::select! {
        () = sleep(due) => {}
        () = clock.reached(now.checked_add(due)) => {}
    }
}

/// The last failure of a dial loop, by which one that stays the same is told from news.
#[derive(Default)]
struct LastFailure(Mutex<Option<(String, Instant)>>);

impl LastFailure {
    /// Whether the failure differs from the last one, or has last been news a while ago.
    fn is_news(&self, error: &str) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = last.as_ref().is_some_and(|(text, at)| text == error && at.elapsed() < REMINDER);
        if !is_known {
            *last = Some((error.to_owned(), Instant::now()));
        }
        !is_known
    }

    fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use futures_util::FutureExt;
    use proto_net::mux::Notice;
    use tokio::io::{AsyncReadExt, DuplexStream, duplex};

    use super::*;
    use crate::tunnels::testing::{Master, MemoryNode, NodeSide, n1};

    const HOUR: Duration = Duration::from_secs(3600);

    fn links(master: &Master) -> DialLinks<MemoryNode> {
        master.registry.expect(&[(n1(), (1, Absent::New))].into_iter().collect());
        links_by(master, master.node.clone())
    }

    fn links_by<C: Connect>(master: &Master, connect: C) -> DialLinks<C> {
        let dialling = Dialling {
            connect,
            config: master.config.clone(),
            client: master.client.clone(),
            trust: master.trust.clone(),
            login: master.login.clone(),
            registry: master.registry.clone(),
            refusals: master.refusals.clone(),
            supervisor: master.supervisor.clone(),
            metrics: master.metrics.clone(),
            clock: master.clock,
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
    async fn a_node_that_asks_for_another_link_gets_it_and_the_former_one_keeps_its_streams() {
        let mut master = Master::new(HOUR, 8);
        master.tasks.spawn(links(&master).run());
        let mut former = master.tunnels.recv().await.unwrap();
        registered(&master, 1).await;
        let (tunnel, _) = master.registry.pick(&n1()).unwrap();
        let stream = tunnel.open(&"10.0.0.1:80".parse().unwrap(), "test", HOUR).await.unwrap();
        assert!(former.mux.ask_to_relink().await);
        let successor: NodeSide = master.tunnels.recv().await.unwrap();
        let after = successor.connected - former.connected;
        assert!(after >= RELINK_AFTER && after < 2 * RELINK_AFTER, "{after:?}");
        // The node decides when the former one takes no new streams.
        sleep(HELD / 2).await;
        assert_eq!(master.registry.pick(&n1()).unwrap().0.id, tunnel.id);
        former.mux.go_away("the node's next process serves").await;
        sleep(Duration::from_millis(100)).await;
        assert_ne!(master.registry.pick(&n1()).unwrap().0.id, tunnel.id);
        let Some(Notice::GoAway(_)) = former.notices.recv().await else { panic!("no GOAWAY") };
        assert!(successor.connected.elapsed() >= HELD && !tunnel.has_ended());
        // Nobody is asked on a link that the master has dialled itself.
        assert!(!tunnel.ask_to_relink().await);
        drop(stream);
        tunnel.ended().await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_loops_of_a_node_end_with_its_entry_and_begin_with_it() {
        let mut master = Master::new(24 * HOUR, 8);
        let entry = master.entry();
        master.tasks.spawn(links(&master).run());
        let first = master.tunnels.recv().await.unwrap();
        registered(&master, 1).await;
        master.nodes.send_replace(Arc::default());
        registered(&master, 0).await;
        sleep(HOUR).await;
        assert_eq!(master.node.dials.lock().unwrap().len(), 1);
        drop(first);
        let list = |master: &Master, entry: InventoryNode| {
            master.nodes.send_replace(Arc::new(Inventory::new(vec![entry], Vec::new())));
        };
        list(&master, entry.clone());
        let _second = master.tunnels.recv().await.unwrap();
        registered(&master, 1).await;
        // A tunnel ends although somebody holds it, as the front end does.
        let held = master.registry.tunnels_of(&n1()).remove(0);
        list(&master, InventoryNode { user: "another".to_owned(), ..entry.clone() });
        let ended = timeout(HOUR, held.ended()).await;
        assert_eq!(ended.as_deref(), Ok("the node's entry in the inventory has changed"));
        let _third = master.tunnels.recv().await.unwrap();
        registered(&master, 1).await;
        let next = master.registry.tunnels_of(&n1()).remove(0);
        assert!(next.id > held.id && !next.has_ended());
        // What does not concern the link leaves it alone.
        list(&master, InventoryNode { user: "another".to_owned(), default_route: true, ..entry });
        sleep(Duration::from_secs(60)).await;
        assert!(!next.has_ended());
        assert_eq!(master.node.dials.lock().unwrap().len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_link_ends_with_the_group_of_its_session() {
        let master = Master::new(HOUR, 8);
        let group = Tasks::new();
        let (tunnel, _notices) = master.tunnel_in(&group).await;
        assert!(!tunnel.has_ended());
        group.cancel();
        timeout(HOUR, tunnel.ended()).await.unwrap();
    }

    /// Peers that accept connections and never say anything.
    #[derive(Clone, Default)]
    struct Silent(Arc<Mutex<Vec<DuplexStream>>>);

    impl Connect for Silent {
        type Io = DuplexStream;

        async fn connect(&self, _address: &Target) -> io::Result<(DuplexStream, Option<SocketAddr>)> {
            let (near, far) = duplex(4096);
            self.0.lock().unwrap().push(far);
            Ok((near, None))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn few_handshakes_are_in_progress_and_those_that_wait_lose_no_time() {
        const NODES: usize = 100;
        let master = Master::new(HOUR, 8);
        let entries: String = (0..NODES).map(|i| format!("- {{name: s{i}, dial: \"s{i}:22\"}}\n")).collect();
        let text = format!("nodes:\n{entries}");
        let inventory = Inventory::parse(&text, "inventory", std::path::Path::new("/")).unwrap();
        master.nodes.send_replace(Arc::new(inventory));
        let silent = Silent::default();
        master.tasks.spawn(links_by(&master, silent.clone()).run());
        // The connections, by their number, on which the master has sent something.
        let mut begun = HashSet::new();
        let mut look = || {
            let mut links = silent.0.lock().unwrap();
            for (number, link) in links.iter_mut().enumerate() {
                let mut bytes = [0; 64];
                if matches!(link.read(&mut bytes).now_or_never(), Some(Ok(1..))) {
                    begun.insert(number);
                }
            }
            (links.len(), begun.clone())
        };
        sleep(master.config.backoff_min + Duration::from_secs(1)).await;
        let (connections, first) = look();
        assert_eq!((connections, first.len()), (NODES, MAX_HANDSHAKES));
        sleep(master.config.handshake_timeout).await;
        let (_, later) = look();
        assert!((0..NODES).all(|number| later.contains(&number)), "{later:?}");
        // The last ones have not failed yet, although they have waited for as long as a handshake may take.
        let failed = usize::try_from(master.metrics.tunnel_dials_failed.get()).unwrap();
        assert_eq!(failed, MAX_HANDSHAKES);
    }

    #[tokio::test(start_paused = true)]
    async fn a_successor_is_due_by_the_timer_and_by_the_clock() {
        let life = Duration::from_secs(600);
        // The clock stands still, as one that was set back does for a while.
        let stands = Clock::System;
        for clock in [stands, Clock::new_virtual()] {
            let began = Instant::now();
            successor_due(clock, clock.now() + life).await;
            let after = began.elapsed();
            let second = Duration::from_secs(1);
            assert!(life * 2 / 5 - second <= after && after <= life * 3 / 5 + second, "{clock:?}: {after:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_news_when_it_changes_and_now_and_then() {
        let failure = LastFailure::default();
        assert_eq!(
            ["a", "a", "b", "b", "a"].map(|text| failure.is_news(text)),
            [true, false, true, false, true]
        );
        tokio::time::advance(REMINDER - Duration::from_secs(1)).await;
        assert!(!failure.is_news("a"));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(failure.is_news("a") && !failure.is_news("a"));
        failure.clear();
        assert!(failure.is_news("a"));
    }
}
