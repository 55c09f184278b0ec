//! The composition root: everything is read and every socket bound first, then everything serves.

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use proto_net::{
    admin::Endpoints,
    clock::Clock,
    exposition::Exposition,
    handover::{Beginning, Handover, Successor, hangup, reload::Reloads},
    handshake::HandshakePermits,
    listeners::{Listeners, Pausable, Stage},
    log_throttle::LogThrottle,
    socket_store, systemd,
    tasks::Tasks,
    telemetry::LinesLost,
};
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{Signal, SignalKind, signal},
    task::spawn_blocking,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::Admin,
    call_home::CallHome,
    config::Config,
    dialer::Dialer,
    drain::Drain,
    handover::{self, Running},
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
    revocation::Revocations,
    session::{bounds::Bounds, serve::SessionServer, services::SessionServices, streams::StreamServer},
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
/// How long streams may go on that have come while the last ones ended.
const LAST_STREAMS: Duration = Duration::from_millis(500);
/// How often a process that has been replaced looks for lists of revoked certificates that the present one has written.
const REVOCATION_INTERVAL: Duration = Duration::from_secs(1);
/// How long the command that has asked for a handover may take to read its answer.
const LAST_ANSWER: Duration = Duration::from_millis(500);
/// How long a process that has been replaced still opens streams for those that it had accepted before.
const LAST_DIALS: Duration = Duration::from_secs(2);

/// Why a process ends.
enum End {
    Signal,
    /// Another one serves in its place.
    Replaced(Box<Successor>),
}

/// Runs the agent until SIGTERM or SIGINT, or until another process has taken its place, and then drains it.
pub async fn run(config: Config, beginning: Beginning, log_lines_lost: LinesLost) -> anyhow::Result<()> {
    let Beginning { program, role, file } = beginning;
    // Signals that come from now on are not lost.
    let (mut signals, hangup) = (Signals::new()?, signal(SignalKind::hangup())?);
    // Cancelled when the process that serves, this one or the one that has replaced it, has been told to stop.
    let stopping = CancellationToken::new();
    let (predecessor, mut listeners) = role.begin().await?;
    let identity = NodeIdentity::load_or_create(&config.state_dir)?;
    let revocations = Revocations::load(&config.state_dir, identity.user_cas())?;
    let drain = Arc::new(Drain::load(&config.state_dir)?);
    let sockets = Sockets::bind(&config, &mut listeners)?;
    let unused = listeners.close_unused();
    let metrics = Arc::new(Metrics { log_lines_lost, ..Metrics::default() });
    let (reloads, mut reload_requests) = Reloads::new();
    let running = Arc::new(config.clone());
    let (agent, installer) = Agent::new(config, identity, revocations, drain, metrics);
    let groups = Groups::new();
    if let Some(predecessor) = &predecessor {
        predecessor.loaded(env!("CARGO_PKG_VERSION"), &unused).await?;
        listeners.accept(Stage::Links, true);
    }
    agent.serve(sockets, installer, reloads.clone(), &groups);
    if let Some(mut predecessor) = predecessor {
        handover::take_over(&mut predecessor, &listeners, &agent.services).await?;
        let (former, stopping) = (agent.metrics.draining.clone(), stopping.clone());
        groups.background.spawn(async move {
            predecessor.follow(|draining| former.set(draining), stopping.cancelled()).await;
        });
    }
    socket_store::keep(&listeners, &unused);
    systemd::ready();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "node-agent runs");

    let changed = hangup::follow(hangup, &file, running, &reloads);
    let running = Running { services: &agent.services, asking: groups.background.child() };
    let former = &agent.metrics.draining;
    let handover =
        Handover { program: &program, listeners: &listeners, agent: &running, former, stopping: &stopping };
    let end = tokio::select! {
        // A process that serves already is not given up.
        biased;
        successor = handover.requested(&mut reload_requests) => End::Replaced(Box::new(successor)),
        () = signals.terminated() => End::Signal,
        never = changed => match never {},
    };
    // Further requests for a reload are refused.
    drop(reload_requests);
    let began = Instant::now();
    let cut = match end {
        End::Signal => {
            systemd::stopping();
            stopping.cancel();
            // A handover that was under way had paused them.
            listeners.accept(Stage::Links, true);
            listeners.close_all_handles();
            agent.drain(&groups).await
        }
        End::Replaced(successor) => {
            let told = successor.stops_with(signals.terminated());
            let rest = agent.drain_replaced(&groups, &stopping, told);
            handover.carry_on(&successor, rest).await
        }
    };
    agent.finish(&groups, began).await;
    tracing::info!(cut, "stopped");
    Ok(())
}

/// Every socket that the configuration names, bound.
struct Sockets {
    links: Option<Pausable<TcpListener>>,
    admin: Pausable<TcpListener>,
    admin_unix: Pausable<UnixListener>,
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
        let mut listen_unix = |path: &Path, mode: u32| {
            let listener = listeners.unix(path, (mode, None, None), Stage::Callers);
            listener.with_context(|| format!("can't listen on {}", path.display()))
        };
        let admin_unix = listen_unix(&config.admin.socket, 0o600)?;
        let local_unix = local.and_then(|local| local.unix.as_ref());
        let local_unix = local_unix.map(|at| listen_unix(&at.path, at.mode)).transpose()?;
        Ok(Self { links, admin, admin_unix, local_tcp, local_unix })
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
    /// Health and metrics, which answer until the end, or until another process does.
    health: Tasks,
    /// Answers systemd, for as long as this is the service's main process.
    watchdog: Tasks,
}

