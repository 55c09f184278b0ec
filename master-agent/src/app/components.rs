//! Builds the components of the agent and connects them to each other. Nothing runs before it is started.

use std::{sync::Arc, time::Duration};

use proto_net::{clock::Clock, handshake::HandshakePermits, log_throttle::LogThrottle, tasks::Tasks};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    http::generations::Generations,
    identity::{Authorities, refresh::StoreHealth, store::Store},
    kubernetes::Watches,
    routing::{inventory::Inventory, shared::SharedRoutes},
    stream::metrics::StreamMetrics,
    tunnels::{
        call_home::{CallHome, MAX_FAREWELLS},
        callers::{CallerTunnelReceiver, CallerTunnelSender, caller_tunnels},
        counters::TunnelMetrics,
        dial_links::{DialLinks, Dialling, Tcp},
        dialer::TunnelDialer,
        drains::Drains,
        expected_nodes::ExpectedNodes,
        explain::Explainer,
        join::{Joining, MAX_DECISIONS},
        login::MasterLogin,
        pacing::Pacing,
        refusals::Refusals,
        registry::Registry,
        renewal::Renewal,
        revocations::RevocationList,
        session::handshake::SshClient,
        supervision::Supervisor,
        trust::Trust,
        tunnel::Tunnel,
    },
};

/// The maximum number of concurrent unauthenticated calls home if there is no call-home port, whose section configures
/// it.
const MAX_HANDSHAKES: usize = 256;

/// The longest time to notify all nodes.
const NOTIFY_TIMEOUT: Duration = Duration::from_secs(1);

/// The number of refused calls home and join requests that are logged one by one in ten seconds.
const LOG_BURST: u32 = 100;

/// Everything that the agent reads before it builds its components.
pub(super) struct Loaded {
    pub(super) inventory: Arc<Inventory>,
    pub(super) authorities: Arc<Authorities>,
    pub(super) store: Arc<dyn Store>,
}

/// The components that listeners, the admin endpoints and the drain use.
pub(super) struct Components {
    pub(super) streams: StreamMetrics,
    pub(super) tunnels: TunnelMetrics,
    pub(super) registry: Arc<Registry>,
    pub(super) dialer: Arc<TunnelDialer>,
    pub(super) expected: Arc<ExpectedNodes>,
    /// The watches of the cluster. It is `None` if no cluster is configured.
    pub(super) watches: Option<Arc<Watches>>,
    pub(super) store: Arc<dyn Store>,
    pub(super) store_health: Arc<StoreHealth>,
    pub(super) login: Arc<MasterLogin>,
    pub(super) revocations: Arc<RevocationList>,
    pub(super) drains: Arc<Drains>,
    pub(super) explainer: Arc<Explainer>,
    pub(super) call_home: Arc<CallHome>,
    /// The group that owns every SSH session and the tasks that make and supervise them.
    pub(super) sessions: Tasks,
    /// Cancelled when this process is to end, although it may serve on for a while.
    pub(super) leaving: CancellationToken,
    /// Cancelled when this process must not begin new tunnels.
    pub(super) draining: CancellationToken,
    /// Tell callers' HTTP connections when to end.
    pub(super) generations: Generations,
}

/// The components that run in tasks of their own.
pub(super) struct Startable {
    pub(super) dial_links: DialLinks<Tcp>,
    pub(super) supervisor: Arc<Supervisor>,
    /// The receiver of tunnels with callers. It is `None` if no callers come through tunnels.
    pub(super) caller_tunnels: Option<CallerTunnelReceiver>,
}

/// The handles that several parts of the tunnels share.
struct Shared<'a> {
    config: &'a Config,
    nodes: watch::Receiver<Arc<Inventory>>,
    registry: Arc<Registry>,
    metrics: TunnelMetrics,
    store: Arc<dyn Store>,
    authorities: Arc<Authorities>,
    login: Arc<MasterLogin>,
    trust: Arc<Trust>,
    refusals: Refusals,
    client: Arc<SshClient>,
    sessions: Tasks,
    draining: CancellationToken,
}

