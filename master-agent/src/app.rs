//! The composition root: everything is read and every socket bound first, then everything serves.

use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use prometheus_client::registry::Registry;
use proto_net::{admin::Endpoints, exposition::Exposition, socket, systemd, tasks::Tasks, tls, unix};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, pem::PemObject},
};
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    admin::Admin,
    agent::Agent,
    client_certificates::{ClientCa, ClientVerifier, Possession},
    config::Config,
    egress::{
        Common, certificates,
        config::{ProxyUrlsConfig, Socks5Config},
        http_connect::HttpConnect,
        konnectivity::Konnectivity,
        listen::{self, Callers},
        proxy_url::{ProxyUrls, TargetTls},
        socks5::Socks5,
        users::Users,
    },
    fields::{TlsConfig, UnixConfig},
    front_end::{self, audit::Writer, config::FrontEndConfig, local, server::FrontEnd},
    http::claims::Claims,
    identity::Authorities,
    inventory::Inventory,
    kubernetes::{self, Cluster},
    links::{self, DialLinks},
    metrics::{Certificates, Reason},
    page::Page,
    reloaded::Reloaded,
    store::SqliteStore,
    traces::Traces,
    tunnel::Tunnel,
    tunnels::{self, compatibility, revocation},
};

/// How often files that may change are looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How long all tunnels together may take to be told something.
const FAREWELL: Duration = Duration::from_secs(1);

type TlsSocket = (TcpListener, TlsAcceptor, Callers);

/// Every socket, bound.
struct Sockets {
    connect_unix: Option<UnixListener>,
    connect_tls: Option<TlsSocket>,
    konnectivity_unix: Option<UnixListener>,
    konnectivity_tls: Option<TlsSocket>,
    socks5: Option<Socks5Sockets>,
    proxy_urls: Option<ProxyUrlSockets>,
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

struct Socks5Sockets {
    unix: Option<UnixListener>,
    tcp: Option<(TcpListener, Option<Users>)>,
}

struct ProxyUrlSockets {
    unix: Option<UnixListener>,
    tcp: Option<TcpListener>,
    tls: TargetTls,
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
    let inventory = load_inventory(config.inventory.as_deref())?;
    let authorities = Authorities::load_or_create(&config.state_dir)?;
    let store = Arc::new(SqliteStore::open(&config.state_dir)?);
    let client = match &config.kubernetes {
        Some(config) => Some(kubernetes::client(config).await?),
        None => None,
    };
    let sockets = bind(&config)?;
    let traces = config.traces.as_ref().map(Traces::start).transpose().context("traces")?;
    let agent = Arc::new(Agent::new(config.for_agent(), inventory, store, authorities)?);
    let page = Arc::new(Page::new(agent.clone(), config.admin.page.then_some(config.admin.listen)));
    let existing = agent.watches.as_ref().and_then(|watches| watches.existing());
    let cluster = client.map(|client| Cluster { client, existing });

    let tasks = Owners::default();
    let served = serve(&config, &agent, &page, sockets, cluster.as_ref(), &tasks)?;
    let Owners { callers, listeners, background } = tasks;
    if let (Some(watches), Some(cluster)) = (&agent.watches, &cluster) {
        watches.start(&cluster.client, &background);
    }
    let mut links = DialLinks::default();
    links.follow(&agent);
    background.spawn(agent.clone().renew_user());
    background.spawn(revocation::follow(agent.clone()));
    background.spawn(agent.registry.clone().sample());
    let (front_end, audit) = served.unzip();
    let runtimes = front_end.map(|front_end| front_end.runtimes());
    background.spawn(systemd::watchdog(runtimes.unwrap_or_default()));

