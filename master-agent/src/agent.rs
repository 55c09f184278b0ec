//! What all parts of a running master-agent share.

use std::{
    sync::{Arc, OnceLock, PoisonError, RwLock},
    time::SystemTime,
};

use proto_net::{handshake::HandshakePermits, tasks::Tasks};
use tokio_util::sync::CancellationToken;

use crate::{
    dialer::TunnelDialer,
    identity::{
        Authorities, UserIdentity, config::CertificatesConfig, revocation::Revocations, store::Store,
    },
    kubernetes::{Watches, config::KubernetesConfig},
    metrics::{MetricsConfig, Reason},
    registry::{Absent, Registry},
    routing::{InventoryRoutes, inventory::Inventory, shared::SharedRoutes},
    tunnels::{
        callers::ServeCallers,
        config::{CallHomeConfig, TunnelsConfig},
        counters::TunnelMetrics,
    },
};

/// Connections that have not authenticated, where no port for them alone is configured.
const HANDSHAKES: usize = 256;

/// The configuration of the parts that the agent holds.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    pub tunnels: TunnelsConfig,
    pub certificates: CertificatesConfig,
    /// `None` accepts no nodes that call home on a port of their own.
    pub call_home: Option<CallHomeConfig>,
    /// `None` knows the inventory only.
    pub kubernetes: Option<KubernetesConfig>,
    /// Whether to keep which of the objects exist that tokens of service accounts can be bound to.
    pub check_bound_objects: bool,
    pub metrics: MetricsConfig,
}

/// Configuration, identity, registry and counters, and the owner of every session.
pub struct Agent {
    pub config: AgentConfig,
    pub metrics: TunnelMetrics,
    pub registry: Arc<Registry>,
    pub dialer: Arc<TunnelDialer>,
    pub routes: Arc<SharedRoutes>,
    /// What follows the Kubernetes API.
    pub watches: Option<Arc<Watches>>,
    pub store: Arc<dyn Store>,
    pub authorities: Authorities,
    /// Every SSH session, and what runs for it.
    pub sessions: Tasks,
    /// Set when no new tunnels are to be made.
    pub draining: CancellationToken,
    pub handshakes: HandshakePermits,
    /// Serves callers who come through tunnels; unset if the configuration does not ask for it.
    pub callers: OnceLock<Arc<dyn ServeCallers>>,
    /// Certificates of masters and people that nodes are to refuse.
    pub revocations: Revocations,
    user: RwLock<Arc<UserIdentity>>,
    of_file: RwLock<Arc<Inventory>>,
    inventory: RwLock<Arc<Inventory>>,
}

impl Agent {
    pub fn new(
        config: AgentConfig,
        inventory: Inventory,
        store: Arc<dyn Store>,
        authorities: Authorities,
    ) -> anyhow::Result<Self> {
        let registry = Arc::new(Registry::new(config.tunnels.max_streams_per_node));
        let domain = config.kubernetes.as_ref().map(|k| k.cluster_domain.clone()).unwrap_or_default();
        let routes = Arc::new(SharedRoutes::new(domain));
        let dialer =
            Arc::new(TunnelDialer::new(registry.clone(), routes.clone(), config.tunnels.dial_timeout));
        let user = authorities.issue_user(SystemTime::now(), config.certificates.user_ttl)?;
        let agent = Self {
            metrics: TunnelMetrics::default(),
            watches: config
                .kubernetes
                .as_ref()
                .map(|k| Watches::new(routes.clone(), k.stale_after, config.check_bound_objects)),
            dialer,
            routes,
            registry,
            store,
            authorities,
            sessions: Tasks::new(),
            draining: CancellationToken::new(),
            handshakes: HandshakePermits::new(
                config.call_home.as_ref().map_or(HANDSHAKES, |c| c.max_handshakes),
            ),
            callers: OnceLock::new(),
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
        let routes = InventoryRoutes::new(&inventory);
        self.routes.change(|all| all.inventory = routes);
        *self.of_file.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(inventory);
        self.expect_nodes();
    }

    /// Whether the inventory file had nodes when it was read last.
    pub fn file_has_nodes(&self) -> bool {
        !self.of_file.read().unwrap_or_else(PoisonError::into_inner).nodes().is_empty()
    }

    /// Makes the nodes of the inventory file and of the cluster known. Tunnels of nodes that are gone are closed.
    pub fn expect_nodes(&self) {
        let of_file = self.of_file.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut inventory = Inventory::clone(&of_file);
        if let Some(template) = self.config.kubernetes.as_ref().and_then(|k| k.nodes.as_ref()) {
            let watched = self.routes.read(|routes| {
                let nodes = routes.cluster.nodes().filter(|node| of_file.node(&node.name).is_none());
                nodes.map(|node| template.node(node)).collect::<Vec<_>>()
            });
            inventory.extend(watched);
        }
        let expected = inventory.nodes().iter().map(|node| {
            let absent = if node.dial.is_some() { Absent::New } else { Absent::WaitingForCallHome };
            (node.name.clone(), (node.connections, absent))
        });
        let gone = self.registry.expect(&expected.collect());
        *self.inventory.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(inventory);
        for tunnel in gone {
            self.sessions.spawn(async move { tunnel.close("the node is no longer in the inventory").await });
        }
    }

    pub fn count_refused(&self, reason: &'static str) {
        self.metrics.refused.get_or_create(&Reason { reason }).inc();
    }
}
