//! One API server: its connections, and whether it works.

use std::{
    future::poll_fn,
    io,
    net::IpAddr,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use futures_util::FutureExt;
use hyper::{
    Request, Response, Uri,
    body::Incoming,
    client::conn::{http1, http2},
    header,
    http::uri::{Authority, PathAndQuery, Scheme},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::io::tasks::Tasks;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::{RequestBody, UpstreamConfig};
use crate::{front_end::reloaded::Reloaded, http::Executor};

const MAX_HEADERS: usize = 256;
const MAX_HEAD: usize = 1024 * 1024;
/// Requests on one HTTP/2 connection.
const MAX_STREAMS: usize = 100;
const STREAM_WINDOW: u32 = 1024 * 1024;
/// As much as all streams may take, so that one that is not read does not hold up the others.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS as u32;
/// How long a connection is kept without a request.
const MAX_IDLE: Duration = Duration::from_secs(90);
/// Checks that fail in a row before a server is not asked any more.
const FAILURES: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    /// HTTP/2 where that is asked for and the server speaks it.
    Any,
}

pub struct Server {
    /// For people.
    name: String,
    authority: Authority,
    host: String,
    port: u16,
    /// `None` is plain HTTP.
    tls: Option<(Arc<Reloaded<Arc<ClientConfig>>>, ServerName<'static>)>,
    http2: bool,
    health: PathAndQuery,
    timeout: Duration,
    max_idle: usize,
    idle: Mutex<Vec<Http1>>,
    shared: Mutex<Vec<(http2::SendRequest<RequestBody>, Arc<AtomicUsize>)>>,
    failures: AtomicUsize,
    down: AtomicBool,
    connections: Tasks,
}

/// A connection that takes a request.
pub struct Connection {
    /// It has served a request before.
    pub kept: bool,
    server: Arc<Server>,
    sender: Sender,
}

enum Sender {
    Http1(Http1),
    Http2(http2::SendRequest<RequestBody>, Place),
}

/// A connection without a task of its own: whoever waits for something from it moves it on, so that a request
/// changes no tasks, and one that is given up ends its connection at once.
struct Http1 {
    sender: http1::SendRequest<RequestBody>,
    /// `None` once it has ended.
    driver: Option<Driver>,
    used: Instant,
}

type Driver = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

impl Http1 {
    fn drive(&mut self, cx: &mut Context<'_>) {
        drive(&mut self.driver, cx);
    }

    /// Whether it can take a request now.
    fn is_ready(&mut self) -> bool {
        self.drive(&mut Context::from_waker(Waker::noop()));
        self.driver.is_some() && matches!(self.sender.ready().now_or_never(), Some(Ok(())))
    }
}

fn drive(driver: &mut Option<Driver>, cx: &mut Context<'_>) {
    let Some(connection) = driver else { return };
    if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
        *driver = None;
        if let Err(error) = ended {
            tracing::debug!(error = causes(&error), "a connection to an API server failed");
        }
    }
}

/// One stream of a shared connection.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keeps a connection while its response is read.
pub struct Lease {
    server: Arc<Server>,
    sender: Option<Sender>,
}

impl Lease {
    /// Moves the connection on. To be done whenever its response has nothing more to read yet.
    pub fn drive(&mut self, cx: &mut Context<'_>) {
        if let Some(Sender::Http1(connection)) = &mut self.sender {
            connection.drive(cx);
        }
    }

    /// The response has been read to its end: the connection can serve another request, unless the rest of this
    /// one is still being sent.
    pub fn finish(&mut self) {
        let Some(Sender::Http1(mut connection)) = self.sender.take() else { return };
        if !connection.is_ready() {
            return;
        }
        connection.used = Instant::now();
        let mut idle = self.server.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < self.server.max_idle {
            idle.push(connection);
        }
    }
}

impl Connection {
    /// Sends a request. A failure gives the request back where nothing of it has been sent.
    pub async fn send(
        self,
        mut request: Request<RequestBody>,
    ) -> Result<(Response<Incoming>, Lease), (hyper::Error, Option<Request<RequestBody>>)> {
        let Self { server, sender, .. } = self;
        let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        match sender {
            Sender::Http1(mut connection) => {
                *request.uri_mut() = Uri::from(path);
                if let Ok(host) = header::HeaderValue::try_from(server.authority.as_str()) {
                    request.headers_mut().insert(header::HOST, host);
                }
                let Http1 { sender, driver, .. } = &mut connection;
                let mut sending = pin!(sender.try_send_request(request));
                let sent = poll_fn(|cx| {
                    if let Poll::Ready(sent) = sending.as_mut().poll(cx) {
                        return Poll::Ready(sent);
                    }
                    drive(driver, cx);
                    sending.as_mut().poll(cx)
                });
                match sent.await {
                    Ok(response) => Ok((response, Lease { server, sender: Some(Sender::Http1(connection)) })),
                    Err(mut error) => {
                        let unsent = error.take_message();
                        Err((error.into_error(), unsent))
                    }
                }
            }
            Sender::Http2(mut sender, place) => {
                request.headers_mut().remove(header::HOST);
                let mut parts = hyper::http::uri::Parts::default();
                parts.scheme = Some(Scheme::HTTPS);
                parts.authority = Some(server.authority.clone());
                parts.path_and_query = Some(path);
                if let Ok(uri) = Uri::from_parts(parts) {
                    *request.uri_mut() = uri;
                }
                *request.version_mut() = hyper::Version::HTTP_2;
                match sender.try_send_request(request).await {
                    Ok(response) => {
                        Ok((response, Lease { server, sender: Some(Sender::Http2(sender, place)) }))
                    }
                    Err(mut error) => {
                        let unsent = error.take_message().map(|mut request| {
                            *request.version_mut() = hyper::Version::HTTP_11;
                            request
                        });
                        Err((error.into_error(), unsent))
                    }
                }
            }
        }
    }
}

impl Server {
    pub fn new(
        uri: &Uri,
        config: &UpstreamConfig,
        tls: Arc<Reloaded<Arc<ClientConfig>>>,
        connections: Tasks,
    ) -> anyhow::Result<Self> {
        let authority = uri.authority().cloned().context("an upstream needs a host")?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let (tls, default_port) = match uri.scheme_str() {
            Some("https") => (Some((tls, ServerName::try_from(host.clone())?)), 443),
            Some("http") if is_loopback(&host) => (None, 80),
            _ => bail!("{uri}: an upstream is https://, or http:// on loopback"),
        };
        Ok(Self {
            name: uri.to_string(),
            port: authority.port_u16().unwrap_or(default_port),
            authority,
            host,
            tls,
            http2: config.http2,
            health: config.health_path.parse()?,
            timeout: config.connect_timeout,
            max_idle: config.max_idle,
            idle: Mutex::default(),
            shared: Mutex::default(),
            failures: AtomicUsize::new(0),
            down: AtomicBool::new(false),
            connections,
        })
    }

    pub fn is_healthy(&self) -> bool {
        !self.down.load(Ordering::Relaxed)
    }

    /// It can't be connected to.
    pub fn failed(&self, error: &dyn std::fmt::Display) {
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
        self.sweep();
        let asked = async {
            let connection = self.connection(Protocol::Any).await?;
            let mut request = Request::new(RequestBody::empty());
            *request.uri_mut() = Uri::from(self.health.clone());
            let (response, _) =
                connection.send(request).await.map_err(|(error, _)| io::Error::other(causes(&error)))?;
            if response.status().is_server_error() {
                return Err(io::Error::other(format!("{} answers {}", self.health, response.status())));
            }
            Ok(())
        };
        match tokio::time::timeout(self.timeout, asked).await {
            Ok(Ok(())) => self.works(),
            Ok(Err(error)) => self.failed(&error),
            Err(_) => self.failed(&"no answer in time"),
        }
    }

    /// A kept connection, or a new one.
    pub async fn connection(self: &Arc<Self>, protocol: Protocol) -> io::Result<Connection> {
        let connection = |kept, sender| Connection { kept, server: self.clone(), sender };
        if protocol == Protocol::Any
            && let Some(sender) = self.kept()
        {
            return Ok(connection(true, sender));
        }
        let connecting = self.connect(protocol);
        let sender = tokio::time::timeout(self.timeout, connecting).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, format!("{} did not answer in time", self.name))
        })??;
        Ok(connection(false, sender))
    }

    fn kept(&self) -> Option<Sender> {
        {
            let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared.retain(|(sender, _)| !sender.is_closed());
            let free = shared.iter().find(|(_, streams)| streams.load(Ordering::Relaxed) < MAX_STREAMS);
            if let Some((sender, streams)) = free {
                streams.fetch_add(1, Ordering::Relaxed);
                return Some(Sender::Http2(sender.clone(), Place(streams.clone())));
            }
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // The last one first, so that those that are not needed grow old.
        while let Some(mut connection) = idle.pop() {
            if connection.is_ready() {
                return Some(Sender::Http1(connection));
            }
        }
        None
    }

    /// Ends kept connections that the server has ended, or that nobody has needed.
    fn sweep(&self) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain_mut(|connection| connection.used.elapsed() < MAX_IDLE && connection.is_ready());
    }

    async fn connect(&self, protocol: Protocol) -> io::Result<Sender> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", self.name));
        let socket = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(named)?;
        socket.set_nodelay(true)?;
        let Some((config, name)) = &self.tls else { return self.http1(socket).await.map_err(named) };
        let mut config = ClientConfig::clone(&config.get());
        config.alpn_protocols = match protocol {
            Protocol::Any if self.http2 => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            Protocol::Any | Protocol::Http1 => vec![b"http/1.1".to_vec()],
        };
        let tls = TlsConnector::from(Arc::new(config)).connect(name.clone(), socket).await.map_err(named)?;
        if tls.get_ref().1.alpn_protocol() == Some(b"h2") {
            return self.http2(tls).await.map_err(named);
        }
        self.http1(tls).await.map_err(named)
    }

    async fn http1<S>(&self, socket: S) -> io::Result<Sender>
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
        let mut connection = Http1 { sender, driver: Some(driver), used: Instant::now() };
        if !connection.is_ready() {
            return Err(io::Error::other("the connection ended at once"));
        }
        Ok(Sender::Http1(connection))
    }

    async fn http2<S>(&self, socket: S) -> io::Result<Sender>
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
            if let Err(error) = connection.await {
                tracing::debug!(error = causes(&error), "a connection to an API server failed");
            }
        });
        sender.ready().await.map_err(io::Error::other)?;
        let streams = Arc::new(AtomicUsize::new(1));
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.push((sender.clone(), streams.clone()));
        Ok(Sender::Http2(sender, Place(streams)))
    }
}

/// Whether a host, as a URL has it, is this one.
pub fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

/// hyper's errors show their cause only when they are asked for it.
pub fn causes(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
