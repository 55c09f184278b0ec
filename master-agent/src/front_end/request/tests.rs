//! Tests of the whole pipeline, with callers on in-memory streams and a stub of kube-apiserver on loopback.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use access::{authn::Certificates, peer::Peer, user::User};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Empty, Full};
use hyper::{
    HeaderMap, Request, Response, body::Incoming, client::conn::http2, server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proto::{NodeName, join::Admission};
use proto_config::{Source, parse};
use proto_net::{
    admin::{self, respond},
    dialer::Origin,
    tasks::Tasks,
    tls::ClientTls,
};
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_rustls::TlsConnector;

use crate::{
    activity::{NodeActivities, NodeActivity},
    front_end::{
        audit::{Queue, Writer},
        call_home::{CallHomeServices, CheckJoinTokens, IncomingCall, ServeLinks},
        config::FrontEndConfig,
        connection::Connection,
        page::Page,
        server::{Dependencies, FrontEnd},
        tunnels::carry,
        upstream::RequestBody,
        workers,
    },
    http::generations::Generations,
    identity::store::TokenError,
    stream::metrics::StreamMetrics,
    tunnels::call_home::Purpose,
};

/// The length of the body that the stub serves at `/large`, which exceeds what all buffers on the way hold.
const LARGE: usize = 4 << 20;
const TOKENS: &str = "token-of-jane,jane,7,dev\ntoken-of-n1,system:node:n1,8,system:nodes\n";
const JANE: &str = "Authorization: Bearer token-of-jane\r\n";
const N1: &str = "Authorization: Bearer token-of-n1\r\n";
/// A path of the page whose handler panics.
const PANICS: &str = "/agent/page/panics";
const LINK: &str = "Connection: Upgrade\r\nUpgrade: master-agent-link\r\n";

struct World {
    dir: PathBuf,
    tasks: Tasks,
    front_end: Arc<FrontEnd>,
    writer: Option<Writer>,
    /// The paths and headers of the requests that the stub of kube-apiserver has got.
    upstream: Arc<Mutex<Vec<(String, HeaderMap)>>>,
    home: Arc<Home>,
    calls: mpsc::UnboundedReceiver<(Purpose, u8)>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.cancel();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl World {
    /// Starts a front end with these additional lines in its configuration.
    async fn new(lines: &str) -> Self {
        Self::with("[{token_file: tokens.csv}]", lines).await
    }

    /// Starts a front end with these authenticators and additional lines.
    async fn with(authentication: &str, lines: &str) -> Self {
        let (dir, tasks) =
            (std::env::temp_dir().join(format!("pipeline-{:016x}", rand::random::<u64>())), Tasks::new());
        std::fs::create_dir(&dir).unwrap();
        let certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        for (name, content) in [
            ("tls.crt", certificate.cert.pem()),
            ("tls.key", certificate.signing_key.serialize_pem()),
            ("tokens.csv", TOKENS.to_owned()),
            ("bootstrap.csv", "abcdef.0123456789abcdef\n".to_owned()),
        ] {
            proto_config::secret_file::replace(&dir.join(name), content.as_bytes()).unwrap();
        }
        let upstream = Arc::<Mutex<Vec<_>>>::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap();
        tasks.spawn(kube_apiserver(listener, upstream.clone(), tasks.clone()));
        let text = format!(
            "certificates: [{{cert: tls.crt, key: tls.key}}]\nauthentication: {authentication}\n\
             authorization: [{{paths: {{rules: [{{name: all, groups: ['system:authenticated'], paths: ['/*'], effect: allow}}]}}}}]\n\
             upstream: {{servers: ['http://{server}']}}\nserve_page: true\n{lines}\n"
        );
        let source = Source { origin: "test", base_dir: &dir, check_files: false };
        let config = parse(&text, source, FrontEndConfig::read).unwrap();
        let (sender, calls) = mpsc::unbounded_channel();
        let home =
            Arc::new(Home { calls: sender, other_node: Mutex::default(), turned_away: Mutex::default() });
        let dependencies = Dependencies {
            cluster: None,
            proxy_urls: None,
            page: Arc::new(Greeting),
            call_home: Some(CallHomeServices {
                links: home.clone(),
                join_tokens: home.clone(),
                tasks: tasks.clone(),
                runtime: tokio::runtime::Handle::current(),
            }),
            streams: StreamMetrics::new(Arc::new(NoNodes)),
            generations: Generations::default(),
        };
        let (front_end, writer) = FrontEnd::load(&config, dependencies, &tasks, &tasks).unwrap();
        Self { dir, tasks, front_end, writer: Some(writer), upstream, home, calls }
    }

    /// Opens a connection whose caller has presented no certificate.
    fn connect(&self) -> DuplexStream {
        self.serve().0
    }

    /// Does the same, and also returns the task that serves the connection.
    fn serve(&self) -> (DuplexStream, JoinHandle<Option<()>>) {
        let peer = Peer::Address("192.0.2.1:5000".parse().unwrap());
        let admission = self.front_end.admit(&peer).unwrap();
        let certificates = Certificates::default();
        let connection = Connection::over_tls(self.front_end.clone(), peer, certificates, admission);
        let (near, far) = duplex(1024);
        let served = self.tasks.spawn(Arc::new(connection).serve_http1(far));
        (near, served)
    }

    /// Makes one request on a connection of its own, and reads the whole answer.
    async fn ask(&self, line: &str, headers: &str) -> String {
        let mut socket = self.connect();
        let request = format!("{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n");
        exchange(&mut socket, &request).await
    }

    fn upstream_requests(&self) -> Vec<String> {
        self.upstream.lock().unwrap().iter().map(|(path, _)| path.clone()).collect()
    }

    /// Closes the audit log and returns all of its lines.
    async fn audited(&mut self) -> Vec<Value> {
        assert!(self.writer.take().unwrap().close(Duration::from_secs(60)).await);
        let text = std::fs::read_to_string(self.dir.join("audit.log")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

async fn exchange(socket: &mut DuplexStream, request: &str) -> String {
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// Calls home at a path below that of all nodes, and reads the head of the answer.
async fn call_home(socket: &mut DuplexStream, path: &str, credential: &str) -> String {
    let path = format!("/apis/master-agent/v1/nodes/{path}");
    let request = format!("POST {path} HTTP/1.1\r\nHost: localhost\r\n{LINK}{credential}\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

fn status(answer: &str) -> &str {
    answer.get(9..12).unwrap_or_default()
}

/// Answers `ok`, or many bytes at `/large`.
async fn kube_apiserver(
    listener: TcpListener,
    seen: Arc<Mutex<Vec<(String, HeaderMap)>>>,
    connections: Tasks,
) {
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        let seen = seen.clone();
        let answer = service_fn(move |request: Request<Incoming>| {
            let path = request.uri().path().to_owned();
            let body = if path == "/large" { Bytes::from(vec![b'x'; LARGE]) } else { Bytes::from("ok") };
            seen.lock().unwrap().push((path, request.headers().clone()));
            std::future::ready(Ok::<_, hyper::Error>(Response::new(Full::new(body))))
        });
        connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(socket), answer));
    }
}

/// Takes calls home, and reads one byte of each link.
struct Home {
    calls: mpsc::UnboundedSender<(Purpose, u8)>,
    /// The nodes that rejected calls named.
    other_node: Mutex<Vec<Option<NodeName>>>,
    /// After what time callers have to come again, if they have to.
    turned_away: Mutex<Option<Duration>>,
}

impl CheckJoinTokens for Home {
    fn check(&self, admission: Admission) -> BoxFuture<'static, Result<Option<NodeName>, TokenError>> {
        let bound: Result<Option<NodeName>, _> = match admission.id.as_str() {
            JOIN_TOKEN_ID => Ok(Some("n1".parse().unwrap())),
            UNBOUND_JOIN_TOKEN_ID => Ok(None),
            _ => Err(TokenError::Unknown),
        };
        Box::pin(std::future::ready(bound))
    }
}

impl ServeLinks for Home {
    fn turn_away(&self, _: SocketAddr, _: &Purpose) -> Option<Duration> {
        *self.turned_away.lock().unwrap()
    }

    fn serve(self: Arc<Self>, call: IncomingCall) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let mut socket = call.socket.await.unwrap();
            let byte = socket.read_u8().await.unwrap();
            self.calls.send((call.purpose, byte)).unwrap();
        })
    }

    fn count_other_node(&self, claimed: Option<&NodeName>, _: &str) {
        self.other_node.lock().unwrap().push(claimed.cloned());
    }
}

/// The id of a token that is bound to n1.
const JOIN_TOKEN_ID: &str = "abcdefghijkl";
const UNBOUND_JOIN_TOKEN_ID: &str = "mnopqrstuvwx";

fn join_token(id: &str) -> String {
    format!("Authorization: Bearer mat1.{id}.{}\r\n", "s".repeat(43))
}

struct Greeting;

impl Page for Greeting {
    fn serves(&self, path: &str) -> bool {
        ["/agent/page/", PANICS].contains(&path)
    }

    fn is_long_running(&self, _: &str) -> bool {
        false
    }

    fn answer(
        self: Arc<Self>,
        path: String,
        _: Request<RequestBody>,
        _: String,
        origin: Origin,
    ) -> BoxFuture<'static, Response<admin::Body>> {
        assert_ne!(path, PANICS, "the handler's bug");
        let text = format!("hello, {}, served by thread {}", origin.0, workers::current());
        let answer = respond((hyper::StatusCode::OK, "text/plain", text));
        Box::pin(std::future::ready(answer))
    }
}