    until_terminated(config.inventory.as_deref(), &agent, &mut links).await?;

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
    let (connect, konnectivity) = (&config.http_connect, &config.konnectivity);
    Ok(Sockets {
        connect_unix: connect.unix.as_ref().map(bind_unix).transpose()?,
        connect_tls: bind_tls(connect.tls.as_ref(), b"http/1.1")?,
        konnectivity_unix: konnectivity.unix.as_ref().map(bind_unix).transpose()?,
        konnectivity_tls: bind_tls(konnectivity.tls.as_ref(), b"h2")?,
        socks5: match &config.socks5 {
            Some(socks5) => Some(bind_socks5(socks5)?),
            None => None,
        },
        proxy_urls: match &config.proxy_urls {
            Some(proxy_urls) => Some(bind_proxy_urls(proxy_urls)?),
            None => None,
        },
        call_home: match &config.call_home {
            Some(call_home) => Some(bind_tcp(call_home.listen)?),
            None => None,
        },
        front_end: match &config.front_end {
            Some(front_end) => Some(bind_front_end(front_end)?),
            None => None,
        },
        admin: bind_tcp(config.admin.listen)?,
        admin_unix: bind_unix(&UnixConfig {
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
    let Sockets {
        connect_unix,
        connect_tls,
        konnectivity_unix,
        konnectivity_tls,
        socks5,
        proxy_urls,
        call_home,
        front_end,
        admin,
        admin_unix,
    } = sockets;
    let door = Arc::new(HttpConnect(Common {
        dialer: agent.dialer.clone(),
        metrics: agent.metrics.clone(),
        head_timeout: config.http_connect.head_timeout,
        half_closed_timeout: config.http_connect.half_closed_timeout,
        max_connections: config.http_connect.max_connections,
        connections: callers.clone(),
    }));
    if let Some(listener) = connect_unix {
        listeners.spawn(listen::unix(door.clone(), "connect-unix", listener));
    }
    if let Some((listener, acceptor, allowed)) = connect_tls {
        listeners.spawn(listen::tls(door, "connect-tls", listener, acceptor, allowed));
    }
    if let (Some(sockets), Some(config)) = (socks5, &config.socks5) {
        serve_socks5(agent, sockets, config, callers, listeners);
    }
    let proxy_urls = proxy_urls.zip(config.proxy_urls.as_ref());
    let claims = config.front_end.as_ref().map(|config| config.upstream.identity.claims());
    let claims = Arc::new(claims.unwrap_or_default());
    let proxy_urls =
        proxy_urls.map(|(sockets, config)| serve_proxy_urls(agent, sockets, config, claims, owners));
    let door = Arc::new(Konnectivity {
        common: Common {
            dialer: agent.dialer.clone(),
            metrics: agent.metrics.clone(),
            head_timeout: config.konnectivity.head_timeout,
            // Its connections have no half-closed state.
            half_closed_timeout: Duration::ZERO,
            max_connections: config.konnectivity.max_connections,
            connections: callers.clone(),
        },
        draining: agent.draining.clone(),
    });
    if let Some(listener) = konnectivity_unix {
        listeners.spawn(listen::unix(door.clone(), "konnectivity-unix", listener));
    }
    if let Some((listener, acceptor, allowed)) = konnectivity_tls {
        listeners.spawn(listen::tls(door, "konnectivity-tls", listener, acceptor, allowed));
    }
    let front_end = match front_end.zip(config.front_end.as_ref()) {
        Some((sockets, section)) => {
            let parts = front_end::server::Parts {
                cluster,
                proxy_urls: proxy_urls.map(|urls| urls as _),
                page: page.clone(),
                home: config.calls_over_https().then(|| agent.clone()),
                metrics: agent.metrics.clone(),
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
    let metrics = Exposition::new(registry(config, agent, served));
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

/// All metrics: what is counted, and what is read off the agent when asked.
fn registry(config: &Config, agent: &Arc<Agent>, front_end: Option<&Arc<FrontEnd>>) -> Registry {
    let mut root = Registry::default();
    let r = root.sub_registry_with_prefix("master_agent");
    agent.metrics.register(r);
    tunnels::metrics::register(agent, r);
    r.register_collector(Box::new(certificates_in_use(config, agent, front_end)));
    if let Some(front_end) = front_end {
        front_end::metrics::register(front_end, r);
    }
    if let Some(watches) = &agent.watches {
        kubernetes::metrics::register(watches, r);
    }
    compatibility::register(agent, &mut root);
    root
}

fn certificates_in_use(
    config: &Config,
    agent: &Arc<Agent>,
    front_end: Option<&Arc<FrontEnd>>,
) -> Certificates {
    let (agent, front_end) = (agent.clone(), front_end.cloned());
    let Config { http_connect, konnectivity, proxy_urls, .. } = config;
    let of_doors = certificates::expiries(http_connect, konnectivity, proxy_urls.as_ref());
    Certificates::new(move || {
        let mut all = tunnels::metrics::expiries(&agent).to_vec();
        all.extend_from_slice(&of_doors);
        all.extend(front_end.as_ref().map(|front_end| front_end.expiries()).unwrap_or_default());
        all
    })
}

fn serve_socks5(
    agent: &Agent,
    sockets: Socks5Sockets,
    config: &Socks5Config,
    callers: &Tasks,
    listeners: &Tasks,
) {
    let common = Common {
        dialer: agent.dialer.clone(),
        metrics: agent.metrics.clone(),
        head_timeout: config.head_timeout,
        half_closed_timeout: config.half_closed_timeout,
        max_connections: config.max_connections,
        connections: callers.clone(),
    };
    if let Some(listener) = sockets.unix {
        listeners.spawn(listen::unix(Arc::new(Socks5::new(common.clone(), None)), "socks5-unix", listener));
    }
    if let Some((listener, users)) = sockets.tcp {
        listeners.spawn(listen::tcp(Arc::new(Socks5::new(common, users)), "socks5-tcp", listener));
    }
}

fn serve_proxy_urls(
    agent: &Agent,
    sockets: ProxyUrlSockets,
    config: &ProxyUrlsConfig,
    claims: Arc<Claims>,
    owners: &Owners,
) -> Arc<ProxyUrls> {
    let Owners { callers, listeners, .. } = owners;
    let door = Arc::new(ProxyUrls {
        common: Common {
            dialer: agent.dialer.clone(),
            metrics: agent.metrics.clone(),
            head_timeout: config.head_timeout,
            half_closed_timeout: config.half_closed_timeout,
            max_connections: config.max_connections,
            connections: callers.clone(),
        },
        directory: agent.dialer.clone(),
        tls: sockets.tls,
        claims,
        idle_timeout: config.idle_timeout,
        draining: agent.draining.clone(),
    });
    if let Some(listener) = sockets.unix {
        listeners.spawn(listen::unix(door.clone(), "proxy-url-unix", listener));
    }
    if let Some(listener) = sockets.tcp {
        listeners.spawn(listen::tcp(door.clone(), "proxy-url-tcp", listener));
    }
    door
}

async fn until_terminated(
    file: Option<&Path>,
    agent: &Arc<Agent>,
    links: &mut DialLinks,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    systemd::ready();
    tracing::info!(
        nodes = agent.inventory().nodes.len(),
        version = env!("CARGO_PKG_VERSION"),
        "master-agent runs"
    );
    let mut watch = tokio::time::interval(WATCH_INTERVAL);
    let (mut read, mut last) = (fingerprint(file), fingerprint(file));
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
        let now = fingerprint(file);
        // A file that still changes may be half-written.
        if asked || now != read && now == last {
            read = now;
            reload_inventory(file, agent, asked);
            links.follow(agent);
        }
        last = now;
    }
}

/// What tells that a file has changed, also when it was replaced through a symbolic link.
fn fingerprint(path: Option<&Path>) -> Option<(SystemTime, u64, u64)> {
    let metadata = std::fs::metadata(path?).ok()?;
    Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
}

fn load_inventory(file: Option<&Path>) -> anyhow::Result<Inventory> {
    match file {
        Some(path) => Ok(Inventory::load(path)?),
        None => Ok(Inventory::default()),
    }
}

/// Without being asked to, an inventory in which no node is left is not believed.
fn reload_inventory(file: Option<&Path>, agent: &Agent, asked: bool) {
    let result = match load_inventory(file) {
        Ok(inventory) if inventory.nodes.is_empty() && agent.file_has_nodes() && !asked => {
            tracing::error!("the inventory has no nodes any more; the last one stays until SIGHUP");
            "failed"
        }
        Ok(inventory) => {
            tracing::info!(nodes = inventory.nodes.len(), "inventory read again");
            agent.set_inventory(inventory);
            "ok"
        }
        Err(error) => {
            tracing::error!(%error, "the inventory has errors; the last good one stays");
            "failed"
        }
    };
    agent.metrics.inventory_reloads.get_or_create(&Reason { reason: result }).inc();
}

fn bind_socks5(config: &Socks5Config) -> anyhow::Result<Socks5Sockets> {
    Ok(Socks5Sockets {
        unix: config.unix.as_ref().map(bind_unix).transpose()?,
        tcp: match &config.tcp {
            Some(tcp) => {
                let users = tcp.users_file.as_deref().map(Users::load).transpose()?;
                Some((bind_tcp(tcp.listen)?, users))
            }
            None => None,
        },
    })
}

fn bind_front_end(config: &FrontEndConfig) -> anyhow::Result<FrontEndSockets> {
    let local = config.local.as_ref();
    Ok(FrontEndSockets {
        local_unix: local.and_then(|local| local.unix.as_ref()).map(bind_unix).transpose()?,
        local_tcp: match local.and_then(|local| local.tcp) {
            Some(address) => Some(bind_tcp(address)?),
            None => None,
        },
        https: bind_tcp(config.listen)?,
    })
}

fn bind_proxy_urls(config: &ProxyUrlsConfig) -> anyhow::Result<ProxyUrlSockets> {
    Ok(ProxyUrlSockets {
        unix: config.unix.as_ref().map(bind_unix).transpose()?,
        tcp: match config.tcp {
            Some(address) => Some(bind_tcp(address)?),
            None => None,
        },
        tls: TargetTls::load(config)?,
    })
}

fn bind_tcp(address: std::net::SocketAddr) -> anyhow::Result<TcpListener> {
    socket::listen(address).with_context(|| format!("can't listen on {address}"))
}

fn bind_tls(config: Option<&TlsConfig>, protocol: &[u8]) -> anyhow::Result<Option<TlsSocket>> {
    let Some(config) = config else { return Ok(None) };
    let acceptor = tls_acceptor(config, protocol)?;
    let client_ca = config.client_ca.clone();
    let ca =
        Reloaded::load("the client CA", vec![client_ca.clone()], move || ClientCa::read(&client_ca, &[]))?;
    let callers = Callers { verifier: ClientVerifier::new(ca), allowed_names: config.allowed_names.clone() };
    Ok(Some((bind_tcp(config.listen)?, acceptor, callers)))
}

fn bind_unix(config: &UnixConfig) -> anyhow::Result<UnixListener> {
    let UnixConfig { path, mode, owner, group } = config;
    unix::bind(path, *mode, *owner, *group).with_context(|| format!("can't listen on {}", path.display()))
}

fn tls_acceptor(config: &TlsConfig, protocol: &[u8]) -> anyhow::Result<TlsAcceptor> {
    let read = |what: &str, path: &Path| format!("can't read the {what} in {}", path.display());
    let chain = CertificateDer::pem_file_iter(&config.cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| read("certificate", &config.cert))?;
    let key = tls::private_key(&config.key)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let possession = Possession { provider: provider.clone(), mandatory: true };
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_client_cert_verifier(Arc::new(possession))
        .with_single_cert(chain, key)
        .context("the certificate and the private key don't go together")?;
    tls.alpn_protocols = vec![protocol.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(tls)))
}
