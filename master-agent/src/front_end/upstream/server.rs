//! One API server: connections to it, and whether it works.

use std::{
    io,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt, Limited};
use hyper::{
    Request, Uri,
    client::conn::{http1, http2},
    header::HeaderValue,
    http::uri::{Authority, PathAndQuery},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::{
    Host, Target,
    io::{socket, tasks::Tasks},
};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::Instant,
};
use tokio_rustls::TlsConnector;

use super::{
    RequestBody, UpstreamConfig, UpstreamStatus,
    connection::{Connection, Driver, Http1, Made, Sender, causes},
    pool::{MAX_STREAMS, Pool},
};
use crate::{
    front_end::{
        https_client::ClientTls,
        reloaded::{Follow, Reloaded},
    },
    http::Executor,
    metrics::{Expiry, X509Expiry},
};

const MAX_HEADERS: usize = 256;
const MAX_HEAD: usize = 1024 * 1024;
const STREAM_WINDOW: u32 = 1024 * 1024;
/// As much as all streams may take, so that one that is not read does not hold up the others.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS as u32;
/// Checks that fail in a row before a server is not asked any more.
const FAILURES: usize = 2;
/// Bytes of an answer to a check that are read, to keep its connection.
const MAX_HEALTH: usize = 64 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    /// HTTP/2 where that is asked for and the server speaks it.
    Any,
}

/// TLS by what a connection may speak.
pub struct ServerTls {
    any: Arc<ClientConfig>,
    http1: Arc<ClientConfig>,
    expiries: Vec<Expiry>,
}

impl ServerTls {
    pub fn read(tls: &ClientTls, http2: bool) -> anyhow::Result<Self> {
        let mut config = tls.config()?;
        let mut expiries = Vec::new();
        if let Some((cert, _)) = &tls.identity {
            expiries.push(Expiry::Chain("upstream_client", X509Expiry::read(cert)?));
        }
        if let Some(ca) = &tls.ca {
            expiries.push(Expiry::Authorities("upstream_ca", X509Expiry::read(ca)?));
        }
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let http1 = Arc::new(config.clone());
        if http2 {
            config.alpn_protocols.insert(0, b"h2".to_vec());
        }
        Ok(Self { any: Arc::new(config), http1, expiries })
    }
}

pub struct Server {
    /// For people.
    name: String,
    authority: Authority,
    host_header: Option<HeaderValue>,
    host: String,
    port: u16,
    tls: Arc<Reloaded<ServerTls>>,
    /// `None` is plain HTTP.
    tls_name: Option<ServerName<'static>>,
    /// The server is taken to speak HTTP/2.
    multiplexes: AtomicBool,
    /// Of those who make a connection for many.
    turn: tokio::sync::Mutex<()>,
    pool: Pool,
    health: PathAndQuery,
    timeout: Duration,
    failures: AtomicUsize,
    /// Since the start.
    failures_counted: AtomicU64,
    down: AtomicBool,
    connections: Tasks,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{0}: max_connections are in use")]
    Full(String),
    /// Which says nothing of the server.
    #[error("{0}: no connection can be made from here: {1}")]
    Here(String, io::Error),
    #[error("{0}: {1}")]
    Server(String, io::Error),
}

impl Server {
    pub fn new(
        uri: &Uri,
        config: &UpstreamConfig,
        tls: Arc<Reloaded<ServerTls>>,
        connections: Tasks,
    ) -> anyhow::Result<Self> {
        let authority = uri.authority().cloned().context("an upstream needs a host")?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let (tls_name, default_port) = match uri.scheme_str() {
            Some("https") => (Some(ServerName::try_from(host.clone())?), 443),
            Some("http") if is_loopback(&host) => (None, 80),
            _ => bail!("{uri}: an upstream is https://, or http:// on loopback"),
        };
        Ok(Self {
            name: uri.to_string(),
            port: authority.port_u16().unwrap_or(default_port),
            host_header: HeaderValue::try_from(authority.as_str()).ok(),
            authority,
            host,
            multiplexes: AtomicBool::new(config.http2 && tls_name.is_some()),
            tls,
            tls_name,
            turn: tokio::sync::Mutex::default(),
            pool: Pool::new(config),
            health: config.health_path.parse()?,
            timeout: config.connect_timeout,
            failures: AtomicUsize::new(0),
            failures_counted: AtomicU64::new(0),
            down: AtomicBool::new(false),
            connections,
        })
    }