struct NoNodes;

impl NodeActivities for NoNodes {
    fn activity(&self, _: &NodeName) -> Option<Arc<NodeActivity>> {
        None
    }
}

#[tokio::test]
async fn kube_apiserver_answers_and_learns_who_the_caller_is() {
    let mut world = World::new("audit: {file: audit.log}").await;
    let answer = world.ask("GET /api/v1/pods", &format!("{JANE}X-Remote-User: admin\r\n")).await;
    assert_eq!(status(&answer), "200", "{answer}");
    {
        let seen = world.upstream.lock().unwrap();
        let [(path, headers)] = &seen[..] else { panic!("{seen:?}") };
        assert_eq!((path.as_str(), headers["x-remote-user"].as_bytes()), ("/api/v1/pods", &b"jane"[..]));
        assert!(
            headers.get_all("x-remote-user").iter().count() == 1 && !headers.contains_key("authorization")
        );
    }
    let line = &world.audited().await[0];
    assert_eq!(
        (&line["user"], &line["decision"], &line["code"]),
        (&"jane".into(), &"allow".into(), &200.into())
    );
    assert_eq!((&line["verb"], &line["resource"]), (&"list".into(), &"pods".into()));
}

#[tokio::test]
async fn each_request_of_a_connection_names_its_own_user() {
    let world = World::new("audit: {file: audit.log}").await;
    let request = |path: &str, credential: &str, end: &str| {
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{credential}{end}\r\n")
    };
    let requests = [
        request("/a", JANE, ""),
        request("/b", N1, ""),
        request("/c", JANE, ""),
        request("/d", N1, "Connection: close\r\n"),
    ];
    exchange(&mut world.connect(), &requests.concat()).await;
    let seen = world.upstream.lock().unwrap();
    let users =
        seen.iter().map(|(path, headers)| (path.as_str(), headers["x-remote-user"].to_str().unwrap()));
    let (jane, n1) = ("jane", "system:node:n1");
    assert_eq!(users.collect::<Vec<_>>(), [("/a", jane), ("/b", n1), ("/c", jane), ("/d", n1)]);
}

