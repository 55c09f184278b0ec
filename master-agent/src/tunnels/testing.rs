//! In-memory nodes for unit tests: the node's side of SSH sessions over streams that never leave the process.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use proto::{
    NodeName, Target,
    mux::{
        Version,
        frame::{self, Frame, Hello},
        ids::{Numbering, Opener},
    },
};
use proto_net::{
    clock::Clock,
    gate::Gate,
    link::Link,
    mux::{self, Events, Feeder, Greeting, Mux, Notice, Settings},
    ssh, stalls,
    tasks::Tasks,
};
use russh::{
    Channel, ChannelId, ChannelOpenFailure, MethodKind, MethodSet,
    keys::{Certificate, PrivateKey},
    server::{self, Auth, ChannelOpenHandle, Msg, PublicKeyOffer, VerifiedPublicKey},
};
use tokio::{
    io::{DuplexStream, duplex},
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    config::TunnelsConfig,
    counters::TunnelMetrics,
    dial_links::Connect,
    login::MasterLogin,
    refusals::Refusals,
    registry::Registry,
    renewal::Renewal,
    revocations::RevocationList,
    session::{
        error::TunnelError,
        handshake::{Credentials, SshClient},
        identity::HostIdentity,
    },
    supervision::Supervisor,
    trust::Trust,
    tunnel::{Direction, Notices, Tunnel},
};
use crate::{
    config::Config,
    identity::{
        Authorities, LOGIN, fingerprint,
        sqlite::SqliteStore,
        tests::{TempDir, new_key},
    },
    routing::inventory::{Inventory, InventoryNode},
};

/// The number of bytes that a link buffers in each direction.
const PIPE: usize = 256 * 1024;

/// The node's side of one tunnel.
pub(super) struct NodeSide {
    pub(super) mux: Mux,
    pub(super) notices: mpsc::Receiver<Notice>,
    pub(super) connected: Instant,
}

/// A node-agent that accepts every login and every stream.
#[derive(Clone)]
pub(super) struct MemoryNode {
    key: PrivateKey,
    tasks: Tasks,
    sides: mpsc::UnboundedSender<NodeSide>,
    /// The times of all dials.
    pub(super) dials: Arc<Mutex<Vec<Instant>>>,
    /// The number of further dials that fail.
    pub(super) failures: Arc<Mutex<usize>>,
    /// Takes the requests to open a channel, if the node is not to answer them.
    pub(super) unanswered: Arc<Mutex<Option<mpsc::UnboundedSender<ChannelOpenHandle>>>>,
    /// The version of its multiplexer.
    pub(super) version: Arc<Mutex<Version>>,
    /// The hosts to which it does not forward, if it is a plain sshd.
    pub(super) sshd_forbids: Arc<Mutex<Option<Vec<String>>>>,
}

impl MemoryNode {
    fn new(key: PrivateKey, tasks: Tasks) -> (Self, mpsc::UnboundedReceiver<NodeSide>) {
        let (sides, tunnels) = mpsc::unbounded_channel();
        let node = Self {
            key,
            tasks,
            sides,
            dials: Arc::default(),
            failures: Arc::default(),
            unanswered: Arc::default(),
            version: Arc::new(Mutex::new(Version::V2)),
            sshd_forbids: Arc::default(),
        };
        (node, tunnels)
    }

    /// Returns the master's end of a new link.
    pub(super) fn link(&self) -> DuplexStream {
        let (near, far) = duplex(PIPE);
        let config = server::Config {
            methods: MethodSet::from(&[MethodKind::PublicKey][..]),
            auth_rejection_time: Duration::ZERO,
            keys: vec![self.key.clone()],
            window_size: ssh::TUNNEL_WINDOW,
            maximum_packet_size: ssh::MAX_PACKET,
            preferred: ssh::preferred(),
            ..server::Config::default()
        };
        let node = self.clone();
        self.tasks.spawn(async move {
            let cut = CancellationToken::new();
            let _cut_on_exit = cut.clone().drop_guard();
            let (link, gate) = Link::new(far, cut, Arc::default());
            let handler = NodeHandler { node, gate, feeder: None, greeting: None };
            let session = server::run_stream(Arc::new(config), link, handler).await?;
            session.await
        });
        near
    }
}

impl Connect for MemoryNode {
    type Io = DuplexStream;

