//! HTTP/1.1 endpoints for people and monitoring: `/livez`, `/readyz`, `/metrics`, and what an agent adds.
//!
//! They are served on loopback or a Unix socket, and these three without authentication. On TCP, a connection ends with the
//! first answer that needs no authentication, and on loopback, metrics are refused to web pages that reach this host by
//! DNS rebinding.
//!
//! Every connection is accepted. It begins as unauthenticated, with one of the [`HandshakePermits`], which a newcomer may
//! take over: whoever holds connections open evicts mostly its own. Scrapes, whose answers may be large, and requests
//! that the agent has admitted, which may last long, count against limits of their own, so that `/livez` is always
//! answered.

use std::{
    convert::Infallible,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use tokio_util::sync::CancellationToken;

use super::{
    accept::{Acceptor, Listener, Peer, Tuning},
    exposition::Exposition,
    handshake::{HandshakePermit, HandshakePermits},
    listeners::Pausable,
    tasks::Tasks,
    write_timeout::WriteTimeout,
};

/// Connections at once that are neither scrapes nor admitted.
const UNAUTHENTICATED: usize = 64;
/// Scrapes at once, each of which may hold a text of its own in memory.
const SCRAPES: usize = 8;
/// Connections at once whose requests the agent has admitted.
const ADMITTED: usize = 64;

/// How long a request's head may take, and how long a connection may be idle before the next request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The most bytes of a request's head, and of what a connection has received and not read.
const MAX_HEAD: usize = 32 * 1024;
/// How long a caller may accept no byte of its answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the last answer on a connection may take.
const LAST_ANSWER: Duration = Duration::from_secs(60);

const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "/metrics";
/// The paths that need no authentication.
const PUBLIC: [&str; 3] = ["/livez", "/readyz", METRICS];

/// A short answer: status, content type, body.
pub type Answer = (StatusCode, &'static str, String);

/// The body of an answer, which may last for as long as the agent runs.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

pub type AnswerFuture = Pin<Box<dyn Future<Output = Option<Response<Body>>> + Send>>;

/// The kind of socket that a request came in on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    /// Open only to processes that may use the socket's file.
    Unix,
}

/// What an agent serves in addition to metrics.
pub trait Admin: Send + Sync + 'static {
    /// Whether the agent is ready: `Ok` with what is degraded nevertheless, or `Err` with the reason why not.
    fn ready(&self) -> Result<Vec<String>, String>;

    /// Answers a request that is not about health or metrics; `None` becomes 404.
    fn answer(self: Arc<Self>, request: Request<Incoming>, transport: Transport) -> AnswerFuture;
}

/// The endpoints with what they show.
#[derive(Clone)]
pub struct Endpoints {
    pub metrics: Exposition,
    pub admin: Arc<dyn Admin>,
}

/// The limits on connections at once.
#[derive(Clone)]
struct Limits {
    unauthenticated: HandshakePermits,
    scrapes: HandshakePermits,
    admitted: Arc<Semaphore>,
}

/// What a connection counts as. It begins as unauthenticated, and ends when its permit is revoked.
struct Standing {
    limits: Limits,
    peer: IpAddr,
    counted: Mutex<Counted>,
    evicted: CancellationToken,
}

enum Counted {
    Unauthenticated(HandshakePermit),
    Scrape { _permit: HandshakePermit },
    Admitted { _permit: OwnedSemaphorePermit },
}

impl Limits {
    fn new() -> Self {
        Self {
            unauthenticated: HandshakePermits::new(UNAUTHENTICATED),
            scrapes: HandshakePermits::new(SCRAPES),
            admitted: Arc::new(Semaphore::new(ADMITTED)),
        }
    }

    fn begin(&self, peer: IpAddr) -> Standing {
        let evicted = CancellationToken::new();
        let permit = self.unauthenticated.take_or_cancel(peer, evicted.clone());
        let counted = Mutex::new(Counted::Unauthenticated(permit));
        Standing { limits: self.clone(), peer, counted, evicted }
    }
}

impl Standing {
    /// A whole head has arrived, so connections without one are evicted before this one.
    fn has_sent_a_head(&self) {
        if let Counted::Unauthenticated(permit) = &*self.counted() {
            permit.begun();
        }
    }

