//! The composition root, which reads, builds and binds everything before it serves.

mod bind;
mod components;
mod egress;
mod groups;
mod handover;
mod inventory_file;
mod listeners;
mod sockets;

use std::{future::pending, sync::Arc, time::Duration};

use access::authn::cluster::{Cluster, Objects};
use anyhow::Context;
use kube::Client;
use proto_net::{
    handover::{Beginning, Handover, Successor, hangup, reload::Reloads},
    listeners::Stage,
    socket_store, systemd,
    tasks::Tasks,
    telemetry::LinesLost,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    front_end::audit::Writer,
    identity::{refresh::Refresher, state::MasterState},
    kubernetes::{self, api_server::KubeApiServer, config::KubernetesConfig, thread::FollowerThread},
    page::Page,
    traces::Traces,
    tunnels::callers::ServeCallers,
};
use components::{Components, Loaded, Startable};
use groups::Groups;
use handover::Running;
use inventory_file::{InventoryFile, InventoryFollower};
use listeners::AdminParts;
use sockets::Sockets;

/// How often the cluster's nodes are checked for changes, which often come in groups.
const CLUSTER_INTERVAL: Duration = Duration::from_secs(1);
/// How often a process that has been replaced looks whether those before it have ended.
const FORMER_INTERVAL: Duration = Duration::from_millis(200);
/// How long callers may go on that have come while the last ones ended.
const LAST_CALLERS: Duration = Duration::from_millis(500);
const STOPPING: &str = "the master-agent is stopping";
/// The longest time for each of the last steps, which end tasks and write records.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// The client of the Kubernetes API, and the thread whose runtime carries its connections.
struct Follower {
    client: Client,
    thread: FollowerThread,
}

impl Follower {
    async fn start(cluster: &KubernetesConfig, tasks: &Tasks) -> anyhow::Result<Self> {
        let (cluster, thread) = (cluster.clone(), FollowerThread::start()?);
        let client = tasks.spawn_on(async move { kubernetes::client(&cluster).await }, thread.runtime());
        let client = client.await?.context("there is no client for the Kubernetes API")??;
        Ok(Self { client, thread })
    }
}

/// Why a process ends.
enum End {
    Signal,
    /// Another one serves in its place.
    Replaced(Box<Successor>),
}

/// The signals that end a process.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
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

