//! The state of the front end that all connections share: its files, its limits and the services that answer requests.

use std::{fmt, sync::Arc};

use access::{
    authn::{Authenticators, cluster::Cluster},
    authz::Authorizers,
    peer::Peer,
};
use anyhow::Context;
use proto_net::{
    file_watcher::{FileWatcher, Watcher, watch},
    handshake::HandshakePermits,
    log_throttle::LogThrottle,
    tasks::Tasks,
};
use tokio::sync::Semaphore;

use super::{
    admission::Admission,
    audit::{Audit, Writer},
    call_home::CallHomeServices,
    config::FrontEndConfig,
    counters::FrontEndMetrics,
    headers::IdentityForwarder,
    limits::{Limits, LimitsConfig},
    page::Page,
    proxy_urls::ProxyUrls,
    tls,
    upstream::{BodyLimits, Upstream, UpstreamStatus},
    workers::Workers,
};
use crate::{http::generations::Generations, metrics::Expiry, stream::metrics::StreamMetrics};

/// The maximum number of concurrent connections on which nobody has authenticated.
const MAX_UNAUTHENTICATED: usize = 1024;
/// The number of log lines in ten seconds about credentials that are used for another node than their own.
const OTHER_NODE_LINES: u32 = 10;
/// The name of the front end in records and metrics of streams.
pub(super) const LISTENER: &str = "front-end";

/// The front end, with its files read.
pub struct FrontEnd {
    pub(super) tls: Arc<FileWatcher<tls::Serving>>,
    pub(super) authn: Authenticators,
    pub(super) authz: Authorizers,
    pub(super) authorize_everything: bool,
    /// The service that answers proxy URLs. With `None`, kube-apiserver answers them.
    pub(super) proxy_urls: Option<Arc<dyn ProxyUrls>>,
    pub(super) upstream: Arc<Upstream>,
    pub(super) identity: IdentityForwarder,
    pub(super) limits: Limits,
    pub(super) config: LimitsConfig,
    pub(super) audit: Audit,
    pub(super) metrics: Arc<FrontEndMetrics>,
    pub(super) streams: StreamMetrics,
    /// The group that owns callers' connections, including upgraded ones.
    pub(super) connections: Tasks,
    pub(super) generations: Generations,
    /// The services of nodes that call home and hosts that join. With `None`, the front end serves neither.
    call_home: Option<CallHomeServices>,
    /// The agent's page. With `None`, its paths go to kube-apiserver.
    page: Option<Arc<dyn Page>>,
    permits: Arc<Semaphore>,
    unauthenticated: HandshakePermits,
    /// Bounds the log lines about credentials that are used for another node than their own.
    pub(super) other_nodes: LogThrottle,
    pub(super) workers: Workers,
    files: Vec<Arc<dyn Watcher>>,
}

/// The services of other parts of the agent that the front end uses.
pub struct Dependencies<'a> {
    /// The cluster whose API is asked, if one is configured.
    pub cluster: Option<&'a Cluster>,
    /// The service of proxy URLs, which is used if the configuration enables it.
    pub proxy_urls: Option<Arc<dyn ProxyUrls>>,
    /// The agent's page, which is used if the configuration enables it.
    pub page: Arc<dyn Page>,
    /// The services of calls home, if the configuration enables them.
    pub call_home: Option<CallHomeServices>,
    pub streams: StreamMetrics,
    pub generations: Generations,
}

/// Why a connection is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    #[error("too many connections of this caller's address or node")]
    TooManyOfSource,
    #[error("max_connections reached")]
    TooMany,
}

/// The present load of the front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    pub connections: usize,
    pub in_flight: usize,
    pub queued: usize,
    pub long_running: usize,
}