#[tokio::test]
async fn a_connection_remembers_the_headers_of_one_user_only() {
    let world = World::new("audit: {file: audit.log}").await;
    let peer = Peer::Address("192.0.2.1:5000".parse().unwrap());
    let admission = world.front_end.admit(&peer).unwrap();
    let certificates = Certificates::default();
    let connection = Connection::over_tls(world.front_end.clone(), peer.clone(), certificates, admission);
    let user = |name: &str| Arc::new(User { name: name.to_owned(), ..User::default() });
    let (jane, other_jane, joe, large) = (user("jane"), user("jane"), user("joe"), user(&"x".repeat(5000)));
    let mut last = None;
    for (user, is_remembered) in [
        (&jane, false),
        (&jane, true),
        (&joe, false),
        (&joe, true),
        (&jane, false),
        (&other_jane, false),
        (&large, false),
        (&large, false),
    ] {
        let lines = connection.identity_lines(user).unwrap();
        assert_eq!(*lines, world.front_end.identity.lines(user, peer.ip()).unwrap());
        assert_eq!(last.is_some_and(|last| Arc::ptr_eq(&last, &lines)), is_remembered, "{:.9}", user.name);
        last = Some(lines);
    }
}

#[tokio::test]
async fn whoever_is_not_authenticated_gets_401_and_reaches_nothing() {
    let mut world = World::new("audit: {file: audit.log}").await;
    for headers in ["", "Authorization: Bearer wrong\r\n", &format!("{JANE}{JANE}")] {
        let answer = world.ask("GET /api/v1/pods", headers).await;
        assert_eq!(status(&answer), "401", "{headers:?}: {answer}");
        let message = "\"message\":\"Unauthorized\"";
        assert!(answer.contains(message), "the answer says nothing about the reason: {answer}");
    }
    assert!(world.upstream_requests().is_empty());
    let lines = world.audited().await;
    assert_eq!(lines.len(), 3);
    for line in lines {
        assert_eq!((&line["user"], &line["decision"]), (&Value::Null, &"unauthenticated".into()), "{line}");
    }
}

