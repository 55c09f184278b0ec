//! Composes the egress listeners. Their sockets are bound and their files are read before any of them serves.

use std::{sync::Arc, time::Duration};

use proto_net::{
    dialer::Dialer,
    listeners::{Listeners, Pausable, Stage},
    tasks::Tasks,
};
use tokio::net::{TcpListener, UnixListener};

use super::bind;
use crate::{
    config::Config,
    directory::Directory,
    egress::{
        accept,
        certificates::EgressCertificates,
        config::{HttpConnectConfig, KonnectivityConfig, ProxyUrlsConfig, Socks5Config},
        http_connect::HttpConnect,
        konnectivity::Konnectivity,
        outbound::{CallerLimits, Outbound},
        proxy_urls::{call::ProxyUrls, tls::TargetTls},
        socks5::{Socks5, users::Users},
        tls::{CallerTls, TlsListener},
    },
    fields::{TlsConfig, UnixConfig},
    http::{claims::Claims, generations::Generations},
    stream::metrics::StreamMetrics,
};

type TlsSocket = (Tcp, Arc<CallerTls>);
type Tcp = Pausable<TcpListener>;
type Unix = Pausable<UnixListener>;

/// The sockets of all egress listeners.
pub(super) struct EgressSockets {
    connect_unix: Option<Unix>,
    connect_tls: Option<TlsSocket>,
    konnectivity_unix: Option<Unix>,
    konnectivity_tls: Option<TlsSocket>,
    socks5: Option<Socks5Sockets>,
    proxy_urls: Option<ProxyUrlSockets>,
}

struct Socks5Sockets {
    unix: Option<Unix>,
    tcp: Option<(Tcp, Option<Users>)>,
}

struct ProxyUrlSockets {
    unix: Option<Unix>,
    tcp: Option<Tcp>,
    tls: Arc<TargetTls>,
}

impl EgressSockets {
    pub(super) fn bind(config: &Config, listeners: &mut Listeners) -> anyhow::Result<Self> {
        let Config { http_connect, konnectivity, .. } = config;
        let mut unix = |config: &Option<UnixConfig>| {
            config.as_ref().map(|unix| bind::unix(listeners, unix, Stage::Callers)).transpose()
        };
        let (connect_unix, konnectivity_unix) = (unix(&http_connect.unix)?, unix(&konnectivity.unix)?);
        let mut tls = |listener, config: &Option<TlsConfig>| bind_tls(listeners, listener, config.as_ref());
        let connect_tls = tls(TlsListener::HttpConnect, &http_connect.tls)?;
        let konnectivity_tls = tls(TlsListener::Konnectivity, &konnectivity.tls)?;
        let socks5 = config.socks5.as_ref().map(|socks5| Socks5Sockets::bind(socks5, listeners));
        let urls = config.proxy_urls.as_ref().map(|urls| ProxyUrlSockets::bind(urls, listeners));
        Ok(Self {
            connect_unix,
            connect_tls,
            konnectivity_unix,
            konnectivity_tls,
            socks5: socks5.transpose()?,
            proxy_urls: urls.transpose()?,
        })
    }

    /// Returns the certificates of all listeners, which follow their files once their watchers are polled.
    pub(super) fn certificates(&self) -> EgressCertificates {
        let callers = [&self.connect_tls, &self.konnectivity_tls].into_iter().flatten();
        EgressCertificates {
            callers: callers.map(|(_, tls)| tls.clone()).collect(),
            targets: self.proxy_urls.as_ref().map(|sockets| sockets.tls.clone()),
        }
    }
}

impl Socks5Sockets {
    fn bind(config: &Socks5Config, listeners: &mut Listeners) -> anyhow::Result<Self> {
        let unix = config.unix.as_ref().map(|unix| bind::unix(listeners, unix, Stage::Callers));
        Ok(Self {
            unix: unix.transpose()?,
            tcp: match &config.tcp {
                Some(tcp) => {
                    let users = tcp.users_file.as_deref().map(Users::load).transpose()?;
                    Some((bind::tcp(listeners, tcp.listen, Stage::Callers)?, users))
                }
                None => None,
            },
        })
    }
}

impl ProxyUrlSockets {
    fn bind(config: &ProxyUrlsConfig, listeners: &mut Listeners) -> anyhow::Result<Self> {
        let unix = config.unix.as_ref().map(|unix| bind::unix(listeners, unix, Stage::Callers));
        Ok(Self {
            unix: unix.transpose()?,
            tcp: config.tcp.map(|tcp| bind::tcp(listeners, tcp, Stage::Callers)).transpose()?,
            tls: Arc::new(TargetTls::load(config)?),
        })
    }
}

fn bind_tls(
    listeners: &mut Listeners,
    listener: TlsListener,
    config: Option<&TlsConfig>,
) -> anyhow::Result<Option<TlsSocket>> {
    let Some(config) = config else { return Ok(None) };
    let tls = Arc::new(CallerTls::load(listener, config)?);
    Ok(Some((bind::tcp(listeners, config.listen, Stage::Callers)?, tls)))
}

