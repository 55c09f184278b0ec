//! What all parts of a running master-agent share.

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::{Arc, OnceLock, PoisonError, RwLock},
    time::{Duration, Instant, SystemTime},
};

use hyper::{Method, Request, body::Incoming};
use percent_encoding::percent_decode_str;
use proto::{
    Host, NodeName, Target,
    io::{
        admin,
        dialer::{Dialer as _, Origin},
        handshake::Places,
        tasks::Tasks,
    },
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    dialer::TunnelDialer,
    front_end::server::FrontEnd,
    identity::{Authorities, UserIdentity, revocation::Revocations},
    inventory::Inventory,
    kubernetes::Watches,
    metrics::{Metrics, Reason},
    page::{self, Page},
    registry::{Absent, Registry},
    routing::InventoryRoutes,
    store::Store,
};

/// Connections that have not authenticated, where no port for them alone is configured.
const HANDSHAKES: usize = 256;

/// Configuration, identity, registry and counters, and the owner of every session.
pub struct Agent {
    pub config: Config,
    pub metrics: Metrics,
    pub registry: Arc<Registry>,
    pub dialer: Arc<TunnelDialer>,
    /// What follows the Kubernetes API.
    pub watches: Option<Arc<Watches>>,
    pub store: Arc<dyn Store>,
    pub authorities: Authorities,
    /// Every SSH session, and what runs for it.
    pub sessions: Tasks,
    /// Set when no new tunnels are to be made.
    pub draining: CancellationToken,
    pub handshakes: Places,
    pub front_end: OnceLock<Arc<FrontEnd>>,
    pub page: Page,
    /// Certificates of masters and people that nodes are to refuse.
    pub revocations: Revocations,
    user: RwLock<Arc<UserIdentity>>,
    of_file: RwLock<Arc<Inventory>>,
    inventory: RwLock<Arc<Inventory>>,
}

impl Agent {
    pub fn new(
        config: Config,
        inventory: Inventory,
        store: Arc<dyn Store>,
        authorities: Authorities,
    ) -> anyhow::Result<Self> {
        let registry = Arc::new(Registry::new(config.tunnels.max_streams_per_node));
        let domain = config.kubernetes.as_ref().map(|k| k.cluster_domain.clone()).unwrap_or_default();
        let dialer = Arc::new(TunnelDialer::new(registry.clone(), config.tunnels.dial_timeout, domain));
        let user = authorities.issue_user(SystemTime::now(), config.certificates.user_ttl)?;
        let agent = Self {
            metrics: Metrics::new(registry.clone()),
            page: Page::new(registry.clone()),
            watches: config
                .kubernetes
                .as_ref()
                .map(|k| Watches::new(dialer.clone(), k.stale_after, config.checks_bound_objects())),
            dialer,
            registry,
            store,
            authorities,
            sessions: Tasks::new(),
            draining: CancellationToken::new(),
            handshakes: Places::new(config.call_home.as_ref().map_or(HANDSHAKES, |c| c.max_handshakes)),
            front_end: OnceLock::new(),
            revocations: Revocations::new(None),
            user: RwLock::new(Arc::new(user)),
            of_file: RwLock::default(),
            inventory: RwLock::default(),
            config,
        };
        agent.set_inventory(inventory);
        Ok(agent)
    }