#[tokio::test]
async fn an_ambiguous_head_is_rejected_and_ends_its_connection() {
    let world = World::new("audit: {file: audit.log}").await;
    for headers in ["Host: other\r\n", "Transfer-Encoding: gzip, chunked\r\n"] {
        let mut socket = world.connect();
        let second = format!("GET /second HTTP/1.1\r\nHost: localhost\r\n{JANE}\r\n");
        let requests = format!("GET /first HTTP/1.1\r\nHost: localhost\r\n{JANE}{headers}\r\n{second}");
        let answer = exchange(&mut socket, &requests).await;
        assert_eq!(status(&answer), "400", "{headers:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{headers:?}: {answer}");
    }
    let encoded = world.ask("GET /api/v1//pods", JANE).await;
    assert_eq!(status(&encoded), "400", "{encoded}");
    assert!(world.upstream_requests().is_empty());
}

#[tokio::test]
async fn a_request_is_served_only_once_its_record_has_room() {
    let mut world = World::new("audit: {file: audit.log, queue: 1, wait: 0s}").await;
    let permit = world.front_end.audit.reserve(Queue::Authenticated).await.unwrap();
    let answer = world.ask("GET /api/v1/pods", JANE).await;
    assert_eq!(status(&answer), "503", "{answer}");
    assert!(answer.contains("can't be recorded") && world.upstream_requests().is_empty(), "{answer}");
    drop(permit);
    let answer = world.ask("GET /api/v1/pods", JANE).await;
    assert_eq!(status(&answer), "200", "{answer}");
    let lines = world.audited().await;
    let served = lines.iter().filter(|line| line["code"] == 200).count();
    assert_eq!(served, world.upstream_requests().len(), "{lines:?}");
}

#[tokio::test]
async fn a_seat_is_kept_until_the_last_byte_has_left() {
    let limits = "limits: {max_in_flight_per_user: 1, queue_timeout: 50ms}";
    let world = World::new(&format!("audit: {{file: audit.log}}\n{limits}")).await;
    let mut slow = world.connect();
    let request = format!("GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{JANE}\r\n");
    slow.write_all(request.as_bytes()).await.unwrap();
    let mut begin = [0; 12];
    slow.read_exact(&mut begin).await.unwrap();
    assert_eq!(&begin, b"HTTP/1.1 200");
    let answer = world.ask("GET /api/v1/pods", JANE).await;
    assert_eq!(status(&answer), "429", "jane still reads: {answer}");
    let answer = world.ask("GET /api/v1/pods", N1).await;
    assert_eq!(status(&answer), "200", "others have seats of their own: {answer}");
    let mut rest = Vec::new();
    slow.read_to_end(&mut rest).await.unwrap();
    assert!(rest.len() > LARGE);
    let answer = world.ask("GET /api/v1/pods", JANE).await;
    assert_eq!(status(&answer), "200", "{answer}");
}

