//! The composition root: everything is read and every socket bound first, then everything serves.

mod bind;
mod egress;

use std::{sync::Arc, time::Duration};

use access::authn::cluster::{Cluster, Objects};
use anyhow::Context;
use prometheus_client::registry::Registry;
use proto_net::{
    admin::Endpoints,
    exposition::Exposition,
    file_watcher::{FileWatcher, Polled, Watcher, watch},
    systemd,
    tasks::Tasks,
};
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
};

use self::egress::{Egress, EgressSockets};
use crate::{
    admin::Admin,
    agent::Agent,
    config::Config,
    egress::certificates::EgressCertificates,
    fields::UnixConfig,
    front_end::{self, audit::Writer, config::FrontEndConfig, local, server::FrontEnd},
    identity::{Authorities, sqlite::SqliteStore, store},
    kubernetes::{self, api_server::KubeApiServer},
    links::{self, DialLinks},
    metrics::{Certificates, Reason},
    page::Page,
    routing::inventory::Inventory,
    stream::metrics::StreamMetrics,
    traces::Traces,
    tunnel::Tunnel,
    tunnels::{self, compatibility, revocation},
};

/// How often files that may change are looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How long all tunnels together may take to be told something.
const FAREWELL: Duration = Duration::from_secs(1);

/// Every socket, bound.
struct Sockets {
    egress: EgressSockets,
    call_home: Option<TcpListener>,
    front_end: Option<FrontEndSockets>,
    admin: TcpListener,
    admin_unix: UnixListener,
}

struct FrontEndSockets {
    https: TcpListener,
    local_unix: Option<UnixListener>,
    local_tcp: Option<TcpListener>,
}

/// The groups of tasks, by when they end.
#[derive(Default)]
struct Owners {
    /// Callers and their streams, which may finish at the end.
    callers: Tasks,
    /// What accepts callers, which ends first.
    listeners: Tasks,
    /// What goes on until everybody has left.
    background: Tasks,
}

/// Runs the agent until SIGTERM or SIGINT, then drains it.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let inventory = config.inventory.clone().map(Inventory::watch).transpose()?;
    let nodes = inventory.as_ref().map(|file| Inventory::clone(&file.get())).unwrap_or_default();
    let authorities = Authorities::load_or_create(&config.state_dir)?;
    let store = Arc::new(SqliteStore::open(&config.state_dir)?);
    let client = match &config.kubernetes {
        Some(config) => Some(kubernetes::client(config).await?),
        None => None,
    };
    let sockets = bind(&config)?;
    let traces = config.traces.as_ref().map(Traces::start).transpose().context("traces")?;
    let agent = Arc::new(Agent::new(config.for_agent(), nodes, store, authorities)?);
    let page = Arc::new(Page::new(agent.clone(), config.admin.page.then_some(config.admin.listen)));
    let objects = agent.watches.as_ref().and_then(|watches| watches.existing());
    let cluster = client.as_ref().map(|client| Cluster {
        api_server: Arc::new(KubeApiServer(client.clone())),
        objects: objects.map(|objects| objects as Arc<dyn Objects>),
    });

    let tasks = Owners::default();
    let served = serve(&config, &agent, &page, sockets, cluster.as_ref(), &tasks)?;
    let Owners { callers, listeners, background } = tasks;
    if let (Some(watches), Some(client)) = (&agent.watches, &client) {
        watches.start(client, &background);
    }
    let mut links = DialLinks::default();
    links.follow(&agent);
    background.spawn(agent.clone().renew_user());
    background.spawn(store::follow(agent.store.clone()));
    background.spawn(revocation::follow(agent.clone()));
    background.spawn(agent.registry.clone().sample());
    let (front_end, audit) = served.unzip();
    let runtimes = front_end.map(|front_end| front_end.runtimes());
    background.spawn(systemd::watchdog(runtimes.unwrap_or_default()));

    until_terminated(inventory.as_ref(), &agent, &mut links).await?;

    // Stop accepting, tell the peers, let streams finish, end the tunnels.
    systemd::stopping();
    tracing::info!(streams = callers.len(), "stopping");
    agent.draining.cancel();
    listeners.cancel();
    let reason = "the master-agent is stopping";
    for_all(&agent, move |tunnel| async move { tunnel.go_away(reason).await }).await;
    let cut = callers.drain(config.shutdown_grace).await;
    for_all(&agent, move |tunnel| async move { tunnel.close(reason).await }).await;
    agent.sessions.cancel();
    agent.sessions.drain(Duration::from_secs(2)).await;
    background.cancel();
    background.drain(Duration::from_secs(2)).await;
    if let Some(audit) = audit
        && !audit.close(Duration::from_secs(2)).await
    {
        tracing::error!("the last audit records were not written in time");
    }
    if let Some(traces) = traces {
        traces.close(Duration::from_secs(2)).await;
    }
    tracing::info!(cut, "stopped");
    Ok(())
}