    async fn connect(&self, _address: &Target) -> io::Result<(DuplexStream, Option<SocketAddr>)> {
        self.dials.lock().unwrap().push(Instant::now());
        let mut failures = self.failures.lock().unwrap();
        if *failures > 0 {
            *failures -= 1;
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok((self.link(), None))
    }
}

struct NodeHandler {
    node: MemoryNode,
    gate: Gate,
    feeder: Option<Feeder>,
    /// The channel of a multiplexer on which the master's HELLO has not come yet.
    greeting: Option<(ChannelId, Greeting)>,
}

impl NodeHandler {
    fn start_mux(
        &mut self,
        numbering: Numbering,
        peer: Option<Hello>,
        channel: ChannelId,
        handle: server::Handle,
    ) {
        let out = move |frame| {
            let handle = handle.clone();
            Box::pin(async move { handle.data(channel, frame).await.is_ok() }) as _
        };
        let stalls = stalls::ByDirection::default();
        let settings = Settings { numbering, max_opened: 64, max_accepted: 64, stalls, peer };
        let tasks = &self.node.tasks;
        let (mux, feeder, events) = Mux::new(settings, self.gate.clone(), Box::new(out), tasks);
        let Events { mut incoming, notices } = events;
        tasks.spawn(async move {
            let mut open = Vec::new();
            while let Some(stream) = incoming.recv().await {
                open.extend(stream.accept().await);
            }
        });
        self.feeder = Some(feeder);
        let _ = self.node.sides.send(NodeSide { mux, notices, connected: Instant::now() });
    }
}

impl server::Handler for NodeHandler {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, _: &str, _: PublicKeyOffer<'_>) -> Result<Auth, russh::Error> {
        Ok(Auth::Accept)
    }

    async fn auth_publickey(&mut self, _: &str, _: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        Ok(Auth::Accept)
    }

    async fn auth_openssh_certificate(&mut self, _: &str, _: &Certificate) -> Result<Auth, russh::Error> {
        Ok(Auth::Accept)
    }

    async fn channel_open_session(
        &mut self,
        _: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut server::Session,
    ) -> Result<(), russh::Error> {
        let unanswered = self.node.unanswered.lock().unwrap().clone();
        match unanswered {
            Some(unanswered) => unanswered.send(reply).unwrap_or_default(),
            None => reply.accept().await,
        }
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        _: Channel<Msg>,
        host: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut server::Session,
    ) -> Result<(), russh::Error> {
        let forbids = self.node.sshd_forbids.lock().unwrap().clone();
        if forbids.is_some_and(|hosts| hosts.iter().any(|forbidden| forbidden == host)) {
            reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
        } else {
            reply.accept().await;
        }
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        let version = *self.node.version.lock().unwrap();
        if name != version.subsystem() || self.node.sshd_forbids.lock().unwrap().is_some() {
            return session.channel_failure(channel);
        }
        session.channel_success(channel)?;
        match version {
            Version::V1 => {
                self.start_mux(Numbering::All { opener: Opener::Peer }, None, channel, session.handle());
            }
            Version::V2 => self.greeting = Some((channel, Greeting::default())),
        }
        Ok(())
    }

    async fn data(
        &mut self,
        _: ChannelId,
        mut data: &[u8],
        session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        let wrong = |_| russh::Error::Inconsistent;
        if let Some((channel, greeting)) = &mut self.greeting {
            let channel = *channel;
            let Some(hello) = greeting.take(&mut data).map_err(wrong)? else { return Ok(()) };
            self.greeting = None;
            let said = Frame::Hello(mux::hello(0, hello.session));
            session.data(channel, frame::encode(Version::V2, &said))?;
            let numbering = Numbering::Halves { is_client: false };
            self.start_mux(numbering, Some(hello), channel, session.handle());
        }
        self.feeder.as_mut().unwrap().feed(data).map_err(wrong)
    }
}

/// A master that knows one node, `n1`, by its pinned key.
pub(super) struct Master {
    pub(super) config: TunnelsConfig,
    pub(super) node: MemoryNode,
    /// Receives the node's side of each tunnel.
    pub(super) tunnels: mpsc::UnboundedReceiver<NodeSide>,
    pub(super) nodes: watch::Sender<Arc<Inventory>>,
    pub(super) clock: Clock,
    pub(super) registry: Arc<Registry>,
    pub(super) metrics: TunnelMetrics,
    pub(super) refusals: Refusals,
    pub(super) trust: Arc<Trust>,
    pub(super) authorities: Arc<Authorities>,
    pub(super) store: Arc<SqliteStore>,
    pub(super) login: Arc<MasterLogin>,
    pub(super) client: Arc<SshClient>,
    pub(super) supervisor: Arc<Supervisor>,
    pub(super) tasks: Tasks,
    _dir: TempDir,
}

