//! The front end: its files read, and what all of its callers share.

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
    tasks::Tasks,
};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{
    admission::Admission,
    audit::{Audit, Writer},
    config::FrontEndConfig,
    counters::FrontEndMetrics,
    headers::Introduction,
    limits::{Limits, LimitsConfig},
    page::Page,
    proxy_urls::ProxyUrls,
    tls,
    upstream::{Upstream, UpstreamStatus},
    workers::Workers,
};
use crate::{agent::Agent, metrics::Expiry, stream::metrics::StreamMetrics};

/// Connections at once on which nobody has authenticated.
const HANDSHAKES: usize = 1024;
pub const DOOR: &str = "front-end";

/// The front end, its files read.
pub struct FrontEnd {
    pub(super) tls: Arc<FileWatcher<tls::Serving>>,
    pub(super) authn: Authenticators,
    pub(super) authz: Authorizers,
    pub(super) authorize_everything: bool,
    /// `None` hands proxy URLs on.
    pub(super) proxy_urls: Option<Arc<dyn ProxyUrls>>,
    pub(super) upstream: Arc<Upstream>,
    pub(super) introduction: Introduction,
    pub(super) limits: Limits,
    pub(super) config: LimitsConfig,
    pub(super) audit: Audit,
    pub(super) metrics: Arc<FrontEndMetrics>,
    pub(super) streams: StreamMetrics,
    /// Callers and upgraded connections; drained at the end.
    pub(super) connections: Tasks,
    pub(super) draining: CancellationToken,
    /// Whose nodes may call home here, and whose hosts may join; `None` where neither is served.
    home: Option<Arc<Agent>>,
    /// `None` hands its paths on.
    page: Option<Arc<dyn Page>>,
    permits: Arc<Semaphore>,
    handshakes: HandshakePermits,
    pub(super) workers: Workers,
    files: Vec<Arc<dyn Watcher>>,
}

/// What the front end needs of the rest of the agent.
pub struct Parts<'a> {
    /// The cluster whose API is asked; `None` where none is configured.
    pub cluster: Option<&'a Cluster>,
    /// Serves proxy URLs, if the configuration wants them here.
    pub proxy_urls: Option<Arc<dyn ProxyUrls>>,
    /// The page, if the configuration wants it here.
    pub page: Arc<dyn Page>,
    /// Whose nodes may call home here.
    pub home: Option<Arc<Agent>>,
    pub streams: StreamMetrics,
    /// Set when connections are to end after the request that they are at.
    pub draining: CancellationToken,
}

/// How many there are at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    pub connections: usize,
    pub in_flight: usize,
    pub queued: usize,
    pub long_running: usize,
}

impl FrontEnd {
    /// Reads all files. `callers` owns the callers' connections, `background` those to API servers.
    pub fn load(
        config: &FrontEndConfig,
        parts: Parts<'_>,
        callers: &Tasks,
        background: &Tasks,
    ) -> anyhow::Result<(Arc<Self>, Writer)> {
        let Parts { cluster, proxy_urls, page, home, streams, draining } = parts;
        let metrics = Arc::<FrontEndMetrics>::default();
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
            limits: Limits::new(&config.limits, metrics.limited.clone()),
            config: config.limits.clone(),
            audit,
            metrics,
            streams,
            connections: callers.clone(),
            draining,
            home,
            page: config.serve_page.then_some(page),
            permits: Arc::new(Semaphore::new(config.limits.max_connections)),
            handshakes: HandshakePermits::new(HANDSHAKES),
            workers: Workers::start().context("no threads for the front end")?,
            files,
        });
        Ok((front_end, writer))
    }

    /// Follows the files and looks at the API servers, for ever.
    pub fn watch(self: &Arc<Self>, background: &Tasks) {
        background.spawn(watch(self.files.clone()));
        background.spawn(self.upstream.clone().watch_health());
    }

    /// Those of the threads that serve callers.
    pub fn runtimes(&self) -> Vec<tokio::runtime::Handle> {
        self.workers.runtimes()
    }

    /// The agent whose nodes may call home here.
    pub(super) fn home(&self) -> Option<Arc<Agent>> {
        self.home.clone()
    }

    /// The page, where it serves a path.
    pub(super) fn page(&self, path: &str) -> Option<&Arc<dyn Page>> {
        self.page.as_ref().filter(|page| page.serves(path))
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

    /// A caller's place, or why there is none.
    pub fn admit(&self, peer: &Peer) -> Result<Admission, &'static str> {
        let Some(counted) = self.limits.connection(peer) else {
            return Err(self.turned_away(peer, "too many connections of this caller's address or node"));
        };
        let Ok(permit) = self.permits.clone().try_acquire_owned() else {
            self.limits.count("connections");
            return Err(self.turned_away(peer, "max_connections reached"));
        };
        Ok(Admission::new(self.handshakes.take(peer.ip()), permit, counted))
    }

    fn turned_away(&self, peer: &Peer, reason: &'static str) -> &'static str {
        self.refused(peer, &reason);
        reason
    }

    pub(super) fn refused(&self, peer: &Peer, error: &dyn fmt::Display) {
        self.streams.bad_request(DOOR);
        tracing::debug!(egress = DOOR, %peer, %error, "refused a caller");
    }
}