    fn scrape(&self) {
        let _permit = self.limits.scrapes.take_or_cancel(self.peer, self.evicted.clone());
        *self.counted() = Counted::Scrape { _permit };
    }

    /// Counts the connection as admitted; `false` if there are too many.
    fn admit(&self) -> bool {
        let mut counted = self.counted();
        if !matches!(*counted, Counted::Admitted { .. }) {
            let Ok(_permit) = self.limits.admitted.clone().try_acquire_owned() else { return false };
            *counted = Counted::Admitted { _permit };
        }
        true
    }

    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Endpoints {
    /// Serves TCP connections until the group is cancelled.
    pub async fn serve_tcp(self, listener: Pausable<TcpListener>, tasks: Tasks) {
        let loopback = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
        self.serve(listener, tasks, Transport::Tcp, loopback).await;
    }

    /// Serves connections of a Unix socket until the group is cancelled.
    pub async fn serve_unix(self, listener: Pausable<UnixListener>, tasks: Tasks) {
        self.serve(listener, tasks, Transport::Unix, false).await;
    }

    async fn serve<L: Listener>(self, listener: L, tasks: Tasks, transport: Transport, loopback: bool) {
        let limits = Limits::new();
        Acceptor::new(listener, Tuning::Caller)
            .serve(
                tasks,
                |peer| Some(limits.begin(peer.ip())),
                |socket, _, standing| self.clone().connection(socket, transport, loopback, standing),
            )
            .await;
    }

    /// `loopback` says that the listener is a TCP socket on a loopback address.
    async fn connection<S>(self, socket: S, transport: Transport, loopback: bool, standing: Standing)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let last = CancellationToken::new();
        let service = service_fn(|request: Request<Incoming>| {
            let (endpoints, last, standing) = (&self, &last, &standing);
            async move {
                standing.has_sent_a_head();
                let path = request.uri().path();
                let public = PUBLIC.contains(&path);
                let mut response = if path == METRICS && loopback && !is_for_this_host(&request) {
                    let text = "only localhost and loopback addresses are served here\n";
                    respond((StatusCode::FORBIDDEN, TEXT, text))
                } else {
                    if path == METRICS {
                        standing.scrape();
                    }
                    endpoints.respond(request, transport).await
                };
                let admitted = !public && !response.status().is_client_error();
                if admitted && !standing.admit() {
                    let text = "too many connections are open here\n";
                    response = respond((StatusCode::SERVICE_UNAVAILABLE, TEXT, text));
                }
                if !admitted && transport == Transport::Tcp {
                    last.cancel();
                    response
                        .headers_mut()
                        .insert(header::CONNECTION, header::HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response)
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .max_headers(64)
            .serve_connection(TokioIo::new(WriteTimeout::new(socket, WRITE_TIMEOUT)), service);
        let too_long = async {
            last.cancelled().await;
            tokio::time::sleep(LAST_ANSWER).await;
        };
        let served = tokio::select! {
            served = connection => served,
            () = too_long => return,
            () = standing.evicted.cancelled() => {
                tracing::debug!("admin connection evicted by a newer one");
                return;
            }
        };
        if let Err(error) = served {
            tracing::debug!(%error, "admin connection failed");
        }
    }

    async fn respond(&self, request: Request<Incoming>, transport: Transport) -> Response<Body> {
        let get = request.method() == hyper::Method::GET;
        let answer = match (request.uri().path(), get) {
            ("/livez", true) => (StatusCode::OK, TEXT, "ok\n".to_owned()),
            ("/readyz", true) => match self.admin.ready() {
                Ok(amiss) => {
                    let lines = std::iter::once("ok".to_owned()).chain(amiss);
                    (StatusCode::OK, TEXT, lines.map(|line| line + "\n").collect())
                }
                Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("not ready: {reason}\n")),
            },
            (METRICS, true) => return self.metrics(&request).await,
            _ => match self.admin.clone().answer(request, transport).await {
                Some(response) => return response,
                None if get => (StatusCode::NOT_FOUND, TEXT, "no such path\n".to_owned()),
                None => (StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET is served here\n".to_owned()),
            },
        };
        respond(answer)
    }

    async fn metrics(&self, request: &Request<Incoming>) -> Response<Body> {
        let accept = request.headers().get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
        match self.metrics.scrape(accept.unwrap_or_default()).await {
            Ok((content_type, text)) => respond((StatusCode::OK, content_type, text)),
            Err(e) => respond((StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("metrics: {e}\n"))),
        }
    }
}

/// Whether the `Host` of a request, if it has one, is `localhost` or a loopback address, with any port.
fn is_for_this_host<B>(request: &Request<B>) -> bool {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let Some(host) = hosts.next() else { return request.uri().authority().is_none() };
    let authority = host.to_str().ok().and_then(|host| host.parse::<hyper::http::uri::Authority>().ok());
    let authority = authority.filter(|authority| !authority.as_str().contains('@'));
    let asked = request.uri().authority().is_none_or(|asked| Some(asked) == authority.as_ref());
    let local = authority.is_some_and(|authority| {
        let name = authority.host().trim_start_matches('[').trim_end_matches(']');
        let address = name.parse::<IpAddr>().map(|address| address.to_canonical().is_loopback());
        address.unwrap_or_else(|_| name.eq_ignore_ascii_case("localhost"))
    });
    local && asked && hosts.next().is_none()
}

/// Turns a short answer into a response.
pub fn respond<B: Into<Bytes>>(
    (status, content_type, body): (StatusCode, &'static str, B),
) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use std::{
        net::SocketAddr,
        task::{Context, Poll},
    };

    use hyper::body::Frame;
    use prometheus_client::{metrics::info::Info, registry::Registry};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;
    use crate::socket;

    /// Serves an endless page to callers with a cookie.
    struct Agent;

    impl Admin for Agent {
        fn ready(&self) -> Result<Vec<String>, String> {
            Ok(Vec::new())
        }

        fn answer(self: Arc<Self>, request: Request<Incoming>, _: Transport) -> AnswerFuture {
            Box::pin(async move {
                match (request.uri().path(), request.headers().contains_key(header::COOKIE)) {
                    ("/page", true) => Some(Response::new(Endless.boxed_unsync())),
                    ("/page", false) => Some(respond((StatusCode::UNAUTHORIZED, TEXT, "no session"))),
                    _ => None,
                }
            })
        }
    }

    struct Endless;

    impl hyper::body::Body for Endless {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Pending
        }
    }

    /// Serves metrics of about `size` bytes.
    fn serve(size: usize) -> (SocketAddr, Tasks) {
        let mut registry = Registry::default();
        registry.register("large", "Large", Info::new(vec![("text", "x".repeat(size))]));
        let endpoints = Endpoints { metrics: Exposition::new(registry), admin: Arc::new(Agent) };
        let listener = socket::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let (address, tasks) = (listener.local_addr().unwrap(), Tasks::new());
        tasks.spawn(endpoints.serve_tcp(listener.into(), tasks.clone()));
        (address, tasks)
    }

    async fn say(address: SocketAddr, text: &str) -> TcpStream {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(text.as_bytes()).await.unwrap();
        socket
    }

    fn get(path: &str, lines: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n")
    }

    /// The answer to an honest caller, which comes before any connection that is held open times out.
    async fn ask(address: SocketAddr, path: &str) -> String {
        let answer = async {
            let mut answer = String::new();
            say(address, &get(path, "")).await.read_to_string(&mut answer).await.unwrap();
            answer
        };
        tokio::time::timeout(HEAD_TIMEOUT / 2, answer).await.unwrap_or_else(|_| panic!("no answer to {path}"))
    }

    /// Waits until the server has closed all but `most` of these.
    async fn all_close_but(most: usize, sockets: Vec<TcpStream>) {
        let mut closing = tokio::task::JoinSet::new();
        let wanted = sockets.len() - most;
        for mut socket in sockets {
            closing.spawn(async move { tokio::io::copy(&mut socket, &mut tokio::io::sink()).await });
        }
        for _ in 0..wanted {
            closing.join_next().await.unwrap().unwrap().ok();
        }
    }

    #[tokio::test]
    async fn connections_that_are_held_open_keep_nobody_out() {
        let (address, _tasks) = serve(10);
        for said in ["", "GET /livez HTTP/1.1\r\n", "POST /livez HTTP/1.1\r\nHost: a\r\nContent-Le"] {
            let mut held = Vec::new();
            for _ in 0..5 * UNAUTHENTICATED {
                held.push(say(address, said).await);
                if held.len() % UNAUTHENTICATED == 0 {
                    assert!(ask(address, "/livez").await.ends_with("\r\n\r\nok\n"));
                    assert!(ask(address, "/metrics").await.contains("# TYPE large info"));
                }
            }
            let closed = all_close_but(UNAUTHENTICATED, held);
            tokio::time::timeout(HEAD_TIMEOUT / 2, closed)
                .await
                .expect("more connections are kept than there are permits");
        }
    }

    #[tokio::test]
    async fn scrapes_that_are_not_read_hold_few_texts_and_keep_nobody_out() {
        let (address, _tasks) = serve(8 << 20);
        let mut held = Vec::new();
        for _ in 0..10 * SCRAPES {
            held.push(say(address, &get("/metrics", "")).await);
        }
        assert!(ask(address, "/livez").await.ends_with("\r\n\r\nok\n"));
        assert!(ask(address, "/metrics").await.len() > 8 << 20);
        let mut whole = 0;
        for mut socket in held {
            let mut text = Vec::new();
            let _ = socket.read_to_end(&mut text).await;
            whole += usize::from(text.len() > 8 << 20);
        }
        assert!((1..=SCRAPES).contains(&whole), "{whole} texts were kept");
    }

    #[tokio::test]
    async fn admitted_connections_are_not_evicted_and_keep_nobody_out() {
        let (address, _tasks) = serve(10);
        let mut watching = Vec::new();
        let open = async |lines: &str| {
            let mut socket = say(address, &get("/page", lines)).await;
            let mut head = [0; 12];
            socket.read_exact(&mut head).await.unwrap();
            (socket, String::from_utf8_lossy(&head).into_owned())
        };
        for _ in 0..ADMITTED {
            let (socket, head) = open("Cookie: a\r\n").await;
            assert_eq!(head, "HTTP/1.1 200");
            watching.push(socket);
        }
        assert_eq!(open("Cookie: a\r\n").await.1, "HTTP/1.1 503");
        let mut held_open = Vec::new();
        for _ in 0..5 * UNAUTHENTICATED {
            held_open.push(say(address, "GET").await);
            assert_eq!(open("").await.1, "HTTP/1.1 401");
        }
        assert!(ask(address, "/livez").await.ends_with("\r\n\r\nok\n"));
        let mut buffer = vec![0; 1024];
        for socket in &mut watching {
            // There is the rest of the head to read, and not the end.
            assert!(socket.read(&mut buffer).await.unwrap() > 0);
            let again = tokio::time::timeout(Duration::ZERO, socket.read(&mut buffer));
            assert!(again.await.is_err(), "a page was closed");
        }
    }

    #[test]
    fn metrics_are_refused_to_web_pages_of_other_hosts() {
        for (uri, hosts, local) in [
            ("/metrics", &["127.0.0.1:9070"][..], true),
            ("/metrics", &["localhost"], true),
            ("/metrics", &["LOCALHOST:1"], true),
            ("/metrics", &["[::1]:9070"], true),
            ("/metrics", &[], true),
            ("/metrics", &["rebound.example:9070"], false),
            ("/metrics", &["localhost.rebound.example"], false),
            ("/metrics", &["127.0.0.1.rebound.example"], false),
            ("/metrics", &["10.0.0.1:9070"], false),
            ("/metrics", &["127.0.0.1", "rebound.example"], false),
            ("/metrics", &["a@b@localhost"], false),
            ("/metrics", &[""], false),
            ("http://rebound.example/metrics", &["127.0.0.1"], false),
            ("http://rebound.example/metrics", &[], false),
        ] {
            let request = hosts.iter().fold(Request::get(uri), |request, host| request.header("host", *host));
            assert_eq!(is_for_this_host(&request.body(()).unwrap()), local, "{uri} {hosts:?}");
        }
    }
}
