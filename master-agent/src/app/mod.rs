//! The composition root, which reads, builds and binds everything before it serves.

mod bind;
mod components;
mod egress;
mod groups;
mod inventory_file;
mod listeners;
mod sockets;

use std::{future::pending, sync::Arc, time::Duration};

use access::authn::cluster::{Cluster, Objects};
use anyhow::Context;
use kube::Client;
use proto_net::{systemd, tasks::Tasks, telemetry::LinesLost};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{MissedTickBehavior, interval},
};

use crate::{
    config::Config,
    front_end::audit::Writer,
    identity::{Authorities, refresh::Refresher, sqlite::SqliteStore},
    kubernetes::{self, api_server::KubeApiServer, config::KubernetesConfig, thread::FollowerThread},
    page::Page,
    traces::Traces,
    tunnels::{callers::ServeCallers, tunnel::Tunnel},
};
use components::{Components, Loaded, Startable};
use groups::Groups;
use inventory_file::{InventoryFile, InventoryFollower};
use sockets::Sockets;

/// How often the cluster's nodes are checked for changes, which often come in groups.
const CLUSTER_INTERVAL: Duration = Duration::from_secs(1);
/// The longest time to notify all nodes.
const NOTIFY_TIMEOUT: Duration = Duration::from_secs(1);
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

/// Runs the agent until SIGTERM or SIGINT, and then drains it.
pub async fn run(config: Config, log_lines_lost: LinesLost) -> anyhow::Result<()> {
    let groups = Groups::new();

    // Read the files.
    let inventory = InventoryFile::load(config.inventory.clone())?;
    let loaded = Loaded {
        inventory: inventory.inventory(),
        authorities: Arc::new(Authorities::load_or_create(&config.state_dir)?),
        store: Arc::new(SqliteStore::open(&config.state_dir)?),
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
        components.draining.clone(),
        config.admin.page.then_some(config.admin.listen),
    ));
    let sockets = Sockets::bind(&config)?;
    let traces = config.traces.as_ref().map(Traces::start).transpose().context("traces")?;

    // Serve and start.
    let front_end =
        listeners::serve(&config, &components, &page, sockets, cluster.as_ref(), &groups, &log_lines_lost)?;
    let (front_end, audit) = front_end.unzip();
    let callers = front_end.clone().map(|front_end| front_end as Arc<dyn ServeCallers>);
    start(&components, startable, callers, follower.as_ref(), &groups);
    let _refresher = Refresher::start(components.store.clone(), components.store_health.clone())?;
    let runtimes = front_end.map(|front_end| front_end.runtimes());
    groups.background.spawn(systemd::watchdog(runtimes.unwrap_or_default()));
    until_terminated(inventory, &components).await?;

    drain(&config, &components, &groups, audit, traces).await;
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
    background.spawn(components.registry.clone().sample());
}

/// Follows the inventory file and the nodes of the cluster until a signal ends the agent. A read that hangs
/// delays neither the other source nor the end.
async fn until_terminated(inventory: InventoryFile, components: &Components) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
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
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
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

/// Ends the agent in an order that lets requests and streams in progress finish.
async fn drain(
    config: &Config,
    components: &Components,
    groups: &Groups,
    audit: Option<Writer>,
    traces: Option<Traces>,
) {
    const REASON: &str = "the master-agent is stopping";
    let Groups { all, listeners, callers, sessions, background } = groups;
    systemd::stopping();
    tracing::info!(streams = callers.len(), "stopping");
    // Stop accepting.
    components.draining.cancel();
    listeners.cancel();
    listeners.drain(END_TIMEOUT).await;
    // Notify the nodes, let streams finish, and end the tunnels.
    for_all_tunnels(components, |tunnel| async move { tunnel.go_away(REASON).await }).await;
    let cut = callers.drain(config.shutdown_grace).await;
    for_all_tunnels(components, |tunnel| async move { tunnel.close(REASON).await }).await;
    sessions.cancel();
    sessions.drain(END_TIMEOUT).await;
    // End the background tasks, and write the remaining records.
    background.cancel();
    background.drain(END_TIMEOUT).await;
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
    tracing::info!(cut, "stopped");
}

/// Runs an action for all tunnels at once, so that a node that does not respond delays no other.
async fn for_all_tunnels<F>(components: &Components, action: impl Fn(Arc<Tunnel>) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let actions = components.sessions.child();
    for tunnel in components.registry.tunnels() {
        actions.spawn(action(tunnel));
    }
    actions.drain(NOTIFY_TIMEOUT).await;
}