    pub fn is_healthy(&self) -> bool {
        !self.down.load(Ordering::Relaxed)
    }

    pub fn status(&self) -> UpstreamStatus {
        UpstreamStatus {
            server: Target::new(
                self.host.parse().map_or_else(|_| Host::Name(self.host.clone()), Host::Addr),
                self.port,
            )
            .to_string(),
            healthy: self.is_healthy(),
            failures: self.failures_counted.load(Ordering::Relaxed),
        }
    }

    /// When the certificates in use expire.
    pub fn expiries(&self) -> Vec<Expiry> {
        self.tls.get().expiries.clone()
    }

    pub(super) fn authority(&self) -> &Authority {
        &self.authority
    }

    pub(super) fn host_header(&self) -> Option<HeaderValue> {
        self.host_header.clone()
    }

    /// There is no connection, for this reason.
    pub fn unconnected(&self, error: &ConnectError) {
        match error {
            ConnectError::Server(_, error) => self.failed(error),
            ConnectError::Full(_) | ConnectError::Here(..) => {}
        }
    }

    /// It does not work.
    pub fn failed(&self, error: &dyn std::fmt::Display) {
        self.failures_counted.fetch_add(1, Ordering::Relaxed);
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if failures >= FAILURES && !self.down.swap(true, Ordering::Relaxed) {
            tracing::warn!(server = self.name, %error, "an API server does not work");
        }
    }

    fn works(&self) {
        self.failures.store(0, Ordering::Relaxed);
        if self.down.swap(false, Ordering::Relaxed) {
            tracing::info!(server = self.name, "an API server works again");
        }
    }

    /// Asks whether it works. An answer that is no `5xx` says so, whoever may see the path.
    pub async fn check(self: &Arc<Self>) {
        self.pool.sweep(self.tls.generation());
        match tokio::time::timeout(self.timeout, self.ask()).await {
            Ok(Ok(())) => self.works(),
            Ok(Err(error)) => self.unconnected(&error),
            Err(_) => self.failed(&"no answer in time"),
        }
    }

    async fn ask(self: &Arc<Self>) -> Result<(), ConnectError> {
        let failed = |error| ConnectError::Server(self.name.clone(), io::Error::other(error));
        loop {
            let connection = self.connection(Protocol::Any).await?;
            let kept = connection.kept;
            let mut request = Request::new(RequestBody::empty());
            *request.uri_mut() = Uri::from(self.health.clone());
            let response = match connection.send(request).await {
                Ok(response) => response,
                // The server may have ended it meanwhile.
                Err(_) if kept => continue,
                Err((error, _)) => return Err(failed(causes(&error))),
            };
            let status = response.status();
            let _ = Limited::new(response.into_body(), MAX_HEALTH).collect().await;
            if status.is_server_error() {
                return Err(failed(format!("{} answers {status}", self.health)));
            }
            return Ok(());
        }
    }

