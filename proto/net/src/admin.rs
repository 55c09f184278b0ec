//! Small HTTP/1.1 endpoints for people and monitoring: `/livez`, `/readyz`, `/metrics`, and what an agent
//! adds. Loopback or a Unix socket only; there is no authentication for these, so none of them keeps a connection, and on
//! loopback metrics are not for web pages whose name was made to lead here.
//!
//! Everybody is accepted, and whoever has got nothing yet gives way to newcomers, as [`Places`] has it: a stranger who
//! holds connections open takes places from itself. Answers that may be large or long have shares of their own, so that
//! `/livez` is answered whatever becomes of those.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
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
    exposition::Exposition,
    handshake::{BEGUN, Place, Places},
    patient::PatientWriter,
    socket,
    tasks::Tasks,
};

/// Connections at once that have got nothing of worth yet.
const STRANGERS: usize = 64;
/// Scrapes at once, each of which may hold a text of its own.
const SCRAPES: usize = 8;
/// Connections at once of those whom the agent itself has let in.
const ADMITTED: usize = 64;

/// How long a request's head may take, and the pause before the next request.
const HEAD: Duration = Duration::from_secs(10);
/// Of a request's head. A connection holds no more of what it has not read.
const MAX_HEAD: usize = 32 * 1024;
/// How long a caller may take nothing of its answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long an answer may take that ends its connection.
const LAST: Duration = Duration::from_secs(60);

const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "/metrics";
/// What anybody is answered.
const SHORT: [&str; 3] = ["/livez", "/readyz", METRICS];

/// A short answer: status, content type, body.
pub type Answer = (StatusCode, &'static str, String);

/// Of any answer; it may go on for as long as the agent runs.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

pub type AnswerFuture = Pin<Box<dyn Future<Output = Option<Response<Body>>> + Send>>;

/// Where a request came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    Tcp,
    /// Only for whom the socket's file lets in.
    Unix,
}

/// What an agent serves beside metrics.
pub trait Admin: Send + Sync + 'static {
    /// `Err` says why the agent is not ready, `Ok` what is amiss all the same.
    fn ready(&self) -> Result<Vec<String>, String>;

    /// Answers what is not for health and metrics; `None` is 404.
    fn answer(self: Arc<Self>, request: Request<Incoming>, door: Door) -> AnswerFuture;
}

/// The endpoints, and what they show.
#[derive(Clone)]
pub struct Endpoints {
    pub metrics: Exposition,
    pub admin: Arc<dyn Admin>,
}

/// Who may be here at once.
#[derive(Clone)]
struct Shares {
    strangers: Places,
    scrapes: Places,
    admitted: Arc<Semaphore>,
}

/// What a connection counts as. It begins as a stranger's, and ends when a place of its is taken away.
struct Standing {
    shares: Shares,
    peer: IpAddr,
    share: Mutex<Share>,
    evicted: CancellationToken,
}

enum Share {
    Stranger(Place),
    Scrape { _place: Place },
    Admitted { _permit: OwnedSemaphorePermit },
}

impl Shares {
    fn new() -> Self {
        Self {
            strangers: Places::new(STRANGERS),
            scrapes: Places::new(SCRAPES),
            admitted: Arc::new(Semaphore::new(ADMITTED)),
        }
    }

    fn begin(&self, peer: IpAddr) -> Standing {
        let evicted = CancellationToken::new();
        let share = Mutex::new(Share::Stranger(self.strangers.take_or_cancel(peer, evicted.clone())));
        Standing { shares: self.clone(), peer, share, evicted }
    }
}

impl Standing {
    /// A whole head has come, so those who have sent none give way first.
    fn asked(&self) {
        if let Share::Stranger(place) = &*self.share() {
            place.received.store(BEGUN, Ordering::Relaxed);
        }
    }

    fn scrapes(&self) {
        let _place = self.shares.scrapes.take_or_cancel(self.peer, self.evicted.clone());
        *self.share() = Share::Scrape { _place };
    }

    /// Whether there is room for one more whom the agent has let in.
    fn admit(&self) -> bool {
        let mut share = self.share();
        if !matches!(*share, Share::Admitted { .. }) {
            let Ok(_permit) = self.shares.admitted.clone().try_acquire_owned() else { return false };
            *share = Share::Admitted { _permit };
        }
        true
    }

