//! The composition root: everything is read and every socket bound first, then everything serves.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use proto_net::{
    admin::Endpoints,
    clock::Clock,
    exposition::Exposition,
    handshake::HandshakePermits,
    listeners::{Listeners, Pausable, Stage},
    log_throttle::LogThrottle,
    systemd,
    tasks::Tasks,
    telemetry::LinesLost,
};
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    call_home::CallHome,
    config::Config,
    dialer::Dialer,
    identity::{
        current::CurrentIdentity,
        host::NodeIdentity,
        renewal::{self, Installer},
        trust::Trust,
    },
    links,
    local_endpoint::{
        front_ends::FrontEnds,
        listener::{self, LocalEndpoint},
    },
    metrics::Metrics,
    policy::{Scope, ScopeConfig},
    readiness::Readiness,
    revocation::Revocations,
    session::{
        bounds::Bounds, masters::ConnectedMasters, serve::SessionServer, services::SessionServices,
        streams::StreamServer,
    },
    shutdown::Shutdown,
};

/// The number of log lines about handshakes that are refused in ten seconds.
const LOG_BURST: u32 = 100;
/// The channels of one session that this node may close before its peer does. Each keeps some 3.5 KB until the session
/// ends. Clients that close their channels cause next to none.
const MAX_CLOSED_FIRST: usize = 16_384;
/// The least time for sessions to say goodbye.
const MIN_GOODBYE: Duration = Duration::from_secs(2);
/// How long what has no streams may take to end by itself.
const LAST_GRACE: Duration = Duration::from_secs(2);
/// How often it is checked whether all streams have ended.
const STREAM_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// Runs the agent until SIGTERM or SIGINT, then drains it.
pub async fn run(config: Config, log_lines_lost: LinesLost) -> anyhow::Result<()> {
    let identity = NodeIdentity::load_or_create(&config.state_dir)?;
    let revocations = Revocations::load(&config.state_dir, identity.user_cas())?;
    let mut listeners = Listeners::new();
    let sockets = Sockets::bind(&config, &mut listeners)?;
    let metrics = Arc::new(Metrics { log_lines_lost, ..Metrics::default() });
    let (agent, installer) = Agent::new(config, identity, revocations, metrics);
    let groups = Groups::new();
    agent.serve(sockets, installer, &groups);
    until_terminated().await?;
    listeners.close_all_handles();
    agent.stop(&groups).await;
    Ok(())
}

/// Every socket that the configuration names, bound.
struct Sockets {
    links: Option<Pausable<TcpListener>>,
    admin: Pausable<TcpListener>,
    local_tcp: Option<Pausable<TcpListener>>,
    local_unix: Option<Pausable<UnixListener>>,
}

impl Sockets {
    fn bind(config: &Config, listeners: &mut Listeners) -> anyhow::Result<Self> {
        let links = match config.listen {
            Some(address) => Some(listeners.tcp(address, Stage::Links).map_err(|e| bind_error(address, e))?),
            None => None,
        };
        let mut listen = |address: SocketAddr| {
            let listener = listeners.tcp(address, Stage::Callers);
            listener.with_context(|| format!("can't listen on {address}"))
        };
        let admin = listen(config.admin.listen)?;
        let local = config.front_end.as_ref();
        let local_tcp = local.and_then(|local| local.tcp).map(listen).transpose()?;
        let local_unix = match local.and_then(|local| local.unix.as_ref()) {
            Some(at) => {
                let listener = listeners.unix(&at.path, (at.mode, None, None), Stage::Callers);
                Some(listener.with_context(|| format!("can't listen on {}", at.path.display()))?)
            }
            None => None,
        };
        Ok(Self { links, admin, local_tcp, local_unix })
    }
}

fn bind_error(address: SocketAddr, error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::AddrInUse {
        return anyhow::anyhow!(
            "can't listen on {address}: the port is taken, probably by this host's sshd. Ways out: let this node \
             call home (`call_home: [MASTER:2222]` and no `listen:`), give it another port (`listen:` here, `dial:` \
             in the master's inventory), or use that sshd as the node (`master-agent sshd-config`)"
        );
    }
    anyhow::anyhow!("can't listen on {address}: {error}")
}

/// The groups of tasks, in the order in which a shutdown ends them.
struct Groups {
    all: Tasks,
    /// Accept connections.
    listeners: Tasks,
    /// Sessions, callers of the local endpoint, and the loops that call masters home.
    sessions: Tasks,
    /// What sessions hand over, such as renewed certificates.
    background: Tasks,
    /// Health, metrics and the watchdog, which answer until the end.
    health: Tasks,
}

impl Groups {
    fn new() -> Self {
        let all = Tasks::new();
        let [listeners, sessions, background, health] = std::array::from_fn(|_| all.child());
        Self { all, listeners, sessions, background, health }
    }
}

/// The parts of the agent that serve.
struct Agent {
    config: Config,
    identity: CurrentIdentity,
    dialer: Arc<Dialer>,
    services: Arc<SessionServices>,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
    /// Cancelled once no session can hand over anything more.
    sessions_ended: CancellationToken,
}