/// Does one thing for all tunnels at once. A node that does not take it can't hold up the others.
async fn for_all<F>(agent: &Agent, what: impl Fn(Arc<Tunnel>) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let told = Tasks::new();
    for tunnel in agent.registry.tunnels() {
        told.spawn(what(tunnel));
    }
    told.drain(FAREWELL).await;
}

fn bind(config: &Config) -> anyhow::Result<Sockets> {
    Ok(Sockets {
        egress: EgressSockets::bind(config)?,
        call_home: match &config.call_home {
            Some(call_home) => Some(bind::tcp(call_home.listen)?),
            None => None,
        },
        front_end: match &config.front_end {
            Some(front_end) => Some(bind_front_end(front_end)?),
            None => None,
        },
        admin: bind::tcp(config.admin.listen)?,
        admin_unix: bind::unix(&UnixConfig {
            path: config.admin.socket.clone(),
            mode: 0o600,
            owner: None,
            group: None,
        })?,
    })
}

/// Serves on every socket. Gives the front end and the writer of its audit log, where there is a front end.
fn serve(
    config: &Config,
    agent: &Arc<Agent>,
    page: &Arc<Page>,
    sockets: Sockets,
    cluster: Option<&Cluster>,
    owners: &Owners,
) -> anyhow::Result<Option<(Arc<FrontEnd>, Writer)>> {
    let Owners { callers, listeners, background } = owners;
    let Sockets { egress: egress_sockets, call_home, front_end, admin, admin_unix } = sockets;
    let certificates = egress_sockets.certificates();
    background.spawn(watch(certificates.watchers()));
    let streams = StreamMetrics::new(agent.registry.clone());
    let egress = Egress {
        dialer: agent.dialer.clone(),
        directory: agent.dialer.clone(),
        metrics: &streams,
        draining: &agent.draining,
        callers,
        listeners,
    };
    let proxy_urls = egress.serve(egress_sockets, config);
    let front_end = match front_end.zip(config.front_end.as_ref()) {
        Some((sockets, section)) => {
            let parts = front_end::server::Parts {
                cluster,
                proxy_urls: proxy_urls.map(|urls| urls as _),
                page: page.clone(),
                home: config.calls_over_https().then(|| agent.clone()),
                streams: streams.clone(),
                draining: agent.draining.clone(),
            };
            Some(serve_front_end(agent, sockets, section, parts, owners)?)
        }
        None => None,
    };
    if let Some(listener) = call_home {
        listeners.spawn(links::accept(agent.clone(), listener));
    }
    let served = front_end.as_ref().map(|(front_end, _)| front_end);
    let metrics = Exposition::new(registry(agent, served, &streams, certificates));
    let admin_of = Admin { agent: agent.clone(), page: page.clone(), front_end: served.cloned() };
    let endpoints = Endpoints { metrics, admin: Arc::new(admin_of) };
    background.spawn(endpoints.clone().serve_tcp(admin, background.clone()));
    background.spawn(endpoints.serve_unix(admin_unix, background.clone()));
    Ok(front_end)
}

fn serve_front_end(
    agent: &Arc<Agent>,
    sockets: FrontEndSockets,
    config: &FrontEndConfig,
    parts: front_end::server::Parts<'_>,
    owners: &Owners,
) -> anyhow::Result<(Arc<FrontEnd>, Writer)> {
    let Owners { callers, listeners, background } = owners;
    let (front_end, writer) = FrontEnd::load(config, parts, callers, background)?;
    front_end.watch(background);
    if config.through_tunnels {
        let _ = agent.callers.set(front_end.clone());
    }
    if let (Some(listener), Some(config)) = (sockets.local_unix, &config.local) {
        listeners.spawn(local::accept_unix(front_end.clone(), config.clone(), listener));
    }
    if let (Some(listener), Some(config)) = (sockets.local_tcp, &config.local) {
        listeners.spawn(local::accept_tcp(front_end.clone(), config.clone(), listener));
    }
    listeners.spawn(front_end.clone().accept(sockets.https));
    Ok((front_end, writer))
}

