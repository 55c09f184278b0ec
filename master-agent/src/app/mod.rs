//! The composition root: everything is read, built and bound first, and then everything serves.

mod bind;
mod egress;
mod groups;
mod inventory_file;
mod listeners;
mod parts;
mod sockets;

use std::{sync::Arc, time::Duration};

use access::authn::cluster::{Cluster, Objects};
use anyhow::Context;
use kube::Client;
use proto_net::systemd;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::interval,
};

use crate::{
    config::Config,
    front_end::audit::Writer,
    identity::{Authorities, sqlite::SqliteStore, store},
    kubernetes::{self, api_server::KubeApiServer},
    page::Page,
    traces::Traces,
    tunnels::{callers::ServeCallers, tunnel::Tunnel},
};
use groups::Groups;
use inventory_file::{InventoryFile, InventoryFollower};
use parts::{Loaded, Parts, Startable};
use sockets::Sockets;

/// How often the inventory file is looked at for changes.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How long all tunnels together may take to be told something.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);
/// How long each last step may take: to end tasks, and to write what has been recorded.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs the agent until SIGTERM or SIGINT, then drains it.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let groups = Groups::new();

    // Read.
    let inventory = InventoryFile::load(config.inventory.clone())?;
    let loaded = Loaded {
        inventory: inventory.inventory(),
        authorities: Arc::new(Authorities::load_or_create(&config.state_dir)?),
        store: Arc::new(SqliteStore::open(&config.state_dir)?),
    };
    let client = match &config.kubernetes {
        Some(cluster) => Some(kubernetes::client(cluster).await?),
        None => None,
    };

    // Build and bind.
    let (parts, startable) = parts::build(&config, loaded, groups.sessions.clone())?;
    let objects = parts.watches.as_ref().and_then(|watches| watches.existing());
    let cluster = client.as_ref().map(|client| Cluster {
        api_server: Arc::new(KubeApiServer(client.clone())),
        objects: objects.map(|objects| objects as Arc<dyn Objects>),
    });
    let page = Arc::new(Page::new(
        parts.registry.clone(),
        parts.explainer.clone(),
        parts.draining.clone(),
        config.admin.page.then_some(config.admin.listen),
    ));
    let sockets = Sockets::bind(&config)?;
    let traces = config.traces.as_ref().map(Traces::start).transpose().context("traces")?;

    // Serve.
    let front_end = listeners::serve(&config, &parts, &page, sockets, cluster.as_ref(), &groups)?;
    let (front_end, audit) = front_end.unzip();
    let callers = front_end.clone().map(|front_end| front_end as Arc<dyn ServeCallers>);
    start(&parts, startable, callers, client.as_ref(), &groups);
    let runtimes = front_end.map(|front_end| front_end.runtimes());
    groups.background.spawn(systemd::watchdog(runtimes.unwrap_or_default()));
    until_terminated(inventory, &parts).await?;

    drain(&config, &parts, &groups, audit, traces).await;
    Ok(())
}

/// Starts the parts that run by themselves.
fn start(
    parts: &Parts,
    startable: Startable,
    callers: Option<Arc<dyn ServeCallers>>,
    client: Option<&Client>,
    groups: &Groups,
) {
    let Groups { sessions, background, .. } = groups;
    let Startable { dial_links, caller_tunnels } = startable;
    if let (Some(watches), Some(client)) = (&parts.watches, client) {
        watches.start(client, background);
    }
    if let (Some(tunnels), Some(callers)) = (caller_tunnels, callers) {
        sessions.spawn(tunnels.serve(callers, sessions.clone()));
    }
    sessions.spawn(dial_links.run());
    background.spawn(parts.login.clone().keep_renewed());
    background.spawn(store::follow(parts.store.clone()));
    background.spawn(parts.revocations.clone().follow());
    background.spawn(parts.registry.clone().sample());
}

/// Follows the inventory file and the nodes of the cluster until a signal says to stop.
async fn until_terminated(inventory: InventoryFile, parts: &Parts) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut nodes_changed = parts.watches.as_ref().map(|watches| watches.nodes_changed());
    let reloads = parts.tunnels.inventory_reloads.clone();
    let inventory = Arc::new(InventoryFollower::new(inventory, parts.expected.clone(), reloads));
    let mut poll = interval(POLL_INTERVAL);
    systemd::ready();
    tracing::info!(
        nodes = parts.registry.count().1,
        version = env!("CARGO_PKG_VERSION"),
        "master-agent runs"
    );
    loop {
        let asked = tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => true,
            _ = poll.tick() => false,
        };
        // Changes of a cluster seldom come alone, so they are taken together.
        let changed = nodes_changed.as_mut().is_some_and(|changed| {
            let has_changed = changed.has_changed().unwrap_or_default();
            changed.mark_unchanged();
            has_changed
        });
        let (expected, inventory) = (parts.expected.clone(), inventory.clone());
        // A large inventory takes a while to read, and must not hold up streams.
        let polled = tokio::task::spawn_blocking(move || {
            if changed {
                expected.cluster_changed();
            }
            inventory.poll(asked);
        });
        if let Err(error) = polled.await {
            tracing::error!(%error, "can't read the inventory again");
        }
    }
}

/// Ends the agent in an order in which nobody loses what could still be finished.
async fn drain(
    config: &Config,
    parts: &Parts,
    groups: &Groups,
    audit: Option<Writer>,
    traces: Option<Traces>,
) {
    const REASON: &str = "the master-agent is stopping";
    let Groups { all, listeners, callers, sessions, background } = groups;
    systemd::stopping();
    tracing::info!(streams = callers.len(), "stopping");
    // Accept nothing new.
    parts.draining.cancel();
    listeners.cancel();
    listeners.drain(END_TIMEOUT).await;
    // Tell the nodes, let streams finish, and end the tunnels.
    for_all_tunnels(parts, |tunnel| async move { tunnel.go_away(REASON).await }).await;
    let cut = callers.drain(config.shutdown_grace).await;
    for_all_tunnels(parts, |tunnel| async move { tunnel.close(REASON).await }).await;
    sessions.cancel();
    sessions.drain(END_TIMEOUT).await;
    // End what served all of these, and write what they have recorded.
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

/// Does one thing for all tunnels at once, so that a node that does not take it holds up no other.
async fn for_all_tunnels<F>(parts: &Parts, what: impl Fn(Arc<Tunnel>) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let told = parts.sessions.child();
    for tunnel in parts.registry.tunnels() {
        told.spawn(what(tunnel));
    }
    told.drain(FAREWELL_TIMEOUT).await;
}
