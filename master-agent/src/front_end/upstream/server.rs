//! One API server: its connections and its health.

use std::{
    future::poll_fn,
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use access::x509_expiry::X509Expiry;
use anyhow::{Context as _, bail};
use futures_util::future::BoxFuture;
use hyper::{
    Uri,
    client::conn::{http1, http2},
    header::HeaderValue,
    http::uri::{Authority, PathAndQuery},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::{Host, Target};
use proto_net::{
    causes::causes,
    file_watcher::{FileWatcher, Watcher},
    socket,
    tasks::Tasks,
    tls::ClientTls,
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
    config::UpstreamConfig,
    established::Established,
    pool::Pool,
    sender::{Driver, Http1, Sender},
    shared::{AllowedStreams, FIRST_STREAMS, Http2, MAX_STREAMS},
};
use crate::{
    front_end::workers::PerThread,
    http::{connection_tasks::ConnectionTasks, is_loopback},
    metrics::Expiry,
};

const MAX_HEADERS: usize = 256;
const MAX_HEAD: usize = 1024 * 1024;
const STREAM_WINDOW: u32 = 1024 * 1024;
/// The sum of the windows of all streams, so that a stream that nobody reads does not block the others.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS as u32;
/// The number of failures since the last successful health check after which a server counts as down.
const FAILURES: usize = 2;

/// The protocols that a request may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// The request uses HTTP/2 if that is configured and the server supports it, and otherwise HTTP/1.1.
    Any,
    /// The request uses HTTP/1.1, so that it shares its connection with no other request at a time.
    Http1,
    /// The request may change the protocol of its connection, which therefore is a new one with HTTP/1.1.
    Upgrade,
}

/// The TLS configurations for the protocols that a connection may speak.
pub(super) struct ServerTls {
    any: Arc<ClientConfig>,
    http1: Arc<ClientConfig>,
    expiries: Vec<Expiry>,
}

impl ServerTls {
    pub(super) fn read(tls: &ClientTls, http2: bool) -> anyhow::Result<Self> {
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

/// An API server.
pub(super) struct Server {
    /// The URL, for logs and errors.
    pub name: String,
    authority: Authority,
    host_header: Option<HeaderValue>,
    host: String,
    port: u16,
    tls: Arc<FileWatcher<ServerTls>>,
    /// The name in the server's certificate. With `None`, connections use plain HTTP.
    tls_name: Option<ServerName<'static>>,
    /// Whether the server is expected to support HTTP/2.
    multiplexes: AtomicBool,
    /// Locked while a thread makes a shared connection.
    connecting: PerThread<tokio::sync::Mutex<()>>,
    pool: Pool,
    /// The path of health checks.
    pub health: PathAndQuery,
    /// The longest time to make a connection, and for a health check.
    pub timeout: Duration,
    /// The number of failures since the last successful health check.
    failures: AtomicUsize,
    /// The number of failures since the start.
    failures_total: AtomicU64,
    down: AtomicBool,
    connections: Tasks,
}

/// The state of a server, as metrics show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamStatus {
    /// Host and port.
    pub server: String,
    pub healthy: bool,
    /// The number of failed connections and checks since the start, and of requests that could not be sent.
    pub failures: u64,
}

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("{0}: max_connections are in use")]
    Full(String),
    /// The fault is on this host and says nothing about the server.
    #[error("{0}: no connection can be made from here: {1}")]
    Local(String, io::Error),
    #[error("{0}: {1}")]
    Server(String, io::Error),
}