impl Agent {
    fn new(
        config: Config,
        identity: NodeIdentity,
        revocations: Revocations,
        metrics: Arc<Metrics>,
    ) -> (Self, Installer) {
        let shutdown = Shutdown::default();
        let scope_config = ScopeConfig {
            node: config.node.clone(),
            addresses: config.addresses.clone(),
            policy: config.policy.clone(),
        };
        let dialer = Arc::new(Dialer::new(Scope::default(), metrics.clone()));
        let apply = {
            let (dialer, metrics) = (dialer.clone(), metrics.clone());
            move |identity: &NodeIdentity| {
                metrics.set_certificate_expiry(identity.not_after());
                let scope = scope_config.scope(identity);
                scope.log();
                dialer.replace_scope(scope);
            }
        };
        apply(&identity);
        let revocations = Arc::new(revocations);
        let trust = Trust::new(identity.user_cas().to_vec(), revocations.clone(), config.users.clone());
        let identity = CurrentIdentity::new(identity);
        let (renewals, installer) = renewal::queue(identity.clone(), metrics.clone(), apply);
        let streams = StreamServer {
            dialer: dialer.clone(),
            metrics: metrics.clone(),
            dial_timeout: config.limits.dial_timeout,
            half_closed_timeout: config.half_closed_timeout,
            shutdown: shutdown.clone(),
        };
        let front_ends =
            config.front_end.as_ref().map(|local| FrontEnds::new(local, shutdown.draining.clone()));
        let services = SessionServices {
            identity: identity.clone(),
            trust,
            renewals,
            revocations,
            streams: Arc::new(streams),
            front_ends: front_ends.map(Arc::new),
            limits: config.limits.clone(),
            bounds_of_masters: Bounds::of_masters(&config.limits),
            bounds_of_people: Bounds::of_people(&config.limits),
            connected_masters: ConnectedMasters::default(),
            multiplexers: Arc::default(),
            max_closed_first: MAX_CLOSED_FIRST,
            log_throttle: LogThrottle::with_burst(LOG_BURST),
            shutdown_grace: config.shutdown_grace,
            metrics: metrics.clone(),
            clock: Clock::System,
            shutdown: shutdown.clone(),
        };
        let services = Arc::new(services);
        let sessions_ended = CancellationToken::new();
        (Self { config, identity, dialer, services, metrics, shutdown, sessions_ended }, installer)
    }

    /// Starts everything that serves.
    fn serve(&self, sockets: Sockets, installer: Installer, groups: &Groups) {
        let Groups { listeners, sessions, background, health, all: _ } = groups;
        let limits = &self.config.limits;
        let server = SessionServer::new(self.services.clone(), sessions.clone());
        if let Some(listener) = sockets.links {
            let handshakes = HandshakePermits::new(limits.max_handshakes);
            listeners.spawn(links::accept(server.clone(), handshakes, sessions.clone(), listener));
        }
        if let (Some(front_ends), Some(config)) = (&self.services.front_ends, &self.config.front_end) {
            let local = Arc::new(LocalEndpoint {
                front_ends: front_ends.clone(),
                callers: listener::callers(config),
                dials: self.shutdown.dials.clone(),
                metrics: self.metrics.clone(),
                open_timeout: limits.dial_timeout,
                half_closed_timeout: self.config.half_closed_timeout,
                tasks: sessions.clone(),
                turned_away: LogThrottle::default(),
            });
            if let Some(listener) = sockets.local_tcp {
                listeners.spawn(local.clone().accept_tcp(listener));
            }
            if let Some(listener) = sockets.local_unix {
                listeners.spawn(local.accept_unix(listener));
            }
        }
        let call_home = CallHome {
            server,
            identity: self.identity.clone(),
            dialer: self.dialer.clone(),
            https: self.config.call_home_https.clone(),
            connect_timeout: limits.dial_timeout,
            clock: self.services.clock,
            draining: self.shutdown.draining.clone(),
            tasks: sessions.clone(),
        };
        for master in &self.config.call_home {
            sessions.spawn(call_home.clone().run(master.clone()));
        }
        background.spawn(installer.run(self.sessions_ended.clone()));
        let readiness = Readiness {
            listens: self.config.listen.is_some(),
            draining: self.shutdown.draining.clone(),
            metrics: self.metrics.clone(),
        };
        let metrics = Exposition::new(self.metrics.register());
        let endpoints = Endpoints { metrics, admin: Arc::new(readiness) };
        health.spawn(endpoints.serve_tcp(sockets.admin, health.clone()));
        health.spawn(systemd::watchdog(Vec::new()));
    }

    /// Stops accepting, tells the masters, lets streams end by themselves, ends the sessions, and joins every task.
    async fn stop(&self, groups: &Groups) {
        systemd::stopping();
        tracing::info!(streams = self.streams(), "stopping");
        groups.listeners.cancel();
        groups.listeners.drain(LAST_GRACE).await;
        self.shutdown.draining.cancel();
        let deadline = Instant::now() + self.config.shutdown_grace;
        while self.streams() > 0 && Instant::now() < deadline {
            tokio::time::sleep(STREAM_CHECK_INTERVAL).await;
        }
        let cut = self.streams();
        self.shutdown.stopping.cancel();
        let grace = deadline.saturating_duration_since(Instant::now()).max(MIN_GOODBYE);
        groups.sessions.drain(grace).await;
        self.sessions_ended.cancel();
        groups.background.drain(LAST_GRACE).await;
        groups.health.cancel();
        groups.health.drain(LAST_GRACE).await;
        groups.all.drain(LAST_GRACE).await;
        tracing::info!(cut, "stopped");
    }

    /// The streams that are open or about to be.
    fn streams(&self) -> i64 {
        let dials = i64::try_from(self.shutdown.dials.len()).unwrap_or(i64::MAX);
        self.metrics.streams.get() + self.metrics.front_end_streams.get() + dials
    }
}

/// Tells systemd that the agent is ready, and waits for SIGTERM or SIGINT.
async fn until_terminated() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    systemd::ready();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "node-agent runs");
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => tracing::info!("ignored SIGHUP: a restart reads the configuration again"),
        }
    }
}