#[tokio::test]
async fn the_page_is_answered_here_for_whoever_is_authenticated() {
    let world = World::new("audit: {file: audit.log}").await;
    let answer = world.ask("GET /agent/page/", JANE).await;
    assert!(status(&answer) == "200" && answer.contains("of \"jane\" from 192.0.2.1:5000"), "{answer}");
    assert_eq!(status(&world.ask("GET /agent/page/", "").await), "401");
    assert!(world.upstream_requests().is_empty());
}

/// Makes a request over HTTP/2, and returns its response once the head has arrived.
async fn get(sender: &mut http2::SendRequest<Empty<Bytes>>, path: &str) -> Response<Incoming> {
    let request = Request::get(format!("https://localhost{path}"))
        .header("authorization", "Bearer token-of-jane")
        .body(Empty::new())
        .unwrap();
    sender.send_request(request).await.unwrap()
}

#[tokio::test]
async fn a_handler_that_panics_fails_its_own_request_and_no_other_of_the_connection() {
    let mut world = World::new("audit: {file: audit.log}").await;
    let peer = Peer::Address("192.0.2.1:5000".parse().unwrap());
    let admission = world.front_end.admit(&peer).unwrap();
    let (near, far) = duplex(1024);
    let served = world.tasks.spawn(world.front_end.clone().serve_caller(far, peer, admission));
    let trust = ClientTls { ca: Some(world.dir.join("tls.crt")), identity: None };
    let mut config = trust.config().unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tls = TlsConnector::from(Arc::new(config));
    let near = tls.connect(ServerName::try_from("localhost").unwrap(), near).await.unwrap();
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(near)).await.unwrap();
    world.tasks.spawn(connection);

    let large = get(&mut sender, "/large").await;
    let failed = get(&mut sender, PANICS).await;
    assert_eq!(failed.status(), 500);
    let body = failed.into_body().collect().await.unwrap().to_bytes();
    let failure: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((&failure["kind"], &failure["reason"]), (&"Status".into(), &"InternalError".into()));
    let message = failure["message"].as_str().unwrap();
    assert!(!message.contains("the handler's bug"), "{message}");
    let body = large.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body.len(), LARGE, "a response in progress is completed");
    assert_eq!(get(&mut sender, "/agent/page/").await.status(), 200, "and the connection takes requests");

    // The records are written once the connection has ended.
    drop(sender);
    served.await.unwrap();
    let lines = world.audited().await;
    let line = lines.iter().find(|line| line["code"] == 500).unwrap();
    assert_eq!((&line["user"], &line["decision"]), (&"jane".into(), &"allow".into()), "{line}");
}

#[tokio::test]
async fn a_call_home_becomes_a_link_of_the_credentials_own_node() {
    let mut world = World::new("audit: {file: audit.log}").await;
    let node: NodeName = "n1".parse().unwrap();
    let joining = join_token(JOIN_TOKEN_ID);
    for (subresource, credential, purpose) in [
        ("link", N1, Purpose::Link(node.clone())),
        ("join", N1, Purpose::Join(Some(node.clone()))),
        ("join", joining.as_str(), Purpose::Join(Some(node))),
    ] {
        let mut socket = world.connect();
        let head = call_home(&mut socket, &format!("n1/{subresource}"), credential).await;
        assert_eq!(status(&head), "101", "{head}");
        socket.write_u8(7).await.unwrap();
        assert_eq!(world.calls.recv().await, Some((purpose, 7)));
    }
    assert!(world.upstream_requests().is_empty());
}