/// Runs the agent until SIGTERM or SIGINT, or until another process has taken its place, and then drains it.
pub async fn run(config: Config, beginning: Beginning, log_lines_lost: LinesLost) -> anyhow::Result<()> {
    let Beginning { program, role, file } = beginning;
    // Signals that come from now on are not lost.
    let (mut signals, hangup) = (Signals::new()?, signal(SignalKind::hangup())?);
    // Cancelled when the process that serves, this one or the one that has replaced it, has been told to stop.
    let stopping = CancellationToken::new();
    let groups = Groups::new();
    let (predecessor, mut listeners) = role.begin().await?;

    // Read the files.
    let inventory = InventoryFile::load(config.inventory.clone())?;
    let MasterState { authorities, store } = MasterState::open(&config.state_dir)?;
    let loaded = Loaded {
        inventory: inventory.inventory(),
        authorities: Arc::new(authorities),
        store: Arc::new(store),
    };
    let (client, follower) = match &config.kubernetes {
        Some(cluster) => (
            Some(kubernetes::client(cluster).await?),
            Some(Follower::start(cluster, &groups.background).await?),
        ),
        None => (None, None),
    };

    // Build the components and bind the sockets.
    let (components, startable) = components::build(&config, loaded, groups.sessions.clone())?;
    let objects = components.watches.as_ref().and_then(|watches| watches.existing());
    let cluster = client.as_ref().map(|client| Cluster {
        api_server: Arc::new(KubeApiServer(client.clone())),
        objects: objects.map(|objects| objects as Arc<dyn Objects>),
    });
    let page = Arc::new(Page::new(
        components.registry.clone(),
        components.explainer.clone(),
        components.leaving.clone(),
        config.admin.page.then_some(config.admin.listen),
    ));
    let sockets = Sockets::bind(&config, &mut listeners)?;
    let unused = listeners.close_unused();
    let traces = config.traces.as_ref().map(Traces::start).transpose().context("traces")?;
    let (reloads, mut reload_requests) = Reloads::new();
    let admin = AdminParts { page, reloads: reloads.clone(), log_lines_lost };
    let front_end = listeners::serve(&config, &components, sockets, cluster.as_ref(), &groups, admin)?;
    let (front_end, audit) = front_end.unzip();

    // Start, and serve.
    let callers = front_end.clone().map(|front_end| front_end as Arc<dyn ServeCallers>);
    start(&components, startable, callers, follower.as_ref(), &groups);
    let _refresher = Refresher::start(components.store.clone(), components.store_health.clone())?;
    let runtimes = front_end.map(|front_end| front_end.runtimes());
    let watchdog = groups.background.child();
    watchdog.spawn(systemd::watchdog(runtimes.unwrap_or_default()));
    if let Some(mut predecessor) = predecessor {
        handover::take_over(&mut predecessor, &unused, &listeners, &components).await?;
        let (former, stopping) = (components.streams.draining.clone(), stopping.clone());
        groups.background.spawn(async move {
            predecessor.follow(|draining| former.set(draining), stopping.cancelled()).await;
        });
    }
    socket_store::keep(&listeners, &unused);
    let running = Running { components: &components, groups: &groups };
    let former = &components.streams.draining;
    let handover =
        Handover { program: &program, listeners: &listeners, agent: &running, former, stopping: &stopping };
    let changed = hangup::follow(hangup, &file, Arc::new(config.clone()), &reloads);
    let end = tokio::select! {
        // A process that serves already is not given up.
        biased;
        successor = handover.requested(&mut reload_requests) => End::Replaced(Box::new(successor)),
        signalled = until_terminated(inventory, &components, &mut signals) => signalled.map(|()| End::Signal)?,
        never = changed => match never {},
    };
    // Further requests for a reload are refused.
    drop(reload_requests);
    let cut = match end {
        End::Signal => {
            systemd::stopping();
            stopping.cancel();
            // A handover that was under way had paused them.
            listeners.accept(Stage::Links, true);
            listeners.close_all_handles();
            drain(&config, &components, &groups).await
        }
        End::Replaced(successor) => {
            watchdog.cancel();
            let told = successor.stops_with(signals.terminated());
            let rest = async {
                tokio::select! {
                    cut = drain_replaced(&config, &components, &groups, &stopping, told) => cut,
                    never = running.retire() => match never {},
                }
            };
            handover.carry_on(&successor, rest).await
        }
    };
    finish(&components, &groups, audit, traces).await;
    tracing::info!(cut, "stopped");
    Ok(())
}

/// Starts the components that run in tasks of their own.
fn start(
    components: &Components,
    startable: Startable,
    callers: Option<Arc<dyn ServeCallers>>,
    follower: Option<&Follower>,
    groups: &Groups,
) {
    let Groups { sessions, background, .. } = groups;
    let Startable { dial_links, supervisor, caller_tunnels } = startable;
    if let (Some(watches), Some(Follower { client, thread })) = (&components.watches, follower) {
        watches.start(client, background, thread.runtime());
    }
    if let (Some(tunnels), Some(callers)) = (caller_tunnels, callers) {
        sessions.spawn(tunnels.serve(callers, sessions.clone()));
    }
    sessions.spawn(dial_links.run());
    sessions.spawn(supervisor.recheck());
    background.spawn(components.login.clone().keep_renewed());
    background.spawn(components.revocations.clone().follow());
    background.spawn(components.drains.clone().follow());
    background.spawn(components.registry.clone().sample());
}