    /// A kept connection, or a new one.
    pub async fn connection(self: &Arc<Self>, protocol: Protocol) -> Result<Connection, ConnectError> {
        let connection = |kept, sender| Connection { kept, server: self.clone(), sender };
        let kept = || match protocol {
            Protocol::Any => self.pool.take(self.tls.generation()),
            Protocol::Http1 => None,
        };
        if let Some(sender) = kept() {
            return Ok(connection(true, sender));
        }
        let connecting = async {
            // Who comes while a connection for many is made waits for it.
            let shares = protocol == Protocol::Any && self.multiplexes.load(Ordering::Relaxed);
            let _turn = if shares { Some(self.turn.lock().await) } else { None };
            if let Some(sender) = kept().filter(|_| shares) {
                return Ok(connection(true, sender));
            }
            let permit = self.pool.permit().ok_or_else(|| ConnectError::Full(self.name.clone()))?;
            let sender = self.connect(protocol, permit).await.map_err(|error| {
                let reason = if is_ours(&error) { ConnectError::Here } else { ConnectError::Server };
                reason(self.name.clone(), error)
            })?;
            Ok(connection(false, sender))
        };
        tokio::time::timeout(self.timeout, connecting).await.unwrap_or_else(|_| {
            let late = io::Error::new(io::ErrorKind::TimedOut, "no connection in time");
            Err(ConnectError::Server(self.name.clone(), late))
        })
    }

    pub(super) fn keep(&self, connection: Http1) {
        self.pool.put(connection, self.tls.generation());
    }

    async fn connect(&self, protocol: Protocol, permit: OwnedSemaphorePermit) -> io::Result<Sender> {
        let socket = TcpStream::connect((self.host.as_str(), self.port)).await?;
        socket::tune(&socket);
        // In this order: files that change in between make it one of the old ones.
        let made = Made { generation: self.tls.generation(), at: Instant::now() };
        let Some(name) = &self.tls_name else { return http1(socket, made, permit).await };
        let tls = self.tls.get();
        let config = match protocol {
            Protocol::Any => tls.any.clone(),
            Protocol::Http1 => tls.http1.clone(),
        };
        let tls = TlsConnector::from(config).connect(name.clone(), socket).await?;
        let http2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
        if protocol == Protocol::Any {
            self.multiplexes.store(http2, Ordering::Relaxed);
        }
        if http2 { self.http2(tls, made, permit).await } else { http1(tls, made, permit).await }
    }

    async fn http2<S>(&self, socket: S, made: Made, permit: OwnedSemaphorePermit) -> io::Result<Sender>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = http2::Builder::new(Executor(self.connections.clone()))
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(15))
            .handshake(TokioIo::new(socket))
            .await
            .map_err(io::Error::other)?;
        self.connections.spawn(async move {
            let _permit = permit;
            if let Err(error) = connection.await {
                tracing::debug!(error = causes(&error), "a connection to an API server failed");
            }
        });
        sender.ready().await.map_err(io::Error::other)?;
        let place = self.pool.share(&sender, made);
        Ok(Sender::Http2(sender, place))
    }
}

async fn http1<S>(socket: S, made: Made, permit: OwnedSemaphorePermit) -> io::Result<Sender>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::Builder::new()
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD)
        .handshake(TokioIo::new(socket))
        .await
        .map_err(io::Error::other)?;
    let driver: Driver = Box::pin(connection.with_upgrades());
    let mut connection = Http1::new(sender, driver, made, permit);
    if !connection.is_ready() {
        return Err(io::Error::other("the connection ended at once"));
    }
    Ok(Sender::Http1(connection))
}

/// Whether an error of connecting is for want of descriptors, memory, ports or a network on this machine.
fn is_ours(error: &io::Error) -> bool {
    let ours = [
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOMEM,
        libc::ENOBUFS,
        libc::EADDRNOTAVAIL,
        libc::ENETUNREACH,
        libc::ENETDOWN,
    ];
    error.raw_os_error().is_some_and(|code| ours.contains(&code))
}

/// Whether a host, as a URL has it, is this one.
pub fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanting_here_says_nothing_of_the_server() {
        let codes = [
            (libc::EMFILE, true),
            (libc::ENETUNREACH, true),
            (libc::EADDRNOTAVAIL, true),
            (libc::ECONNREFUSED, false),
            (libc::ECONNRESET, false),
            (libc::EHOSTUNREACH, false),
            (libc::ETIMEDOUT, false),
        ];
        for (code, ours) in codes {
            assert_eq!(is_ours(&io::Error::from_raw_os_error(code)), ours, "{code}");
        }
    }
}