impl Master {
    /// `user_ttl` is the lifetime of the master's certificate, and `max_streams` the limit of streams of the node.
    pub(super) fn new(user_ttl: Duration, max_streams: usize) -> Self {
        let (dir, key, tasks) = (TempDir::new(), new_key(), Tasks::new());
        let pin = fingerprint(key.public_key());
        let text = format!("nodes: [{{name: n1, dial: \"n1:22\", host_keys: {{pins: [\"{pin}\"]}}}}]");
        let inventory = Inventory::parse(&text, "inventory", Path::new("/")).unwrap();
        let nodes = watch::Sender::new(Arc::new(inventory));
        let config = Config::parse("", "config", Path::new("/")).unwrap().tunnels;
        let authorities = Arc::new(Authorities::load_or_create(&dir.0).unwrap());
        let store = Arc::new(SqliteStore::open(&dir.0).unwrap());
        let registry = Arc::new(Registry::new(max_streams));
        let metrics = TunnelMetrics::default();
        let refusals = Refusals::new(registry.clone(), metrics.refused.clone());
        let trust = Arc::new(Trust::new(nodes.subscribe(), store.clone(), authorities.clone()));
        let clock = Clock::new_virtual();
        let login = Arc::new(MasterLogin::new(authorities.clone(), user_ttl, clock).unwrap());
        let supervisor = Arc::new(Supervisor {
            config: config.clone(),
            nodes: nodes.subscribe(),
            registry: registry.clone(),
            trust: trust.clone(),
            refusals: refusals.clone(),
            renewal: Renewal {
                nodes: nodes.subscribe(),
                trust: trust.clone(),
                authorities: authorities.clone(),
                host_ttl: Duration::from_secs(3600),
                renewed: metrics.certificates_renewed.clone(),
                clock,
            },
            revocations: Arc::new(RevocationList::new(store.clone(), authorities.clone(), login.clone())),
            callers: None,
            metrics: metrics.clone(),
            tasks: tasks.clone(),
        });
        let (node, tunnels) = MemoryNode::new(key, tasks.clone());
        let client = Arc::new(SshClient::new(config.clone(), metrics.stalls.clone()));
        Self {
            config,
            node,
            tunnels,
            nodes,
            clock,
            registry,
            metrics,
            refusals,
            trust,
            authorities,
            store,
            login,
            client,
            supervisor,
            tasks,
            _dir: dir,
        }
    }

    /// Returns the node's entry in the inventory.
    pub(super) fn entry(&self) -> InventoryNode {
        self.nodes.borrow().node(&n1()).unwrap().clone()
    }

    /// Establishes a tunnel, and also returns the node's side of it.
    pub(super) async fn tunnel(&mut self) -> (Tunnel, Notices, NodeSide) {
        let (tunnel, notices) = self.tunnel_in(&self.tasks).await;
        (tunnel, notices.unwrap(), self.tunnels.recv().await.unwrap())
    }

    /// Establishes a tunnel whose session belongs to `tasks`. Without notices, the node is a plain sshd.
    pub(super) async fn tunnel_in(&self, tasks: &Tasks) -> (Tunnel, Option<Notices>) {
        self.tunnel_beside(None, tasks).await.unwrap().unwrap()
    }

    /// Establishes a tunnel, or a further connection of `present`.
    pub(super) async fn tunnel_beside(
        &self,
        present: Option<&Tunnel>,
        tasks: &Tasks,
    ) -> Result<Option<(Tunnel, Option<Notices>)>, TunnelError> {
        let (entry, user) = (self.entry(), self.login.current());
        let address = entry.dial.clone().unwrap();
        let credentials = Credentials {
            verify: self.trust.dialled(&entry, &address),
            login: LOGIN,
            user: &user,
            permit: None,
        };
        let session = self.client.authenticate(self.node.link(), credentials, tasks).await.unwrap();
        let HostIdentity::Verified(host) = session.identity.clone() else { panic!("the key is pinned") };
        let to = (Direction::Dialled, None);
        Tunnel::establish(session, host, to, &self.config, Some(64), present).await
    }
}

pub(super) fn n1() -> NodeName {
    "n1".parse().unwrap()
}