/// Follows the inventory file and the nodes of the cluster until a signal ends the agent. A read that hangs
/// delays neither the other source nor the end.
async fn until_terminated(
    inventory: InventoryFile,
    components: &Components,
    signals: &mut Signals,
) -> anyhow::Result<()> {
    let hangup = signal(SignalKind::hangup())?;
    let reloads = components.tunnels.inventory_reloads.clone();
    let inventory = InventoryFollower::new(inventory, components.expected.clone(), reloads);
    systemd::ready();
    tracing::info!(
        nodes = components.registry.count().1,
        version = env!("CARGO_PKG_VERSION"),
        "master-agent runs"
    );
    tokio::select! {
        () = signals.terminated() => {}
        () = inventory.follow(hangup) => {}
        () = follow_cluster(components) => {}
    }
    Ok(())
}

/// Takes over the nodes of the cluster whenever they change, without an end.
async fn follow_cluster(components: &Components) {
    let Some(watches) = &components.watches else { return pending().await };
    let mut nodes_changed = watches.nodes_changed();
    let mut poll = interval(CLUSTER_INTERVAL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        poll.tick().await;
        if !nodes_changed.has_changed().unwrap_or_default() {
            continue;
        }
        nodes_changed.mark_unchanged();
        let expected = components.expected.clone();
        // Many nodes take a while to compare and must not block streams.
        if let Err(error) = tokio::task::spawn_blocking(move || expected.cluster_changed()).await {
            tracing::error!(%error, "can't take the nodes of the cluster");
        }
    }
}

/// Serves on until requests and streams in progress have ended, since nobody else may serve, and then accepts nothing more.
/// Returns how many callers were cut.
async fn drain(config: &Config, components: &Components, groups: &Groups) -> u64 {
    let Groups { listeners, callers, .. } = groups;
    tracing::info!(callers = callers.len(), "stopping");
    components.leaving.cancel();
    components.generations.begin_next().end();
    let _ = timeout(config.shutdown_grace, callers.ended()).await;
    components.draining.cancel();
    components.generations.present().end();
    listeners.cancel();
    listeners.drain(END_TIMEOUT).await;
    // Their dials still need the tunnels.
    let _ = timeout(LAST_CALLERS, callers.ended()).await;
    components.for_all_tunnels(|tunnel| async move { tunnel.go_away(STOPPING).await }).await;
    callers.drain(Duration::ZERO).await as u64
}

/// Does the same for a process whose place another one has taken.
async fn drain_replaced(
    config: &Config,
    components: &Components,
    groups: &Groups,
    stopping: &CancellationToken,
    told: impl Future<Output = ()>,
) -> u64 {
    let callers = &groups.callers;
    tracing::info!(callers = callers.len(), "replaced");
    components.leaving.cancel();
    components.draining.cancel();
    components.generations.present().draining.cancel();
    groups.listeners.cancel();
    // Whoever has been accepted is a caller by then.
    groups.listeners.drain(END_TIMEOUT).await;
    let ended = async {
        callers.ended().await;
        // Their figures go through this process.
        while components.streams.draining.get().processes > 0 {
            sleep(FORMER_INTERVAL).await;
        }
    };
    let limit = tokio::select! {
        () = ended => return 0,
        () = sleep(config.drain_timeout) => Duration::ZERO,
        () = told => config.shutdown_grace,
        () = stopping.cancelled() => config.shutdown_grace,
    };
    callers.drain(limit).await as u64
}

/// Ends the tunnels, then everything else, and writes the remaining records.
async fn finish(components: &Components, groups: &Groups, audit: Option<Writer>, traces: Option<Traces>) {
    let Groups { all, sessions, background, health, .. } = groups;
    components.for_all_tunnels(|tunnel| async move { tunnel.close(STOPPING).await }).await;
    sessions.cancel();
    sessions.drain(END_TIMEOUT).await;
    background.cancel();
    background.drain(END_TIMEOUT).await;
    health.cancel();
    health.drain(END_TIMEOUT).await;
    all.cancel();
    all.drain(END_TIMEOUT).await;
    if let Some(audit) = audit
        && !audit.close(END_TIMEOUT).await
    {
        tracing::error!("the last audit records were not written in time");
    }
    if let Some(traces) = traces {
        traces.close(END_TIMEOUT).await;
    }
}