/// Builds all components. The group `sessions` owns every SSH session.
pub(super) fn build(
    config: &Config,
    loaded: Loaded,
    sessions: Tasks,
) -> anyhow::Result<(Components, Startable)> {
    let Loaded { inventory, authorities, store } = loaded;
    let draining = CancellationToken::new();
    let registry = Arc::new(Registry::new(config.tunnels.max_streams_per_node));
    let metrics = TunnelMetrics::default();
    let cluster = config.kubernetes.as_ref();
    let domain = cluster.map(|cluster| cluster.cluster_domain.clone()).unwrap_or_default();
    let routes = Arc::new(SharedRoutes::new(domain));
    let watched = cluster.and_then(|cluster| cluster.nodes.clone());
    let expected = ExpectedNodes::new(inventory, watched, routes.clone(), registry.clone(), sessions.clone());
    let nodes = expected.subscribe();
    let dial_timeout = config.tunnels.dial_timeout;
    let dialer = Arc::new(TunnelDialer::new(registry.clone(), routes.clone(), dial_timeout));
    let user_ttl = config.certificates.user_ttl;
    let login = Arc::new(MasterLogin::new(authorities.clone(), user_ttl, Clock::System)?);
    let shared = Shared {
        config,
        registry: registry.clone(),
        store: store.clone(),
        login: login.clone(),
        trust: Arc::new(Trust::new(nodes.clone(), store.clone(), authorities.clone())),
        refusals: Refusals::new(registry.clone(), metrics.refused.clone()),
        client: Arc::new(SshClient::new(config.tunnels.clone(), metrics.stalls.clone())),
        nodes: nodes.clone(),
        metrics: metrics.clone(),
        authorities: authorities.clone(),
        sessions: sessions.clone(),
        draining: draining.clone(),
    };
    let through_tunnels = config.front_end.as_ref().filter(|front_end| front_end.through_tunnels);
    let (callers, caller_tunnels) =
        through_tunnels.map(|front_end| caller_tunnels(front_end.limits.max_connections_per_node)).unzip();
    let revocations = Arc::new(RevocationList::new(store.clone(), authorities, login.clone()));
    let supervisor = Arc::new(shared.supervisor(revocations.clone(), callers));
    let dial_links = shared.dial_links(supervisor.clone());
    let components = Components {
        call_home: Arc::new(shared.call_home(supervisor.clone())),
        explainer: Arc::new(Explainer {
            routes: routes.clone(),
            dialer: dialer.clone(),
            registry: registry.clone(),
            nodes,
        }),
        watches: cluster
            .map(|cluster| Watches::new(routes, cluster.stale_after, config.checks_bound_objects())),
        expected: Arc::new(expected),
        streams: StreamMetrics::new(registry.clone()),
        drains: Arc::new(Drains::new(store.clone(), registry.clone())),
        tunnels: metrics,
        registry,
        dialer,
        store,
        store_health: Arc::default(),
        login,
        revocations,
        sessions,
        leaving: CancellationToken::new(),
        draining,
        generations: Generations::default(),
    };
    Ok((components, Startable { dial_links, supervisor, caller_tunnels }))
}

impl Components {
    /// Runs an action for all tunnels at once, so that a node that does not respond delays no other.
    pub(super) async fn for_all_tunnels<F>(&self, action: impl Fn(Arc<Tunnel>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let actions = self.sessions.child();
        for tunnel in self.registry.tunnels() {
            actions.spawn(action(tunnel));
        }
        actions.drain(NOTIFY_TIMEOUT).await;
    }
}

impl Shared<'_> {
    fn supervisor(
        &self,
        revocations: Arc<RevocationList>,
        callers: Option<CallerTunnelSender>,
    ) -> Supervisor {
        Supervisor {
            config: self.config.tunnels.clone(),
            nodes: self.nodes.clone(),
            registry: self.registry.clone(),
            trust: self.trust.clone(),
            refusals: self.refusals.clone(),
            renewal: Renewal {
                nodes: self.nodes.clone(),
                trust: self.trust.clone(),
                authorities: self.authorities.clone(),
                host_ttl: self.config.certificates.host_ttl,
                renewed: self.metrics.certificates_renewed.clone(),
                clock: Clock::System,
            },
            revocations,
            callers,
            metrics: self.metrics.clone(),
            tasks: self.sessions.clone(),
        }
    }

    fn dial_links(&self, supervisor: Arc<Supervisor>) -> DialLinks<Tcp> {
        let dialling = Dialling {
            connect: Tcp,
            config: self.config.tunnels.clone(),
            client: self.client.clone(),
            trust: self.trust.clone(),
            login: self.login.clone(),
            registry: self.registry.clone(),
            refusals: self.refusals.clone(),
            supervisor,
            metrics: self.metrics.clone(),
            clock: Clock::System,
            draining: self.draining.clone(),
        };
        DialLinks::new(self.nodes.clone(), dialling, self.sessions.clone())
    }

    fn call_home(&self, supervisor: Arc<Supervisor>) -> CallHome {
        let max_handshakes = self.config.call_home.as_ref().map(|call_home| call_home.max_handshakes);
        let log_throttle = Arc::new(LogThrottle::with_burst(LOG_BURST));
        CallHome {
            config: self.config.tunnels.clone(),
            client: self.client.clone(),
            trust: self.trust.clone(),
            login: self.login.clone(),
            joining: Arc::new(Joining {
                nodes: self.nodes.clone(),
                store: self.store.clone(),
                authorities: self.authorities.clone(),
                host_ttl: self.config.certificates.host_ttl,
                registry: self.registry.clone(),
                refusals: self.refusals.clone(),
                attempts: self.metrics.joins.clone(),
                decisions: Arc::new(Semaphore::new(MAX_DECISIONS)),
                log_throttle: log_throttle.clone(),
                tasks: self.sessions.clone(),
            }),
            registry: self.registry.clone(),
            refusals: self.refusals.clone(),
            supervisor,
            permits: HandshakePermits::new(max_handshakes.unwrap_or(MAX_HANDSHAKES)),
            pacing: Pacing::default(),
            farewells: Arc::new(Semaphore::new(MAX_FAREWELLS)),
            log_throttle,
            tasks: self.sessions.clone(),
            draining: self.draining.clone(),
        }
    }
}