impl FrontEnd {
    /// Reads all files. The group `callers` owns the connections of callers, and `background` those to API servers.
    pub fn load(
        config: &FrontEndConfig,
        dependencies: Dependencies<'_>,
        callers: &Tasks,
        background: &Tasks,
    ) -> anyhow::Result<(Arc<Self>, Writer)> {
        let Dependencies { cluster, proxy_urls, page, call_home, streams, generations } = dependencies;
        let metrics = Arc::<FrontEndMetrics>::default();
        let (authn, mut files) = Authenticators::load(&config.authn, cluster, background)?;
        let (authz, more) = Authorizers::load(&config.authz)?;
        files.extend(more);
        let tls = tls::load(config.certificates.clone(), config.authn.asks_for_certificates())?;
        files.push(tls.clone());
        let (upstream, file) = Upstream::load(&config.upstream, background)?;
        files.push(file);
        let lost = metrics.audit_lost.clone();
        let (audit, writer) = Audit::start(&config.audit, config.limits.max_long_running, lost)?;
        let front_end = Arc::new(Self {
            tls,
            authn,
            authz,
            authorize_everything: config.authorize_everything,
            proxy_urls: proxy_urls.filter(|_| config.serve_proxy_urls),
            upstream: Arc::new(upstream),
            identity: IdentityForwarder::new(config.upstream.identity.clone()),
            limits: Limits::new(&config.limits, metrics.limited.clone()),
            config: config.limits.clone(),
            audit,
            metrics,
            streams,
            connections: callers.clone(),
            generations,
            call_home,
            page: config.serve_page.then_some(page),
            permits: Arc::new(Semaphore::new(config.limits.max_connections)),
            unauthenticated: HandshakePermits::new(MAX_UNAUTHENTICATED),
            other_nodes: LogThrottle::with_burst(OTHER_NODE_LINES),
            workers: Workers::start().context("no threads for the front end")?,
            files,
        });
        Ok((front_end, writer))
    }

    /// Follows the files and checks the API servers for as long as `background` runs.
    pub fn watch(self: &Arc<Self>, background: &Tasks) {
        background.spawn(watch(self.files.clone()));
        background.spawn(self.upstream.clone().watch_health());
    }

    /// Returns the runtimes of the worker threads.
    pub fn runtimes(&self) -> Vec<tokio::runtime::Handle> {
        self.workers.runtimes()
    }

    /// Returns the services of calls home, if the front end serves them.
    pub(super) fn call_home(&self) -> Option<&CallHomeServices> {
        self.call_home.as_ref()
    }

    /// Returns the page, if it is enabled and serves this path.
    pub(super) fn page(&self, path: &str) -> Option<&Arc<dyn Page>> {
        self.page.as_ref().filter(|page| page.serves(path))
    }

    /// Returns the limits on the bodies of requests.
    pub(super) fn body_limits(&self) -> BodyLimits {
        BodyLimits { max_bytes: self.config.max_body, stall_timeout: self.config.body_timeout }
    }

    /// Returns when the certificates in use expire.
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

    /// Returns the number of healthy API servers, and the number of all.
    pub fn upstreams(&self) -> (usize, usize) {
        self.upstream.healthy()
    }

    /// Admits a caller's connection. A connection that is not admitted is counted.
    pub fn admit(&self, peer: &Peer) -> Result<Admission, NotAdmitted> {
        let counted = self.limits.connection(peer).ok_or(NotAdmitted::TooManyOfSource);
        let admitted = counted.and_then(|counted| {
            let permit = self.permits.clone().try_acquire_owned().map_err(|_| {
                self.limits.count("connections");
                NotAdmitted::TooMany
            })?;
            Ok(Admission::new(self.unauthenticated.take(peer.ip()), permit, counted))
        });
        admitted.inspect_err(|reason| self.refused(peer, reason))
    }

    /// Counts and logs a connection that failed or was not admitted.
    pub(super) fn refused(&self, peer: &Peer, error: &dyn fmt::Display) {
        self.streams.bad_request(LISTENER);
        tracing::debug!(egress = LISTENER, %peer, %error, "caller refused");
    }
}