impl Groups {
    fn new() -> Self {
        let all = Tasks::new();
        let [listeners, sessions, background, health, watchdog] = std::array::from_fn(|_| all.child());
        Self { all, listeners, sessions, background, health, watchdog }
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
        drain: Arc<Drain>,
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
            drain,
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
            connected_masters: Arc::default(),
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
    fn serve(&self, sockets: Sockets, installer: Installer, reloads: Reloads, groups: &Groups) {
        let Groups { listeners, sessions, background, health, watchdog, all: _ } = groups;
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
            leaving: self.shutdown.leaving.clone(),
            tasks: sessions.clone(),
        };
        for master in &self.config.call_home {
            sessions.spawn(call_home.clone().run(master.clone()));
        }
        background.spawn(installer.run(self.sessions_ended.clone()));
        let admin = Admin {
            listens: self.config.listen.is_some(),
            leaving: self.shutdown.leaving.clone(),
            reloads,
            drain: self.services.streams.drain.clone(),
            masters: self.services.connected_masters.clone(),
            metrics: self.metrics.clone(),
        };
        let metrics = Exposition::new(self.metrics.register());
        let endpoints = Endpoints { metrics, admin: Arc::new(admin) };
        health.spawn(endpoints.clone().serve_tcp(sockets.admin, health.clone()));
        health.spawn(endpoints.serve_unix(sockets.admin_unix, health.clone()));
        watchdog.spawn(systemd::watchdog(Vec::new()));
    }

    /// Serves on until the streams have ended, since masters may have no other way to this node. Then accepts nothing more
    /// and tells the masters. Returns how many streams were cut.
    async fn drain(&self, groups: &Groups) -> u64 {
        tracing::info!(streams = self.services.streams_open(), "stopping");
        self.shutdown.leaving.cancel();
        self.wait_for_streams(self.config.shutdown_grace).await;
        groups.listeners.cancel();
        groups.listeners.drain(LAST_GRACE).await;
        self.shutdown.draining.cancel();
        self.wait_for_streams(LAST_STREAMS).await
    }

    /// Leaves the links to the process that has taken this one's place, and then the masters. Returns how many streams were
    /// cut.
    async fn drain_replaced(
        &self,
        groups: &Groups,
        stopping: &CancellationToken,
        told: impl Future<Output = ()>,
    ) -> u64 {
        tracing::info!(streams = self.services.streams_open(), "replaced");
        groups.watchdog.cancel();
        groups.background.spawn(self.services.streams.drain.clone().follow_next_process());
        self.shutdown.leaving.cancel();
        groups.listeners.cancel();
        groups.listeners.drain(LAST_GRACE).await;
        let ended = async {
            sleep(LAST_ANSWER).await;
            groups.health.cancel();
            sleep(LAST_DIALS).await;
            self.shutdown.replaced.cancel();
            // Their figures go through this process.
            while self.metrics.sessions.count() > 0
                || self.services.streams_open() > 0
                || self.metrics.draining.get().processes > 0
            {
                sleep(STREAM_CHECK_INTERVAL).await;
            }
        };
        // Nobody brings lists of revoked certificates to people's sessions any more.
        let revocations = async {
            loop {
                sleep(REVOCATION_INTERVAL).await;
                let revocations = self.services.revocations.clone();
                let _ = spawn_blocking(move || revocations.read_again()).await;
            }
        };
        let limit = tokio::select! {
            () = ended => return 0,
            () = revocations => return 0,
            () = sleep(self.config.drain_timeout) => LAST_STREAMS,
            () = told => self.config.shutdown_grace,
            () = stopping.cancelled() => self.config.shutdown_grace,
        };
        if limit == LAST_STREAMS {
            self.shutdown.draining.cancel();
        }
        self.wait_for_streams(limit).await
    }

    /// Waits for a limited time until there are no streams. Returns how many are left.
    async fn wait_for_streams(&self, limit: Duration) -> u64 {
        let deadline = Instant::now() + limit;
        while self.services.streams_open() > 0 && Instant::now() < deadline {
            sleep(STREAM_CHECK_INTERVAL).await;
        }
        self.services.streams_open()
    }

    /// Ends the sessions, and joins every task. What streams have sent last may be under way for the rest of the grace, since
    /// the end `began`.
    async fn finish(&self, groups: &Groups, began: Instant) {
        self.shutdown.draining.cancel();
        self.shutdown.stopping.cancel();
        let grace = self.config.shutdown_grace.saturating_sub(began.elapsed()).max(MIN_GOODBYE);
        groups.sessions.drain(grace).await;
        self.sessions_ended.cancel();
        groups.background.drain(LAST_GRACE).await;
        groups.health.cancel();
        groups.health.drain(LAST_GRACE).await;
        groups.all.cancel();
        groups.all.drain(LAST_GRACE).await;
    }
}

/// The signals that end a process.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for SIGTERM or SIGINT.
    async fn terminated(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