impl Server {
    pub(super) fn new(
        uri: &Uri,
        config: &UpstreamConfig,
        tls: Arc<FileWatcher<ServerTls>>,
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
            connecting: PerThread::default(),
            pool: Pool::new(config),
            health: config.health_path.parse()?,
            timeout: config.connect_timeout,
            failures: AtomicUsize::new(0),
            failures_total: AtomicU64::new(0),
            down: AtomicBool::new(false),
            connections,
        })
    }

    pub(super) fn is_healthy(&self) -> bool {
        !self.down.load(Ordering::Relaxed)
    }

    pub(super) fn status(&self) -> UpstreamStatus {
        UpstreamStatus {
            server: Target::new(
                self.host.parse().map_or_else(|_| Host::Name(self.host.clone()), Host::Addr),
                self.port,
            )
            .to_string(),
            healthy: self.is_healthy(),
            failures: self.failures_total.load(Ordering::Relaxed),
        }
    }

    /// Returns when the certificates in use expire.
    pub(super) fn expiries(&self) -> Vec<Expiry> {
        self.tls.get().expiries.clone()
    }

    pub(super) fn authority(&self) -> &Authority {
        &self.authority
    }

    pub(super) fn host_header(&self) -> Option<HeaderValue> {
        self.host_header.clone()
    }

    /// Counts a failure if the server is the reason why a connection could not be made.
    pub(super) fn connect_failed(&self, error: &ConnectError) {
        match error {
            ConnectError::Server(_, error) => self.count_failure(error),
            ConnectError::Full(_) | ConnectError::Local(..) => {}
        }
    }

    /// Counts a failure. After several failures without a successful health check in between, the server counts as
    /// down.
    pub(super) fn count_failure(&self, error: &dyn std::fmt::Display) {
        self.failures_total.fetch_add(1, Ordering::Relaxed);
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if failures >= FAILURES && !self.down.swap(true, Ordering::Relaxed) {
            tracing::warn!(server = self.name, %error, "API server is down");
        }
    }

    pub(super) fn mark_healthy(&self) {
        self.failures.store(0, Ordering::Relaxed);
        if self.down.swap(false, Ordering::Relaxed) {
            tracing::info!(server = self.name, "API server is up again");
        }
    }

    /// Closes idle connections that must not be used any more.
    pub(super) fn sweep(&self) {
        self.pool.sweep(self.tls.generation());
    }

    /// Takes a kept connection or makes a new one. Also returns whether it is a kept one.
    pub(super) async fn sender(&self, protocol: Protocol) -> Result<(Sender, bool), ConnectError> {
        let kept = || match protocol {
            Protocol::Any => self.pool.take(self.tls.generation()),
            Protocol::Http1 => self.pool.take_idle(self.tls.generation()),
            Protocol::Upgrade => None,
        };
        if let Some(sender) = kept() {
            return Ok((sender, true));
        }
        let connecting = async {
            // Requests that come while their thread makes a shared connection wait for it.
            let shares = protocol == Protocol::Any && self.multiplexes.load(Ordering::Relaxed);
            let _connecting = if shares { Some(self.connecting.current().lock().await) } else { None };
            if shares && let Some(sender) = kept() {
                return Ok((sender, true));
            }
            let permit = self.pool.permit().ok_or_else(|| ConnectError::Full(self.name.clone()))?;
            let sender = self.connect(protocol, permit).await.map_err(|error| {
                let reason = if is_local(&error) { ConnectError::Local } else { ConnectError::Server };
                reason(self.name.clone(), error)
            })?;
            Ok((sender, false))
        };
        tokio::time::timeout(self.timeout, connecting).await.unwrap_or_else(|_| {
            let late = io::Error::new(io::ErrorKind::TimedOut, "no connection in time");
            Err(ConnectError::Server(self.name.clone(), late))
        })
    }

    /// Keeps a connection for a later request, if it can be used again.
    pub(super) fn keep(&self, connection: Http1) {
        self.pool.put(connection, self.tls.generation());
    }

    async fn connect(&self, protocol: Protocol, permit: OwnedSemaphorePermit) -> io::Result<Sender> {
        let socket = TcpStream::connect((self.host.as_str(), self.port)).await?;
        socket::tune(&socket);
        // The generation is read before the files, so that a connection counts as old if the files change in between.
        let established = Established { generation: self.tls.generation(), at: Instant::now() };
        let Some(name) = &self.tls_name else { return http1(socket, established, permit).await };
        let tls = self.tls.get();
        let config = match protocol {
            Protocol::Any => tls.any.clone(),
            Protocol::Http1 | Protocol::Upgrade => tls.http1.clone(),
        };
        let tls = TlsConnector::from(config).connect(name.clone(), socket).await?;
        let http2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
        if protocol == Protocol::Any {
            self.multiplexes.store(http2, Ordering::Relaxed);
        }
        if http2 { self.http2(tls, established, permit).await } else { http1(tls, established, permit).await }
    }

    async fn http2<S>(
        &self,
        socket: S,
        established: Established,
        permit: OwnedSemaphorePermit,
    ) -> io::Result<Sender>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (executor, mut tasks) = ConnectionTasks::<BoxFuture<'static, ()>>::new();
        let (sender, connection) = http2::Builder::new(executor)
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_max_send_streams(FIRST_STREAMS)
            // Responses that callers have given up must not end the connection, with the streams of everyone. The limit
            // is meant for servers that are not trusted.
            .max_local_error_reset_streams(None::<usize>)
            .keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(15))
            .handshake(TokioIo::new(socket))
            .await
            .map_err(io::Error::other)?;
        let allowed = AllowedStreams::default();
        let told = allowed.clone();
        self.connections.spawn(async move {
            {
                let mut connection = pin!(connection);
                let followed = poll_fn(|cx| {
                    let ended = connection.as_mut().poll(cx);
                    told.set(connection.current_max_send_streams());
                    ended
                });
                if let Err(error) = tasks.drive(pin!(followed)).await {
                    tracing::debug!(error = causes(&error), "connection to an API server failed");
                }
            }
            // The connection closes once it is dropped and its streams have ended.
            tasks.finish().await;
        });
        Ok(self.pool.share(Http2 { sender, allowed, established, _permit: permit }))
    }
}

async fn http1<S>(socket: S, established: Established, permit: OwnedSemaphorePermit) -> io::Result<Sender>
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
    let mut connection = Http1::new(sender, driver, established, permit);
    if !connection.is_ready() {
        return Err(io::Error::other("the connection ended at once"));
    }
    Ok(Sender::Http1(connection))
}

/// Whether connecting failed because this host lacks file descriptors, memory, ports or a network.
fn is_local(error: &io::Error) -> bool {
    let local = [
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOMEM,
        libc::ENOBUFS,
        libc::EADDRNOTAVAIL,
        libc::ENETUNREACH,
        libc::ENETDOWN,
    ];
    error.raw_os_error().is_some_and(|code| local.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_on_this_machine_says_nothing_about_the_server() {
        let codes = [
            (libc::EMFILE, true),
            (libc::ENETUNREACH, true),
            (libc::EADDRNOTAVAIL, true),
            (libc::ECONNREFUSED, false),
            (libc::ECONNRESET, false),
            (libc::EHOSTUNREACH, false),
            (libc::ETIMEDOUT, false),
        ];
        for (code, local) in codes {
            assert_eq!(is_local(&io::Error::from_raw_os_error(code)), local, "{code}");
        }
    }
}
