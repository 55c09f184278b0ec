//! The listener and its connections.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::io::{admin::accept_error, handshake::Places, socket, tasks::Tasks};
use rustls::{ServerConfig, pki_types::CertificateDer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;

use super::{
    audit::{Audit, Writer},
    authn::{Authenticated, Authenticators, Moment},
    authz::Authorizers,
    config::FrontEndConfig,
    limits::{Counted, Limits, LimitsConfig},
    reloaded::{Follow, Reloaded, follow},
    tls,
    upstream::Upstream,
};
use crate::{
    front_door::proxy_url::ProxyUrls,
    http::{
        Executor,
        watched::{Activity, PatientWriter, Watched},
    },
    metrics::Metrics,
};

/// TLS handshakes at once.
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

/// The front end, its files read.
pub struct FrontEnd {
    tls: Arc<Reloaded<Arc<ServerConfig>>>,
    pub(super) authn: Authenticators,
    pub(super) authz: Authorizers,
    pub(super) authorize_everything: bool,
    /// `None` hands proxy URLs on.
    pub(super) proxy_urls: Option<Arc<ProxyUrls>>,
    pub(super) upstream: Arc<Upstream>,
    pub(super) limits: Limits,
    pub(super) config: LimitsConfig,
    pub(super) audit: Audit,
    pub(super) metrics: Metrics,
    /// Callers and upgraded connections; drained at the end.
    pub(super) connections: Tasks,
    draining: CancellationToken,
    files: Vec<Arc<dyn Follow>>,
}

/// One accepted connection.
pub(super) struct Connection {
    pub front_end: Arc<FrontEnd>,
    pub peer: SocketAddr,
    /// The caller's certificate and those that came with it.
    pub certificates: Vec<CertificateDer<'static>>,
    /// Who the certificate was, by the files of which generation, and when.
    pub remembered: Mutex<Option<(u64, Instant, Authenticated)>>,
    pub activity: Activity,
}

impl FrontEnd {
    /// Reads all files. `callers` owns the callers' connections, `background` those to API servers.
    pub fn load(
        config: &FrontEndConfig,
        cluster: Option<&kube::Client>,
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
            limits: Limits::new(&config.limits),
            config: config.limits.clone(),
            audit,
            metrics,
            connections: callers.clone(),
            draining,
            files,
        });
        Ok((front_end, writer))
    }

    /// Follows the files and looks at the API servers, for ever.
    pub fn watch(self: &Arc<Self>, background: &Tasks) {
        background.spawn(follow(self.files.clone()));
        background.spawn(self.upstream.clone().watch_health());
    }

    /// How many API servers work, and how many there are.
    pub fn upstreams(&self) -> (usize, usize) {
        self.upstream.healthy()
    }

    /// Accepts callers for ever.
    pub async fn accept(self: Arc<Self>, listener: TcpListener) {
        let permits = Arc::new(Semaphore::new(self.config.max_connections));
        let handshakes = Places::new(HANDSHAKES);
        loop {
            let (socket, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(e) => {
                    accept_error(&e).await;
                    continue;
                }
            };
            // Whoever is refused here hears nothing: an answer would cost a handshake.
            let Some(counted) = self.limits.connection(peer.ip()) else {
                self.refused(peer, &"this address has too many connections");
                continue;
            };
            let Ok(permit) = permits.clone().try_acquire_owned() else {
                self.refused(peer, &"max_connections reached");
                continue;
            };
            socket::tune_caller(&socket);
            let place = handshakes.take(peer.ip());
            let front_end = self.clone();
            self.connections.spawn(async move {
                let acceptor = TlsAcceptor::from(front_end.tls.get().as_ref().clone());
                let handshake =
                    Box::pin(tokio::time::timeout(front_end.config.head_timeout, acceptor.accept(socket)));
                let tls = tokio::select! {
                    handshake = handshake => match handshake {
                        Ok(Ok(tls)) => tls,
                        Ok(Err(error)) => return front_end.refused(peer, &error),
                        Err(_) => return front_end.refused(peer, &"no TLS handshake in time"),
                    },
                    () = place.evicted.cancelled() => {
                        return front_end.refused(peer, &"gave its place to a newer handshake");
                    }
                };
                drop(place);
                front_end.serve(tls, peer, permit, counted).await;
            });
        }
    }

    async fn serve(
        self: Arc<Self>,
        tls: TlsStream<TcpStream>,
        peer: SocketAddr,
        _permit: OwnedSemaphorePermit,
        _counted: Counted<std::net::IpAddr>,
    ) {
        let session = &tls.get_ref().1;
        let http2 = session.alpn_protocol() == Some(b"h2");
        let certificates = session.peer_certificates().unwrap_or_default();
        let certificates = certificates.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let connection = Arc::new(Connection {
            peer,
            certificates,
            remembered: Mutex::default(),
            activity: Activity::default(),
            front_end: self,
        });
        let socket = PatientWriter::new(tls, connection.front_end.config.idle_timeout);
        let served = if http2 {
            Box::pin(connection.clone().http2(socket)).await
        } else {
            Box::pin(connection.clone().http1(socket)).await
        };
        if let Err(error) = served {
            connection.front_end.refused(peer, &error);
        }
    }

    pub(super) fn refused(&self, peer: SocketAddr, error: &dyn std::fmt::Display) {
        self.metrics.bad_requests.get_or_create(&crate::metrics::Door { front_door: DOOR }).inc();
        tracing::debug!(front_door = DOOR, %peer, %error, "refused a caller");
    }
}

impl Connection {
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
        let connection = http2::Builder::new(Executor(connections.clone()))
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
            () = self.activity.unused(config.head_timeout, config.idle_timeout) => {}
        }
        connection.as_mut().graceful_shutdown();
        tokio::time::timeout(LAST_REQUESTS, connection).await.unwrap_or(Ok(()))
    }

    /// Who the connection's certificate was a moment ago.
    pub fn remembered(&self, now: &Moment) -> Option<Authenticated> {
        let remembered = self.remembered.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (generation, at, who) = remembered.as_ref()?;
        let good = *generation == self.front_end.authn.generation()
            && now.monotonic.saturating_duration_since(*at) < REMEMBERED
            && who.expires.is_none_or(|end| now.wall < end);
        good.then(|| who.clone())
    }

    pub fn remember(&self, generation: u64, now: &Moment, who: &Authenticated) {
        let mut remembered = self.remembered.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *remembered = Some((generation, now.monotonic, who.clone()));
    }
}
