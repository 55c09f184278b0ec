//! The listener and its connections.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak, atomic::AtomicU32},
    time::{Duration, Instant},
};

use anyhow::Context;
use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::{
    NodeName,
    io::{
        admin::accept_error,
        handshake::{Place, Places},
        patient::PatientWriter,
        socket,
        tasks::Tasks,
    },
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::{
    audit::{Audit, Writer},
    authn::{Authenticated, Authenticators, Certificates, Moment},
    authz::Authorizers,
    config::FrontEndConfig,
    headers::Introduction,
    limits::{Counted, Limits, LimitsConfig, Source},
    reloaded::{Follow, Reloaded, follow},
    streams::Streams,
    tls,
    upstream::{Upstream, UpstreamStatus},
    user::UNAUTHENTICATED,
    workers::{self, Workers},
};
use crate::{
    agent::Agent,
    front_door::proxy_url::ProxyUrls,
    http::watched::{Activity, Watched},
    kubernetes::Cluster,
    metrics::{Expiry, Handshake, Metrics},
    page,
};

/// Connections at once on which nobody has authenticated.
const HANDSHAKES: usize = 1024;
/// Of a request's head.
const MAX_HEAD: usize = 64 * 1024;
const MAX_HEADERS: usize = 128;
/// Streams that a caller resets before they are served (CVE-2023-44487).
const MAX_RESETS: usize = 20;
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// How long who a certificate is may be remembered on its connection.
const REMEMBERED: Duration = Duration::from_secs(10);
/// How long requests that are under way may take once their connection is to end.
const LAST_REQUESTS: Duration = Duration::from_secs(10);
pub const DOOR: &str = "front-end";
const EVICTED: &str = "gave its place to a newcomer before anybody authenticated";

/// The front end, its files read.
pub struct FrontEnd {
    tls: Arc<Reloaded<tls::Serving>>,
    pub(super) authn: Authenticators,
    pub(super) authz: Authorizers,
    pub(super) authorize_everything: bool,
    /// `None` hands proxy URLs on.
    pub(super) proxy_urls: Option<Arc<ProxyUrls>>,
    pub(super) upstream: Arc<Upstream>,
    pub(super) introduction: Introduction,
    pub(super) limits: Limits,
    pub(super) config: LimitsConfig,
    pub(super) audit: Audit,
    pub(super) metrics: Metrics,
    /// Callers and upgraded connections; drained at the end.
    pub(super) connections: Tasks,
    pub(super) draining: CancellationToken,
    /// Whose nodes may call home here.
    home: OnceLock<Weak<Agent>>,
    /// Whose page is served here.
    page: OnceLock<Weak<Agent>>,
    permits: Arc<Semaphore>,
    handshakes: Places,
    workers: Workers,
    files: Vec<Arc<dyn Follow>>,
}

/// How many there are at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    pub connections: usize,
    pub in_flight: usize,
    pub queued: usize,
    pub long_running: usize,
}

/// Where a caller comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    Address(SocketAddr),
    /// From a node through its tunnel, whose other end is at `address`. What the node itself says of the caller
    /// is nothing to go by.
    Node {
        name: NodeName,
        address: Option<SocketAddr>,
    },
    /// Of the plain port: by TCP from this address, else by a Unix socket.
    Local(Option<SocketAddr>),
}