    fn share(&self) -> MutexGuard<'_, Share> {
        self.share.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Endpoints {
    /// Serves TCP connections until the group is cancelled.
    pub async fn serve_tcp(self, listener: TcpListener, tasks: Tasks) {
        let shares = Shares::new();
        let local = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
        loop {
            match listener.accept().await {
                Ok((socket, peer)) => {
                    socket::tune(&socket);
                    let standing = shares.begin(peer.ip());
                    tasks.spawn(self.clone().connection(socket, Door::Tcp, local, standing));
                }
                Err(e) => accept_error(&e).await,
            }
        }
    }

    /// Serves connections of a Unix socket until the group is cancelled.
    pub async fn serve_unix(self, listener: UnixListener, tasks: Tasks) {
        let shares = Shares::new();
        loop {
            match listener.accept().await {
                Ok((socket, _)) => {
                    let standing = shares.begin(Ipv4Addr::LOCALHOST.into());
                    tasks.spawn(self.clone().connection(socket, Door::Unix, false, standing));
                }
                Err(e) => accept_error(&e).await,
            }
        }
    }

    /// `local` is a TCP listener on loopback.
    async fn connection<S>(self, socket: S, door: Door, local: bool, standing: Standing)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let last = CancellationToken::new();
        let service = service_fn(|request: Request<Incoming>| {
            let (endpoints, last, standing) = (&self, &last, &standing);
            async move {
                standing.asked();
                let path = request.uri().path();
                let short = SHORT.contains(&path);
                let mut response = if path == METRICS && local && !is_for_this_host(&request) {
                    let text = "only localhost and loopback addresses are served here\n";
                    respond((StatusCode::FORBIDDEN, TEXT, text))
                } else {
                    if path == METRICS {
                        standing.scrapes();
                    }
                    endpoints.respond(request, door).await
                };
                let let_in = !short && !response.status().is_client_error();
                if let_in && !standing.admit() {
                    let text = "too many connections are open here\n";
                    response = respond((StatusCode::SERVICE_UNAVAILABLE, TEXT, text));
                }
                if !let_in && door == Door::Tcp {
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
            .header_read_timeout(HEAD)
            .max_buf_size(MAX_HEAD)
            .max_headers(64)
            .serve_connection(TokioIo::new(PatientWriter::new(socket, PATIENCE)), service);
        let too_long = async {
            last.cancelled().await;
            tokio::time::sleep(LAST).await;
        };
        let served = tokio::select! {
            served = connection => served,
            () = too_long => return,
            () = standing.evicted.cancelled() => {
                tracing::debug!("admin connection gave its place to a newer one");
                return;
            }
        };
        if let Err(error) = served {
            tracing::debug!(%error, "admin connection failed");
        }
    }

    async fn respond(&self, request: Request<Incoming>, door: Door) -> Response<Body> {
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
            _ => match self.admin.clone().answer(request, door).await {
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

/// Whether the `Host` of a request, if it has one, is `localhost` or a loopback address, with whatever port.
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

/// Makes a response of a short answer.
pub fn respond<B: Into<Bytes>>(
    (status, content_type, body): (StatusCode, &'static str, B),
) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

/// Out of descriptors, or the peer was quicker to leave: neither is a reason to stop accepting, nor to spin.
pub async fn accept_error(error: &std::io::Error) {
    tracing::warn!(%error, "accept failed");
    tokio::time::sleep(Duration::from_millis(50)).await;
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

    /// Has a page that goes on for ever for those who may see it.
    struct Agent;

    impl Admin for Agent {
        fn ready(&self) -> Result<Vec<String>, String> {
            Ok(Vec::new())
        }

        fn answer(self: Arc<Self>, request: Request<Incoming>, _: Door) -> AnswerFuture {
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
        tasks.spawn(endpoints.serve_tcp(listener, tasks.clone()));
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

    /// The answer of an honest caller, which comes before any deadline of those who hold connections.
    async fn ask(address: SocketAddr, path: &str) -> String {
        let answer = async {
            let mut answer = String::new();
            say(address, &get(path, "")).await.read_to_string(&mut answer).await.unwrap();
            answer
        };
        tokio::time::timeout(HEAD / 2, answer).await.unwrap_or_else(|_| panic!("no answer to {path}"))
    }

    /// Waits until all but `most` of these have been closed by the server.
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
    async fn strangers_who_hold_connections_keep_nobody_away() {
        let (address, _tasks) = serve(10);
        for said in ["", "GET /livez HTTP/1.1\r\n", "POST /livez HTTP/1.1\r\nHost: a\r\nContent-Le"] {
            let mut held = Vec::new();
            for _ in 0..5 * STRANGERS {
                held.push(say(address, said).await);
                if held.len() % STRANGERS == 0 {
                    assert!(ask(address, "/livez").await.ends_with("\r\n\r\nok\n"));
                    assert!(ask(address, "/metrics").await.contains("# TYPE large info"));
                }
            }
            let closed = all_close_but(STRANGERS, held);
            tokio::time::timeout(HEAD / 2, closed)
                .await
                .expect("more connections are kept than there are places");
        }
    }

    #[tokio::test]
    async fn strangers_who_do_not_read_metrics_keep_few_texts_and_nobody_away() {
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
    async fn who_is_let_in_is_not_sent_away_by_strangers_and_does_not_keep_them_away() {
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
        let mut strangers = Vec::new();
        for _ in 0..5 * STRANGERS {
            strangers.push(say(address, "GET").await);
            assert_eq!(open("").await.1, "HTTP/1.1 401");
        }
        assert!(ask(address, "/livez").await.ends_with("\r\n\r\nok\n"));
        let mut buffer = vec![0; 1024];
        for socket in &mut watching {
            // What is there to be read is the rest of the head, and not the end.
            assert!(socket.read(&mut buffer).await.unwrap() > 0);
            let again = tokio::time::timeout(Duration::ZERO, socket.read(&mut buffer));
            assert!(again.await.is_err(), "a page was closed");
        }
    }

    #[test]
    fn web_pages_elsewhere_do_not_come_in() {
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