/// All metrics: what is counted, and what is collected when somebody asks.
fn registry(
    agent: &Arc<Agent>,
    front_end: Option<&Arc<FrontEnd>>,
    streams: &StreamMetrics,
    egress_certificates: EgressCertificates,
) -> Registry {
    let mut root = Registry::default();
    let r = root.sub_registry_with_prefix("master_agent");
    streams.register(r);
    agent.metrics.register(r);
    tunnels::metrics::register(agent, r);
    r.register_collector(Box::new(certificates_in_use(agent, front_end, egress_certificates)));
    if let Some(front_end) = front_end {
        front_end::metrics::register(front_end, r);
    }
    if let Some(watches) = &agent.watches {
        kubernetes::metrics::register(watches, r);
    }
    compatibility::register(agent, streams, &mut root);
    root
}

fn certificates_in_use(
    agent: &Arc<Agent>,
    front_end: Option<&Arc<FrontEnd>>,
    egress_certificates: EgressCertificates,
) -> Certificates {
    let (agent, front_end) = (agent.clone(), front_end.cloned());
    Certificates::new(move || {
        let mut all = tunnels::metrics::expiries(&agent).to_vec();
        all.extend(egress_certificates.expiries());
        all.extend(front_end.as_ref().map(|front_end| front_end.expiries()).unwrap_or_default());
        all
    })
}

async fn until_terminated(
    inventory: Option<&Arc<FileWatcher<Inventory>>>,
    agent: &Arc<Agent>,
    links: &mut DialLinks,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    systemd::ready();
    tracing::info!(
        nodes = agent.inventory().nodes().len(),
        version = env!("CARGO_PKG_VERSION"),
        "master-agent runs"
    );
    let mut watch = tokio::time::interval(WATCH_INTERVAL);
    let mut nodes_changed = agent.watches.as_ref().map(|watches| watches.nodes_changed());
    loop {
        let asked = tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => true,
            _ = watch.tick() => false,
        };
        // Once a second at most, as one change of a cluster seldom comes alone.
        if let Some(changed) = nodes_changed.as_mut().filter(|c| c.has_changed().unwrap_or_default()) {
            changed.mark_unchanged();
            agent.expect_nodes();
            links.follow(agent);
        }
        if let Some(file) = inventory {
            let (file, agent_of_file) = (file.clone(), agent.clone());
            let taken = tokio::task::spawn_blocking(move || take_inventory(&file, &agent_of_file, asked));
            match taken.await {
                Ok(true) => links.follow(agent),
                Ok(false) => {}
                Err(error) => tracing::error!(%error, "can't read the inventory again"),
            }
        }
    }
}

/// Takes a changed inventory; returns whether there was one. Unless `asked` to, the agent does not believe an inventory
/// in which no node is left. This blocks.
fn take_inventory(file: &FileWatcher<Inventory>, agent: &Agent, asked: bool) -> bool {
    let polled = if asked { file.reload() } else { file.poll() };
    let (result, taken) = match polled {
        Polled::Unchanged | Polled::Failed { repeated: true, .. } => return false,
        Polled::Loaded => {
            let inventory = Inventory::clone(&file.get());
            if inventory.nodes().is_empty() && agent.file_has_nodes() && !asked {
                tracing::error!("the inventory has no nodes any more; the last one stays until SIGHUP");
                ("failed", false)
            } else {
                tracing::info!(nodes = inventory.nodes().len(), "inventory read again");
                agent.set_inventory(inventory);
                ("ok", true)
            }
        }
        Polled::Failed { error, repeated: false } => {
            tracing::error!(error, "the inventory has errors; the last good one stays");
            ("failed", false)
        }
    };
    agent.metrics.inventory_reloads.get_or_create(&Reason { reason: result }).inc();
    taken
}

fn bind_front_end(config: &FrontEndConfig) -> anyhow::Result<FrontEndSockets> {
    let local = config.local.as_ref();
    Ok(FrontEndSockets {
        local_unix: local.and_then(|local| local.unix.as_ref()).map(bind::unix).transpose()?,
        local_tcp: match local.and_then(|local| local.tcp) {
            Some(address) => Some(bind::tcp(address)?),
            None => None,
        },
        https: bind::tcp(config.listen)?,
    })
}