impl Peer {
    /// The address that is the nearest to the caller of those that are known for sure.
    pub fn ip(&self) -> IpAddr {
        match self {
            Self::Address(address) | Self::Node { address: Some(address), .. } => address.ip(),
            Self::Node { address: None, .. } => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::Local(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Node { name, .. } => write!(f, "node {name}"),
            Self::Local(Some(address)) => write!(f, "local {address}"),
            Self::Local(None) => f.write_str("local"),
        }
    }
}

/// A caller's place among those that are served, for as long as its connection lasts, whatever it changes to.
pub struct Admission {
    /// Until somebody has authenticated: who has not gives way to newcomers.
    stranger: Mutex<Option<Place>>,
    evicted: CancellationToken,
    _permit: OwnedSemaphorePermit,
    _counted: Counted<Source>,
    /// On the thread that serves it, if it is one of the front end's own.
    load: Option<workers::Load>,
}

impl Admission {
    fn is_strangers(&self) -> bool {
        self.stranger.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn authenticated(&self) {
        drop(self.stranger.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// One accepted connection.
pub(super) struct Connection {
    pub front_end: Arc<FrontEnd>,
    pub peer: Peer,
    pub certificates: Certificates,
    /// Who the certificate was, by the files of which generation, and when.
    pub remembered: Mutex<Option<(u64, Instant, Authenticated)>>,
    /// Who the caller is whatever it presents, on the plain port.
    pub known: Option<Authenticated>,
    pub activity: Activity,
    pub admission: Admission,
    /// Cancelled once no more requests are taken.
    pub ending: CancellationToken,
    /// How often its requests were too many.
    pub limited: AtomicU32,
}

impl FrontEnd {
    /// Reads all files. `callers` owns the callers' connections, `background` those to API servers.
    pub fn load(
        config: &FrontEndConfig,
        cluster: Option<&Cluster>,
        proxy_urls: Option<Arc<ProxyUrls>>,
        metrics: Metrics,
        callers: &Tasks,
        background: &Tasks,
        draining: CancellationToken,
    ) -> anyhow::Result<(Arc<Self>, Writer)> {
        let (authn, mut files) = Authenticators::load(&config.authn, cluster)?;
        let (authz, more) = Authorizers::load(&config.authz)?;
        files.extend(more);
        let tls = tls::load(config.certificates.clone(), config.authn.asks_for_certificates())?;
        files.push(tls.clone());
        let (upstream, file) = Upstream::load(&config.upstream, background)?;
        files.push(file);
        let (audit, writer) = Audit::start(&config.audit, metrics.audit_lost.clone())?;
        let front_end = Arc::new(Self {
            tls,
            authn,
            authz,
            authorize_everything: config.authorize_everything,
            proxy_urls: proxy_urls.filter(|_| config.serve_proxy_urls),
            upstream: Arc::new(upstream),
            introduction: Introduction::new(config.upstream.identity.clone()),
            limits: Limits::new(&config.limits, metrics.front_end.limited.clone()),
            config: config.limits.clone(),
            audit,
            metrics,
            connections: callers.clone(),
            draining,
            home: OnceLock::new(),
            page: OnceLock::new(),
            permits: Arc::new(Semaphore::new(config.limits.max_connections)),
            handshakes: Places::new(HANDSHAKES),
            workers: Workers::start().context("no threads for the front end")?,
            files,
        });
        Ok((front_end, writer))
    }

    /// Follows the files and looks at the API servers, for ever.
    pub fn watch(self: &Arc<Self>, background: &Tasks) {
        background.spawn(follow(self.files.clone()));
        background.spawn(self.upstream.clone().watch_health());
    }

    /// Those of the threads that serve callers.
    pub fn runtimes(&self) -> Vec<tokio::runtime::Handle> {
        self.workers.runtimes()
    }

    /// Lets nodes call home, and hosts join, over this port.
    pub fn take_calls(&self, agent: &Arc<Agent>) {
        let _ = self.home.set(Arc::downgrade(agent));
    }

    pub(super) fn home(&self) -> Option<Arc<Agent>> {
        self.home.get().and_then(Weak::upgrade)
    }

    /// Serves the agent's page.
    pub fn serve_page(&self, agent: &Arc<Agent>) {
        let _ = self.page.set(Arc::downgrade(agent));
    }

    /// The agent whose page a path is of.
    pub(super) fn page(&self, path: &str) -> Option<Arc<Agent>> {
        page::on_front_end(path).and_then(|_| self.page.get()).and_then(Weak::upgrade)
    }

    /// When the certificates in use expire.
    pub fn expiries(&self) -> Vec<Expiry> {
        let serving = self.tls.get();
        let mut all: Vec<_> =
            serving.expiries.iter().map(|expiry| Expiry::Chain("front_end", expiry.clone())).collect();
        if let Some(ca) = self.authn.client_ca() {
            all.push(Expiry::Authorities("front_end_client_ca", ca.get().expiry.clone()));
        }
        all.extend(self.upstream.expiries());
        all
    }

    pub fn load_now(&self) -> Load {
        let (in_flight, queued, long_running) = self.limits.requests();
        let connections = self.config.max_connections.saturating_sub(self.permits.available_permits());
        Load { connections, in_flight, queued, long_running }
    }

    pub fn upstreams_now(&self) -> Vec<UpstreamStatus> {
        self.upstream.status()
    }

    /// How many API servers work, and how many there are.
    pub fn upstreams(&self) -> (usize, usize) {
        self.upstream.healthy()
    }

    /// Accepts callers for ever.
    pub async fn accept(self: Arc<Self>, listener: TcpListener) {
        loop {
            let (socket, peer) = match listener.accept().await {
                Ok((socket, peer)) => (socket, Peer::Address(peer)),
                Err(e) => {
                    accept_error(&e).await;
                    continue;
                }
            };
            // Whoever is refused here hears nothing: an answer would cost a handshake.
            let Ok(mut admission) = self.admit(&peer) else { continue };
            socket::tune_caller(&socket);
            let (socket, runtime, load) = match self.workers.take(socket) {
                Ok(taken) => taken,
                Err(error) => {
                    self.refused(&peer, &error);
                    continue;
                }
            };
            admission.load = Some(load);
            self.connections.spawn_on(self.clone().serve(socket, peer, admission), &runtime);
        }
    }

    /// A caller's place, or why there is none.
    pub fn admit(&self, peer: &Peer) -> Result<Admission, &'static str> {
        let Some(counted) = self.limits.connection(peer) else {
            return Err(self.turned_away(peer, "too many connections of this caller's address or node"));
        };
        let Ok(permit) = self.permits.clone().try_acquire_owned() else {
            self.limits.count("connections");
            return Err(self.turned_away(peer, "max_connections reached"));
        };
        let place = self.handshakes.take(peer.ip());
        let evicted = place.evicted.clone();
        Ok(Admission {
            stranger: Mutex::new(Some(place)),
            evicted,
            _permit: permit,
            _counted: counted,
            load: None,
        })
    }

    /// Serves one caller to its end, whatever its connection came over.
    pub async fn serve<S>(self: Arc<Self>, socket: S, peer: Peer, admission: Admission)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let acceptor = TlsAcceptor::from(self.tls.get().config.clone());
        let handshake = Box::pin(tokio::time::timeout(self.config.head_timeout, acceptor.accept(socket)));
        let tls = tokio::select! {
            handshake = handshake => match handshake {
                Ok(Ok(tls)) => tls,
                Ok(Err(error)) => return self.no_handshake(Handshake::Failed, &peer, &error),
                Err(_) => return self.no_handshake(Handshake::TimedOut, &peer, &"no TLS handshake in time"),
            },
            () = admission.evicted.cancelled() => {
                return self.no_handshake(Handshake::Evicted, &peer, &EVICTED);
            }
        };
        let session = &tls.get_ref().1;
        self.metrics.front_end.handshake(Handshake::Ok(session.protocol_version()));
        let http2 = session.alpn_protocol() == Some(b"h2");
        let certificates = session.peer_certificates().unwrap_or_default();
        let certificates = certificates.iter().map(|certificate| certificate.clone().into_owned());
        let certificates = Certificates::new(certificates.collect());
        let connection =
            Arc::new(Connection { certificates, ..Connection::new(self, peer, None, admission) });
        let socket = PatientWriter::new(tls, connection.front_end.config.idle_timeout);
        if http2 {
            let served = Box::pin(connection.clone().http2(socket));
            connection.unless_evicted(served).await;
        } else {
            connection.served_http1(socket).await;
        }
    }

    fn turned_away(&self, peer: &Peer, reason: &'static str) -> &'static str {
        self.refused(peer, &reason);
        reason
    }

    fn no_handshake(&self, why: Handshake, peer: &Peer, error: &dyn fmt::Display) {
        self.metrics.front_end.handshake(why);
        self.refused(peer, error);
    }

    pub(super) fn refused(&self, peer: &Peer, error: &dyn fmt::Display) {
        self.metrics.bad_requests.get_or_create(&crate::metrics::Door { front_door: DOOR }).inc();
        tracing::debug!(front_door = DOOR, %peer, %error, "refused a caller");
    }
}

impl Connection {
    pub fn new(
        front_end: Arc<FrontEnd>,
        peer: Peer,
        known: Option<Authenticated>,
        admission: Admission,
    ) -> Self {
        Self {
            front_end,
            peer,
            certificates: Certificates::default(),
            remembered: Mutex::default(),
            known,
            activity: Activity::default(),
            admission,
            ending: CancellationToken::new(),
            limited: AtomicU32::new(0),
        }
    }

    /// Serves HTTP/1.1 to the connection's end.
    pub async fn served_http1<S>(self: Arc<Self>, socket: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let served = Box::pin(self.clone().http1(socket));
        self.unless_evicted(served).await;
    }

    async fn unless_evicted(&self, served: impl Future<Output = hyper::Result<()>>) {
        tokio::select! {
            served = served => {
                if let Err(error) = served {
                    self.front_end.refused(&self.peer, &error);
                }
            }
            () = self.admission.evicted.cancelled() => self.front_end.refused(&self.peer, &EVICTED),
        }
    }

    /// Whether nobody has authenticated here.
    pub fn is_strangers(&self) -> bool {
        self.admission.is_strangers()
    }

    /// Somebody has authenticated.
    pub fn authenticated(&self, who: &Authenticated) {
        if !who.user.in_group(UNAUTHENTICATED) {
            self.admission.authenticated();
        }
    }

    async fn http1<S>(self: Arc<Self>, socket: S) -> hyper::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let FrontEnd { config, draining, .. } = self.front_end.as_ref();
        let socket = Watched::new(socket, self.activity.clone(), config.head_timeout);
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(config.idle_timeout)
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(socket), service_fn(|request| self.clone().answer(request)))
            .with_upgrades();
        tokio::pin!(connection);
        tokio::select! {
            served = connection.as_mut() => served,
            () = draining.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    }

    async fn http2<S>(self: Arc<Self>, socket: S) -> hyper::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let FrontEnd { config, draining, connections, .. } = self.front_end.as_ref();
        let streams = Streams {
            tasks: connections.clone(),
            patience: config.idle_timeout,
            ending: self.ending.clone(),
        };
        let connection = http2::Builder::new(streams)
            .timer(TokioTimer::new())
            .max_concurrent_streams(config.max_streams)
            .max_header_list_size(MAX_HEAD as u32)
            .max_pending_accept_reset_streams(MAX_RESETS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(20))
            .serve_connection(TokioIo::new(socket), service_fn(|request| self.clone().answer(request)));
        tokio::pin!(connection);
        tokio::select! {
            served = connection.as_mut() => return served,
            () = draining.cancelled() => {
                connection.as_mut().graceful_shutdown();
                return connection.await;
            }
            () = self.ending.cancelled() => {}
            () = self.activity.unused(config.head_timeout, config.idle_timeout) => {}
        }
        connection.as_mut().graceful_shutdown();
        tokio::time::timeout(LAST_REQUESTS, connection).await.unwrap_or(Ok(()))
    }

    /// Who the connection's certificate was a moment ago.
    pub fn remembered(&self, now: &Moment) -> Option<Authenticated> {
        let remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        let (generation, at, who) = remembered.as_ref()?;
        let good = *generation == self.front_end.authn.generation()
            && now.monotonic.saturating_duration_since(*at) < REMEMBERED
            && who.validity.expires.is_none_or(|end| now.wall < end);
        good.then(|| who.clone())
    }

    pub fn remember(&self, generation: u64, now: &Moment, who: &Authenticated) {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        *remembered = Some((generation, now.monotonic, who.clone()));
    }
}