#[tokio::test]
async fn a_call_home_beside_too_many_others_is_told_when_to_come_again() {
    let mut world = World::new("audit: {file: audit.log}").await;
    *world.home.turned_away.lock().unwrap() = Some(Duration::from_millis(4200));
    let head = call_home(&mut world.connect(), "n1/link", N1).await;
    assert_eq!(status(&head), "503", "{head}");
    assert!(head.to_ascii_lowercase().contains("\r\nretry-after: 5\r\n"), "{head}");
    *world.home.turned_away.lock().unwrap() = None;
    let mut socket = world.connect();
    let head = call_home(&mut socket, "n1/link", N1).await;
    assert_eq!(status(&head), "101", "{head}");
    socket.write_u8(7).await.unwrap();
    assert_eq!(world.calls.recv().await, Some((Purpose::Link("n1".parse().unwrap()), 7)));
}

#[tokio::test]
async fn a_call_home_that_is_not_as_it_should_be_is_rejected() {
    let mut world = World::new("audit: {file: audit.log}").await;
    let path = |rest: &str| format!("POST /apis/master-agent/v1/nodes/{rest}");
    let (known, unknown) = (join_token(JOIN_TOKEN_ID), join_token("zyxwvutsrqpo"));
    for (line, headers, code) in [
        (path("n1/link"), N1.to_owned(), "400"),
        (path("N1/link"), format!("{LINK}{N1}"), "400"),
        (path("n1/link").replace("POST", "GET"), format!("{LINK}{N1}"), "400"),
        (path("n1/link").replace("POST", "PUT"), format!("{LINK}{N1}"), "400"),
        (path("n1/link").replace("/nodes", "/watch/nodes"), format!("{LINK}{N1}"), "400"),
        (path("n2/link"), format!("{LINK}{N1}"), "403"),
        (path("n2/join"), format!("{LINK}{known}"), "403"),
        (path("n1/link"), format!("{LINK}{known}"), "401"),
        (path("n1/join"), format!("{LINK}{unknown}"), "401"),
        (path("n1/link"), LINK.to_owned(), "401"),
    ] {
        let mut socket = world.connect();
        let request = format!("{line} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: 0\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut begin = [0; 12];
        socket.read_exact(&mut begin).await.unwrap();
        assert_eq!(&begin[9..], code.as_bytes(), "{line} {headers}");
    }
    let other: NodeName = "n2".parse().unwrap();
    let counted = std::mem::take(&mut *world.home.other_node.lock().unwrap());
    assert_eq!(counted, [Some(other.clone()), Some(other)]);
    assert!(world.calls.try_recv().is_err() && world.upstream_requests().is_empty());
}

#[tokio::test]
async fn a_request_for_a_node_in_a_namespace_is_no_call_home() {
    let mut world = World::new("audit: {file: audit.log}").await;
    let paths =
        ["link", "join"].map(|last| format!("/apis/master-agent/v1/namespaces/team-x/nodes/n1/{last}"));
    for path in &paths {
        let mut socket = world.connect();
        let head = format!("POST {path} HTTP/1.1\r\nHost: localhost\r\n{LINK}{N1}Content-Length: 0\r\n\r\n");
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut begin = [0; 12];
        socket.read_exact(&mut begin).await.unwrap();
        assert_eq!(&begin, b"HTTP/1.1 200", "kube-apiserver answers {path}");
    }
    assert_eq!(world.upstream_requests(), paths);
    assert!(world.calls.try_recv().is_err());
}

#[tokio::test]
async fn who_invents_nodes_meets_the_limits_of_their_own_user() {
    const CALLS: usize = 20;
    let mut world = World::new("audit: {file: audit.log}\nlimits: {requests_per_second_per_user: 1}").await;
    let (began, mut links) = (Instant::now(), Vec::new());
    for i in 0..CALLS {
        let (mut socket, served) = world.serve();
        let head = call_home(&mut socket, &format!("invented-{i}/link"), JANE).await;
        if status(&head) == "101" {
            links.push(socket);
            continue;
        }
        assert_eq!(status(&head), "429", "{head}");
        assert!(head.to_lowercase().contains("retry-after: 1\r\n"), "{head}");
        // The record is written once the connection has ended.
        drop(socket);
        served.await.unwrap();
    }
    // Two requests are allowed at once, and then one in a second.
    assert!(links.len() as u64 <= 2 + began.elapsed().as_secs(), "{} links", links.len());
    let lines = world.audited().await;
    let limited: Vec<_> = lines.iter().filter(|line| line["code"] == 429).collect();
    assert_eq!(limited.len(), CALLS - links.len());
    for line in limited {
        assert_eq!((&line["decision"], &line["authorizer"]), (&"limited".into(), &Value::Null), "{line}");
    }
}

#[tokio::test]
async fn nodes_that_share_a_user_have_seats_of_their_own() {
    let limits = "limits: {max_in_flight_per_user: 1, long_running_per_user: 1}";
    let world = World::new(&format!("audit: {{file: audit.log}}\n{limits}")).await;
    let mut open = Vec::new();
    for (node, code) in [("n5", "101"), ("n6", "101"), ("n5", "429"), ("n7", "101")] {
        let mut socket = world.connect();
        let head = call_home(&mut socket, &format!("{node}/link"), JANE).await;
        assert_eq!(status(&head), code, "{node}: {head}");
        open.push(socket);
    }
    assert_eq!(world.front_end.load_now().in_flight, 0, "links take no seats of short requests");
    // A join token is for one host, whatever names its holder gives.
    let token = join_token(UNBOUND_JOIN_TOKEN_ID);
    for (path, code) in [("n8/join", "101"), ("n9/join", "429")] {
        let mut socket = world.connect();
        let head = call_home(&mut socket, path, &token).await;
        assert_eq!(status(&head), code, "{path}: {head}");
        open.push(socket);
    }
}

#[tokio::test]
async fn a_wrong_credential_counts_as_a_failure_although_another_server_is_away() {
    // Nothing listens there.
    let webhook = "{webhook: {url: 'https://127.0.0.1:1/', ca: tls.crt}}";
    let chain = format!("[{{bootstrap_tokens: {{file: bootstrap.csv}}}}, {webhook}]");
    let lines = "audit: {file: audit.log}\nlimits: {failures_per_second_per_address: 1}";
    let world = World::with(&chain, lines).await;
    for i in 0..5 {
        let answer = world.ask("GET /api/v1/pods", &format!("Authorization: Bearer opaque-{i}\r\n")).await;
        assert_eq!(status(&answer), "503", "only the webhook may know it: {answer}");
    }
    let mut limited = 0;
    for i in 0..30 {
        let guess = format!("Authorization: Bearer abcdef.{i:016}\r\n");
        match status(&world.ask("GET /api/v1/pods", &guess).await) {
            "503" => {}
            "429" => limited += 1,
            other => panic!("{other}"),
        }
    }
    assert!(limited > 0, "guesses are counted while the webhook is away");
}

#[tokio::test]
async fn who_comes_through_a_tunnel_is_served_by_a_worker_thread() {
    let world = World::new("audit: {file: audit.log}").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let caller = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    let peer = Peer::Node { name: "n1".parse().unwrap(), address: None };
    let admission = world.front_end.admit(&peer).unwrap();
    let front_end = world.front_end.clone();
    let carried =
        world.tasks.spawn(async move { carry(&front_end, &peer, stream.into(), "a pod", admission).await });
    let trust = ClientTls { ca: Some(world.dir.join("tls.crt")), identity: None };
    let tls = TlsConnector::from(Arc::new(trust.config().unwrap()));
    let mut caller = tls.connect(ServerName::try_from("localhost").unwrap(), caller).await.unwrap();
    let request = format!("GET /agent/page/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{JANE}\r\n");
    caller.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    caller.read_to_string(&mut answer).await.unwrap();
    assert!(status(&answer) == "200" && answer.contains("of \"jane\" from node n1"), "{answer}");
    let thread = answer.trim_end().rsplit(' ').next().unwrap();
    assert!((1..=workers::count()).contains(&thread.parse().unwrap()), "{answer}");
    // The stream and the connection end together.
    drop(caller);
    assert_eq!(carried.await.unwrap(), Some(()));
    assert_eq!(world.front_end.load_now().connections, 0);
}