    /// The master's present SSH user key and certificate.
    pub fn user(&self) -> Arc<UserIdentity> {
        self.user.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Issues a new user certificate in time, for ever.
    pub async fn renew_user(self: Arc<Self>) {
        let ttl = self.config.certificates.user_ttl;
        loop {
            tokio::time::sleep(ttl / 3).await;
            self.issue_user();
        }
    }

    /// Issues a new user certificate, for links to come.
    pub fn issue_user(&self) {
        match self.authorities.issue_user(SystemTime::now(), self.config.certificates.user_ttl) {
            Ok(user) => *self.user.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(user),
            Err(error) => {
                tracing::error!(%error, "can't issue a new user certificate; the present one stays")
            }
        }
    }

    /// The nodes of the inventory file, then those of the cluster that it does not have.
    pub fn inventory(&self) -> Arc<Inventory> {
        self.inventory.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes a new inventory file: routes and the set of expected nodes.
    pub fn set_inventory(&self, inventory: Inventory) {
        self.dialer.set_inventory(InventoryRoutes::new(&inventory));
        *self.of_file.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(inventory);
        self.expect_nodes();
    }

    /// Whether the inventory file had nodes when it was read last.
    pub fn file_has_nodes(&self) -> bool {
        !self.of_file.read().unwrap_or_else(PoisonError::into_inner).nodes.is_empty()
    }

    /// Makes the nodes of the inventory file and of the cluster known. Tunnels of nodes that are gone are closed.
    pub fn expect_nodes(&self) {
        let of_file = self.of_file.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut inventory = Inventory::clone(&of_file);
        if let Some(template) = self.config.kubernetes.as_ref().and_then(|k| k.nodes.as_ref()) {
            let listed: HashSet<&NodeName> = of_file.nodes.iter().map(|node| &node.name).collect();
            let watched = self.dialer.with_routes(|routes| {
                let nodes = routes.cluster.nodes().filter(|node| !listed.contains(&node.name));
                nodes.map(|node| template.node(node)).collect::<Vec<_>>()
            });
            inventory.nodes.extend(watched);
        }
        let expected = inventory.nodes.iter().map(|node| {
            let absent = if node.dial.is_some() { Absent::New } else { Absent::WaitingForCallHome };
            (node.name.clone(), (node.connections, absent))
        });
        let gone = self.registry.expect(&expected.collect());
        *self.inventory.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(inventory);
        for tunnel in gone {
            self.sessions.spawn(async move { tunnel.close("the node is no longer in the inventory").await });
        }
    }

    /// A node's own addresses, as the inventory or the cluster has them; else that which is dialled.
    fn addresses(&self, node: &NodeName) -> Vec<IpAddr> {
        let inventory = self.inventory();
        let Some(node) = inventory.nodes.iter().find(|n| &n.name == node) else { return Vec::new() };
        let dialled = node.dial.as_ref().and_then(|dial| match dial.host {
            Host::Addr(address) => Some(address),
            Host::Name(_) => None,
        });
        if node.addresses.is_empty() { dialled.into_iter().collect() } else { node.addresses.clone() }
    }

    pub fn count_refused(&self, reason: &'static str) {
        self.metrics.refused.get_or_create(&Reason { reason }).inc();
    }

    /// Finds the ways to a target, then takes them: the time of each hop, and the verdict of the node's policy,
    /// are those of a real dial, whose connection is closed at once.
    pub async fn explain(&self, target: &str, origin: Origin) -> Result<Explanation, String> {
        let target: Target = target.parse().map_err(|e| format!("{target:?} is no target: {e}"))?;
        tracing::info!(%target, %origin, "somebody has a target explained, and dialled");
        let mut explanation = Explanation { target: target.to_string(), ..Explanation::default() };
        let began = Instant::now();
        let route = match self.dialer.with_routes(|routes| routes.find(&target)) {
            Ok(route) => route,
            Err(e) => {
                explanation.verdict = e.to_string();
                return Ok(explanation);
            }
        };
        explanation.route_microseconds = micros(began.elapsed());
        explanation.reason = route.reason.clone();
        let candidates = match self.dialer.candidates(&route) {
            Ok(candidates) => candidates,
            Err(e) => {
                explanation.verdict = e.to_string();
                return Ok(explanation);
            }
        };
        let status = self.registry.status();
        explanation.candidates = candidates
            .into_iter()
            .map(|candidate| Way {
                state: status.iter().find(|s| s.name == candidate.node).map(|s| s.state.clone()),
                round_trip_microseconds: self.registry.round_trip(&candidate.node).map(micros),
                addresses: self.addresses(&candidate.node),
                node: candidate.node,
                target: candidate.target.to_string(),
            })
            .collect();
        let began = Instant::now();
        match self.dialer.dial(&target, &origin).await {
            Ok(connection) => {
                explanation.dial_microseconds = Some(micros(began.elapsed()));
                explanation.node = connection.node;
                "the node allows it and the target answers".clone_into(&mut explanation.verdict);
            }
            Err(e) => explanation.verdict = format!("{} is at fault: {e}", e.fault()),
        }
        Ok(explanation)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// What `explain` answers.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Explanation {
    pub target: String,
    /// Why the candidates are such.
    pub reason: String,
    /// In the order in which they are tried.
    pub candidates: Vec<Way>,
    /// The one that reached the target.
    pub node: Option<NodeName>,
    pub verdict: String,
    /// To find the route.
    pub route_microseconds: u64,
    /// From the request for a stream to the target's answer, the tunnel's round trip included.
    pub dial_microseconds: Option<u64>,
}

/// One candidate.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Way {
    pub node: NodeName,
    /// The node's own.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// What that node is asked for.
    pub target: String,
    pub state: Option<String>,
    /// Of its tunnel.
    pub round_trip_microseconds: Option<u64>,
}

impl admin::Admin for Agent {
    fn ready(&self) -> Result<Vec<String>, String> {
        if self.draining.is_cancelled() {
            return Err("stopping".to_owned());
        }
        let legacy = self.config.kubernetes.as_ref().is_some_and(|config| config.legacy_names);
        let name = |error| if legacy { format!("SSH Tunnel Check: {error}") } else { error };
        let mut amiss =
            self.watches.as_ref().map_or(Ok(Vec::new()), |watches| watches.ready()).map_err(name)?;
        if let Some((0, servers)) = self.front_end.get().map(|front_end| front_end.upstreams()) {
            amiss.push(format!("front end: none of {servers} API servers works"));
        }
        match self.registry.count() {
            (0, known) if known > 0 => Err(format!("none of {known} nodes is connected")),
            _ => Ok(amiss),
        }
    }

    fn answer(self: Arc<Self>, request: Request<Incoming>, door: admin::Door) -> admin::AnswerFuture {
        Box::pin(async move {
            match door {
                admin::Door::Tcp => page::serve(&self, request).await,
                admin::Door::Unix => self.told(request).await.map(admin::respond),
            }
        })
    }
}

impl Agent {
    /// Answers the commands of this host.
    async fn told(&self, request: Request<Incoming>) -> Option<admin::Answer> {
        let (head, body) = request.into_parts();
        let (path, query) = (head.uri.path(), head.uri.query().unwrap_or_default());
        match (&head.method, path) {
            (&Method::GET, _) => self.asked(path, query).await,
            (&Method::POST, "/page/token") => Some(page::token(self)),
            (&Method::PUT, "/comparison") => Some(self.page.take_comparison(body).await),
            _ => None,
        }
    }

    async fn asked(&self, path: &str, query: &str) -> Option<admin::Answer> {
        let json = |value: Result<String, serde_json::Error>| match value {
            Ok(text) => (hyper::StatusCode::OK, "application/json", text),
            Err(e) => (hyper::StatusCode::INTERNAL_SERVER_ERROR, "text/plain", e.to_string()),
        };
        match path {
            "/watches" => Some(json(serde_json::to_string(
                &self.watches.as_ref().map(|watches| watches.status()).unwrap_or_default(),
            ))),
            "/nodes" => Some(json(serde_json::to_string(&self.registry.status()))),
            "/explain" => {
                let target = percent_decode_str(query).decode_utf8_lossy();
                Some(match self.explain(&target, Origin("explain".to_owned())).await {
                    Ok(explanation) => json(serde_json::to_string(&explanation)),
                    Err(error) => (hyper::StatusCode::BAD_REQUEST, "text/plain", error),
                })
            }
            path => {
                let name = path.strip_prefix("/nodes/")?.parse().ok()?;
                Some(json(serde_json::to_string(&self.registry.detail(&name)?)))
            }
        }
    }
}