/// The parts from which all egress listeners are built.
pub(super) struct Egress<'a> {
    pub(super) dialer: Arc<dyn Dialer>,
    pub(super) directory: Arc<dyn Directory>,
    pub(super) metrics: &'a StreamMetrics,
    pub(super) generations: &'a Generations,
    /// The group that owns callers and their streams.
    pub(super) callers: &'a Tasks,
    /// The group that owns the accept loops.
    pub(super) listeners: &'a Tasks,
}

impl Egress<'_> {
    /// Serves on all sockets. Returns the listener of proxy URLs, which the front end may use as well.
    pub(super) fn serve(&self, sockets: EgressSockets, config: &Config) -> Option<Arc<ProxyUrls>> {
        let EgressSockets {
            connect_unix,
            connect_tls,
            konnectivity_unix,
            konnectivity_tls,
            socks5,
            proxy_urls,
        } = sockets;
        self.serve_http_connect(connect_unix, connect_tls, &config.http_connect);
        self.serve_konnectivity(konnectivity_unix, konnectivity_tls, &config.konnectivity);
        if let (Some(sockets), Some(config)) = (socks5, &config.socks5) {
            self.serve_socks5(sockets, config);
        }
        let claims = config.front_end.as_ref().map(|config| config.upstream.identity.claims());
        let claims = Arc::new(claims.unwrap_or_default());
        let (sockets, config) = proxy_urls.zip(config.proxy_urls.as_ref())?;
        Some(self.serve_proxy_urls(sockets, config, claims))
    }

    fn serve_http_connect(&self, unix: Option<Unix>, tls: Option<TlsSocket>, config: &HttpConnectConfig) {
        let listener = Arc::new(HttpConnect(self.outbound(CallerLimits {
            head_timeout: config.head_timeout,
            half_closed_timeout: config.half_closed_timeout,
            max_connections: config.max_connections,
        })));
        if let Some(socket) = unix {
            self.spawn(accept::plain(listener.clone(), "connect-unix", socket));
        }
        if let Some((socket, tls)) = tls {
            self.spawn(accept::tls(listener, "connect-tls", socket, tls));
        }
    }

    fn serve_konnectivity(&self, unix: Option<Unix>, tls: Option<TlsSocket>, config: &KonnectivityConfig) {
        let outbound = self.outbound(CallerLimits {
            head_timeout: config.head_timeout,
            // A Konnectivity connection has no half-closed state.
            half_closed_timeout: Duration::ZERO,
            max_connections: config.max_connections,
        });
        let (generations, max_dials) = (self.generations.clone(), config.max_dials);
        let listener = Arc::new(Konnectivity { outbound, generations, max_dials });
        if let Some(socket) = unix {
            self.spawn(accept::plain(listener.clone(), "konnectivity-unix", socket));
        }
        if let Some((socket, tls)) = tls {
            self.spawn(accept::tls(listener, "konnectivity-tls", socket, tls));
        }
    }

    fn serve_socks5(&self, sockets: Socks5Sockets, config: &Socks5Config) {
        let outbound = self.outbound(CallerLimits {
            head_timeout: config.head_timeout,
            half_closed_timeout: config.half_closed_timeout,
            max_connections: config.max_connections,
        });
        if let Some(socket) = sockets.unix {
            let listener = Arc::new(Socks5::new(outbound.clone(), None));
            self.spawn(accept::plain(listener, "socks5-unix", socket));
        }
        if let Some((socket, users)) = sockets.tcp {
            self.spawn(accept::plain(Arc::new(Socks5::new(outbound, users)), "socks5-tcp", socket));
        }
    }

    fn serve_proxy_urls(
        &self,
        sockets: ProxyUrlSockets,
        config: &ProxyUrlsConfig,
        claims: Arc<Claims>,
    ) -> Arc<ProxyUrls> {
        let listener = Arc::new(ProxyUrls {
            outbound: self.outbound(CallerLimits {
                head_timeout: config.head_timeout,
                half_closed_timeout: config.half_closed_timeout,
                max_connections: config.max_connections,
            }),
            directory: self.directory.clone(),
            tls: sockets.tls,
            claims,
            idle_timeout: config.idle_timeout,
            generations: self.generations.clone(),
        });
        if let Some(socket) = sockets.unix {
            self.spawn(accept::plain(listener.clone(), "proxy-url-unix", socket));
        }
        if let Some(socket) = sockets.tcp {
            self.spawn(accept::plain(listener.clone(), "proxy-url-tcp", socket));
        }
        listener
    }

    fn outbound(&self, limits: CallerLimits) -> Outbound {
        Outbound {
            dialer: self.dialer.clone(),
            metrics: self.metrics.clone(),
            limits,
            tasks: self.callers.clone(),
        }
    }

    fn spawn(&self, accepting: impl Future<Output = ()> + Send + 'static) {
        self.listeners.spawn(accepting);
    }
}
