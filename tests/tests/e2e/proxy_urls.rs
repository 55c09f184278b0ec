//! Proxy URLs as kube-apiserver has them, against real targets behind a node's tunnel.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Frame, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tests::{
    apiserver::{self, ApiServer},
    client::Io,
    cluster::{Cluster, Kind, Options, SOON, binary},
    load::completes,
    netns::Namespace,
    pki::Authority,
    process::{Process, TempDir, eventually, free_port},
    steady::Health,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream, UnixStream},
    sync::mpsc,
};
use tokio_rustls::TlsAcceptor;

const KUBELET: u16 = 10250;

type Body = BoxBody<Bytes, std::convert::Infallible>;

/// A node n1 on 127.0.0.1 with a stand-in for its kubelet, and a port for targets of the test's own.
struct Site {
    cluster: Cluster,
    pki: Pki,
    port: u16,
    tcp: SocketAddr,
    kubelet: Option<Process>,
}

struct Pki {
    dir: TempDir,
    ca: Authority,
}

impl Pki {
    fn new() -> Self {
        let dir = TempDir::new("pki").unwrap();
        let ca = Authority::new(&format!("kubelet CA {:08x}", rand::random::<u32>())).unwrap();
        std::fs::write(dir.path().join("ca.crt"), ca.pem()).unwrap();
        ca.client(dir.path(), "master").unwrap();
        Self { dir, ca }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    fn acceptor(&self, name: &str, names: &[&str]) -> TlsAcceptor {
        self.ca.server(self.dir.path(), name, names).unwrap();
        acceptor(&self.path(&format!("{name}.crt")), &self.path(&format!("{name}.key")))
    }
}

fn acceptor(certificate: &Path, key: &Path) -> TlsAcceptor {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let chain = CertificateDer::pem_file_iter(certificate).unwrap().collect::<Result<_, _>>().unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(key).unwrap())
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

impl Site {
    async fn start() -> Self {
        Self::start_with("").await
    }

    /// `more` are lines of the section `proxy_urls`.
    async fn start_with(more: &str) -> Self {
        Self::start_beside(more, Vec::new()).await
    }

    /// With further targets that the node's policy allows.
    async fn start_beside(more: &str, targets: Vec<SocketAddr>) -> Self {
        let pki = Pki::new();
        let (port, tcp) = (free_port(), SocketAddr::from(([127, 0, 0, 1], free_port())));
        let show = |file: &str| pki.path(file).display().to_string();
        let cluster = Cluster::start(Options {
            nodes: vec![("n1".to_owned(), Kind::Dialled)],
            ports: vec![port],
            targets,
            master_config: format!(
                "proxy_urls:\n  unix: {{path: proxy.sock}}\n  tcp: {{listen: '{tcp}'}}\n  kubelet_ca: {}\n  \
                 kubelet_client_cert: {}\n  kubelet_client_key: {}\n  target_ca: {}\n{more}",
                show("ca.crt"),
                show("master.crt"),
                show("master.key"),
                show("ca.crt"),
            ),
            ..Options::default()
        })
        .await
        .unwrap();
        Self { cluster, pki, port, tcp, kubelet: None }
    }

    /// With a kubelet whose certificate has these names.
    fn with_kubelet(mut self, names: &[&str]) -> Self {
        self.pki.ca.server(self.pki.dir.path(), "kubelet", names).unwrap();
        let mut command = Command::new(binary("standin"));
        command.args(["--name", "n1", "--kubelet", "127.0.0.1:10250"]);
        command
            .arg("--cert")
            .arg(self.pki.path("kubelet.crt"))
            .arg("--key")
            .arg(self.pki.path("kubelet.key"));
        self.kubelet = Some(Process::start("kubelet", &mut command, &self.pki.path("kubelet.log")).unwrap());
        tests::openssh::wait_for_port(KUBELET).unwrap();
        self
    }

    fn socket(&self) -> PathBuf {
        self.cluster.path().join("proxy.sock")
    }

    async fn unix(&self) -> UnixStream {
        UnixStream::connect(self.socket()).await.unwrap()
    }

    fn curl(&self, args: &[&str]) -> String {
        let output = Command::new("curl")
            .args(["-sS", "--unix-socket", self.socket().to_str().unwrap()])
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    async fn send(&self, request: Request<Body>) -> Response<Incoming> {
        send(self.unix().await, request).await
    }

    async fn get(&self, path: &str) -> (StatusCode, Value) {
        let (status, text) = text(self.send(get(path)).await).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// A path to the test's own targets.
    fn own(&self, rest: &str) -> String {
        format!("/api/v1/nodes/n1:{}/proxy{rest}", self.port)
    }

    async fn listen(&self) -> TcpListener {
        TcpListener::bind(("127.0.0.1", self.port)).await.unwrap()
    }
}

fn get(path: &str) -> Request<Body> {
    request(Method::GET, path, Full::default().boxed())
}

fn request(method: Method, path: &str, body: Body) -> Request<Body> {
    Request::builder().method(method).uri(path).header("Host", "localhost").body(body).unwrap()
}

async fn send(socket: impl Io + 'static, request: Request<Body>) -> Response<Incoming> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    completes("a response", sender.send_request(request)).await.unwrap()
}

async fn text(response: Response<Incoming>) -> (StatusCode, String) {
    let status = response.status();
    let bytes = completes("a body", response.into_body().collect()).await.unwrap().to_bytes();
    (status, String::from_utf8(bytes.to_vec()).unwrap())
}

/// A target that takes one connection: gives the head of the request, and the socket.
async fn one(listener: &TcpListener) -> (String, TcpStream) {
    let (mut socket, _) = completes("a connection to the target", listener.accept()).await.unwrap();
    socket.set_nodelay(true).unwrap();
    let head = head(&mut socket).await;
    (head, socket)
}

async fn head(socket: &mut (impl Io + ?Sized)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(completes("a head", socket.read_u8()).await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

fn message(value: &Value) -> &str {
    value["message"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn a_kubelet_is_reached_verified_and_by_curl() {
    let site = Site::start().await.with_kubelet(&["n1"]);
    assert_eq!(site.curl(&["http://localhost/api/v1/nodes/n1/proxy/healthz"]), "ok");
    let tcp = format!("http://{}/api/v1/nodes/n1:10250/proxy/healthz", site.tcp);
    let output = Command::new("curl").args(["-sS", &tcp]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "ok", "{}", String::from_utf8_lossy(&output.stderr));
    let (status, pods) = site.get("/api/v1/nodes/n1/proxy/pods").await;
    assert_eq!((status, &pods["kind"]), (StatusCode::OK, &Value::from("PodList")));
    // As curl does it: a body with 100-continue, and a large one back.
    let file = site.pki.path("upload");
    std::fs::write(&file, vec![7; 30_000_000]).unwrap();
    let sent = site.curl(&[
        "-T",
        file.to_str().unwrap(),
        "-H",
        "Expect: 100-continue",
        "http://localhost/api/v1/nodes/n1/proxy/upload",
    ]);
    assert!(sent.contains("\"bytes\":30000000"), "{sent}");
    let out = site.pki.path("download");
    site.curl(&["-o", out.to_str().unwrap(), "http://localhost/api/v1/nodes/https:n1:/proxy/bytes/30000000"]);
    assert_eq!(std::fs::metadata(&out).unwrap().len(), 30_000_000);
    let log = site.cluster.master.log_text();
    assert!(log.contains("egress=\"proxy-url-unix\"") && log.contains("egress=\"proxy-url-tcp\""), "{log}");
}

#[tokio::test]
async fn a_certificate_for_the_nodes_address_will_do_and_one_for_another_node_names_both() {
    let site = Site::start().await.with_kubelet(&["127.0.0.1"]);
    assert_eq!(site.get("/api/v1/nodes/n1/proxy/healthz").await, (StatusCode::OK, Value::from("ok")));
    drop(site);
    let site = Site::start().await.with_kubelet(&["n2.example", "127.0.0.2"]);
    let (status, failure) = site.get("/api/v1/nodes/n1/proxy/healthz").await;
    assert_eq!((status, &failure["kind"]), (StatusCode::BAD_GATEWAY, &Value::from("Status")));
    for name in ["n1", "n2.example", "127.0.0.2"] {
        assert!(message(&failure).contains(name), "{failure}");
    }
    // An unknown CA is not a wrong name.
    let stranger = Pki::new();
    drop(site);
    let mut site = Site::start().await;
    site.pki.ca = stranger.ca;
    let site = site.with_kubelet(&["n1"]);
    let (status, failure) = site.get("/api/v1/nodes/n1/proxy/healthz").await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(message(&failure).contains("UnknownIssuer"), "{failure}");
}

#[tokio::test]
async fn a_body_that_trickles_arrives_piece_by_piece_both_ways() {
    let site = Site::start().await;
    let listener = site.listen().await;
    let (up, pieces) = mpsc::unbounded_channel::<Result<Frame<Bytes>, std::convert::Infallible>>();
    let body = StreamBody::new(futures_util::stream::unfold(pieces, |mut pieces| async {
        pieces.recv().await.map(|piece| (piece, pieces))
    }));
    let sent = site.send(request(Method::POST, &site.own("/a"), BodyExt::boxed(body)));
    let target = async {
        let (head, mut socket) = one(&listener).await;
        assert!(
            head.starts_with("POST /a HTTP/1.1\r\n") && head.contains("transfer-encoding: chunked"),
            "{head}"
        );
        socket.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
        socket
    };
    let (response, mut socket) = tokio::join!(sent, target);
    let mut body = response.into_body();
    // Each piece goes only after the one before has been seen at the other end.
    for i in 0..20 {
        let piece = format!("{i:05}");
        up.send(Ok(Frame::data(Bytes::from(piece.clone())))).unwrap();
        let mut seen = [0; 10];
        completes("a piece on its way up", socket.read_exact(&mut seen)).await.unwrap();
        assert_eq!(seen, format!("5\r\n{piece}\r\n").as_bytes());
        socket.write_all(&seen).await.unwrap();
        let frame = completes("a piece on its way down", body.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), piece.as_bytes());
    }
    drop(up);
    socket.write_all(b"0\r\n\r\n").await.unwrap();
    assert!(completes("the end", body.frame()).await.is_none());
}

#[tokio::test]
async fn websockets_are_relayed() {
    let site = Site::start().await;
    let listener = site.listen().await;
    tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let mut socket = tokio_tungstenite::accept_async(socket).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            if socket.send(message).await.is_err() {
                break;
            }
        }
    });
    let url = format!("ws://localhost{}", site.own("/echo?x=%20y"));
    let handshake = tokio_tungstenite::client_async(url, site.unix().await);
    let (mut socket, response) = completes("a handshake", handshake).await.unwrap();
    assert_eq!(response.status(), 101);
    for i in 0..200 {
        let text = format!("{i}").repeat(i + 1);
        socket.send(text.as_str().into()).await.unwrap();
        let heard = completes("an echo", socket.next()).await.unwrap().unwrap();
        assert_eq!(heard.into_text().unwrap().as_str(), text);
    }
    socket.close(None).await.unwrap();
    while let Some(Ok(_)) = completes("the close", socket.next()).await {}
}

#[tokio::test]
async fn any_protocol_can_be_upgraded_to_over_tls_and_halves_close_alone() {
    let site = Site::start().await;
    let acceptor = site.pki.acceptor("spdy", &["n1"]);
    let listener = TcpListener::bind(("127.0.0.1", KUBELET)).await.unwrap();
    let target = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let mut socket = acceptor.accept(socket).await.unwrap();
        let head = head(&mut socket).await;
        socket
            .write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\nfirst",
            )
            .await
            .unwrap();
        let mut heard = Vec::new();
        // The caller's end is seen while the other direction stays open.
        socket.read_to_end(&mut heard).await.unwrap();
        socket.write_all(&heard).await.unwrap();
        socket.shutdown().await.unwrap();
        head
    });
    let mut socket = site.unix().await;
    socket
        .write_all(b"POST /api/v1/nodes/n1/proxy/exec/default/web/web?command=ls&stdin=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\nAuthorization: Bearer secret\r\nContent-Length: 0\r\n\r\n")
        .await
        .unwrap();
    let answer = completes("101", head(&mut socket)).await;
    assert!(
        answer.starts_with("HTTP/1.1 101 ") && answer.to_lowercase().contains("upgrade: spdy/3.1"),
        "{answer}"
    );
    let mut first = [0; 5];
    completes("the first bytes", socket.read_exact(&mut first)).await.unwrap();
    assert_eq!(&first, b"first");
    let said: Vec<u8> = (0..=255).cycle().take(1_000_000).collect();
    socket.write_all(&said).await.unwrap();
    socket.shutdown().await.unwrap();
    let mut heard = Vec::new();
    completes("the echo", socket.read_to_end(&mut heard)).await.unwrap();
    assert!(heard == said, "{} bytes", heard.len());
    let head = target.await.unwrap();
    assert!(head.starts_with("POST /exec/default/web/web?command=ls&stdin=1 HTTP/1.1\r\n"), "{head}");
    let head = head.to_lowercase();
    assert!(
        head.contains("x-stream-protocol-version: v4.channel.k8s.io") && !head.contains("secret"),
        "{head}"
    );
}

/// What a target gets of a request, and the caller of a fixed answer.
async fn exchange(site: &Site, listener: &TcpListener, raw: &str, answer: &str) -> (String, String) {
    let mut socket = site.unix().await;
    socket.write_all(raw.as_bytes()).await.unwrap();
    let (got, mut target) = one(listener).await;
    target.write_all(answer.as_bytes()).await.unwrap();
    target.shutdown().await.unwrap();
    let mut heard = Vec::new();
    completes("an answer", socket.read_to_end(&mut heard)).await.unwrap();
    (got, String::from_utf8(heard).unwrap())
}

#[tokio::test]
async fn methods_paths_queries_and_headers_arrive_as_they_are() {
    let site = Site::start().await;
    let listener = site.listen().await;
    let rest = "/..%2f..%2Fetc/%20a;b=c//d/./e?x=%2F&y=a+b&&z";
    for method in ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "X-OWN"] {
        let raw = format!(
            "{method} {} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\nCookie: a=b\r\n\
             X-Own: 1\r\nX-Hop: 2\r\nConnection: close, X-Hop\r\n\r\n",
            site.own(rest)
        );
        let (got, heard) = exchange(
            &site,
            &listener,
            &raw,
            "HTTP/1.1 299 Fine\r\nX-Target: 1\r\nKeep-Alive: 5\r\nLocation: /login/\r\nSet-Cookie: c=d\r\n\r\nbody",
        )
        .await;
        assert!(got.starts_with(&format!("{method} {rest} HTTP/1.1\r\n")), "{got}");
        let head = got.to_lowercase();
        for line in [
            "cookie: a=b".to_owned(),
            "x-own: 1".to_owned(),
            "connection: close".to_owned(),
            format!("host: n1:{}", site.port),
            "x-forwarded-host: localhost".to_owned(),
            "x-forwarded-proto: http".to_owned(),
            format!("x-forwarded-uri: {}", site.own(rest.split('?').next().unwrap()).to_lowercase()),
        ] {
            assert_eq!(head.matches(&format!("\r\n{line}\r\n")).count(), 1, "{line}:\n{got}");
        }
        assert!(!got.contains("secret") && !head.contains("x-hop"), "{got}");
        let head = heard.to_lowercase();
        assert!(heard.starts_with("HTTP/1.1 299 ") && heard.contains("body"), "{heard}");
        let location = format!("location: {}\r\n", site.own("/login/"));
        assert!(
            head.contains("x-target: 1") && head.contains("set-cookie: c=d") && head.contains(&location),
            "{heard}"
        );
        assert!(!head.contains("keep-alive"), "{heard}");
    }
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let site = Site::start().await;
    let listener = site.listen().await;
    let mut socket = site.unix().await;
    let raw = format!(
        "POST {} HTTP/1.1\r\nHost: localhost\r\nTE: trailers\r\nConnection: TE\r\nTransfer-Encoding: chunked\r\nTrailer: X-Up\r\n\r\n2\r\nhi\r\n0\r\nX-Up: 1\r\n\r\n",
        site.own("/")
    );
    socket.write_all(raw.as_bytes()).await.unwrap();
    let (got, mut target) = one(&listener).await;
    assert!(got.to_lowercase().contains("te: trailers"), "{got}");
    let body = completes("a body with trailers", head(&mut target)).await.to_lowercase();
    assert_eq!(body, "2\r\nhi\r\n0\r\nx-up: 1\r\n\r\n");
    let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Down\r\n\r\n2\r\nho\r\n0\r\nX-Down: 2\r\n\r\n";
    target.write_all(answer.as_bytes()).await.unwrap();
    let answer = completes("a head", head(&mut socket)).await.to_lowercase();
    assert!(answer.contains("trailer: x-down"), "{answer}");
    let body = completes("a body with trailers", head(&mut socket)).await.to_lowercase();
    assert_eq!(body, "2\r\nho\r\n0\r\nx-down: 2\r\n\r\n");
}

#[tokio::test]
async fn what_fails_is_a_status_object() {
    let site = Site::start().await;
    for (path, code, said) in [
        (site.own("/"), 502, "connection refused"),
        (format!("/api/v1/nodes/n1:{}/proxy/", free_port()), 403, "refused by node policy"),
        ("/api/v1/nodes/n9/proxy/".to_owned(), 404, "n9"),
        ("/api/v1/nodes/n1:0/proxy/".to_owned(), 400, "port"),
        ("/api/v1/nodes/N1/proxy/".to_owned(), 400, "node name"),
        ("/api/v1/namespaces/default/pods/web/proxy/".to_owned(), 404, "default/web"),
        ("/api/v1/namespaces/default/services/web:http/proxy/".to_owned(), 404, "default/web"),
        ("/api/v1/nodes/n1".to_owned(), 404, "no such path"),
        ("/".to_owned(), 404, "no such path"),
    ] {
        let (status, failure) = site.get(&path).await;
        assert_eq!(status.as_u16(), code, "{path}: {failure}");
        assert_eq!(
            (&failure["kind"], &failure["status"]),
            (&Value::from("Status"), &Value::from("Failure")),
            "{path}"
        );
        assert_eq!(failure["code"], code, "{path}");
        assert!(message(&failure).contains(said), "{path}: {failure}");
    }
    // What is no HTTP is no answer of a target either.
    let listener = site.listen().await;
    tokio::spawn(async move {
        let (_, mut socket) = one(&listener).await;
        socket.write_all(b"\x15\x03\x01 what?\r\n\r\n").await.unwrap();
    });
    let (status, failure) = site.get(&site.own("/")).await;
    assert_eq!((status.as_u16(), &failure["kind"]), (502, &Value::from("Status")), "{failure}");

    let moved = site.send(get(&site.own("?a=b%20c"))).await;
    assert_eq!(moved.status(), StatusCode::MOVED_PERMANENTLY);
    assert_eq!(moved.headers()["location"], site.own("/?a=b%20c"));
    assert_eq!(site.send(request(Method::HEAD, &site.own(""), Full::default().boxed())).await.status(), 301);
}

#[tokio::test]
async fn a_page_of_another_origin_gets_nothing() {
    let site = Site::start().await.with_kubelet(&["n1"]);
    let ask = async |lines: &str| {
        let mut socket = TcpStream::connect(site.tcp).await.unwrap();
        let raw = format!("GET /api/v1/nodes/n1/proxy/healthz HTTP/1.1\r\nConnection: close\r\n{lines}\r\n");
        socket.write_all(raw.as_bytes()).await.unwrap();
        let mut answer = String::new();
        completes("an answer", socket.read_to_string(&mut answer)).await.unwrap();
        answer
    };
    let here = site.tcp.to_string();
    let good = format!("Host: {here}\r\n");
    for lines in ["", &good, &format!("{good}Origin: http://{here}\r\nSec-Fetch-Site: same-origin\r\n")] {
        assert!(ask(lines).await.starts_with("HTTP/1.1 200 "), "{lines}");
    }
    for lines in [
        "Host: rebound.example\r\n".to_owned(),
        format!("Host: rebound.example:{}\r\n", site.tcp.port()),
        format!("{good}Origin: http://evil.example\r\n"),
        format!("{good}Origin: null\r\n"),
        format!("{good}Sec-Fetch-Site: cross-site\r\n"),
        format!("{good}Connection: Upgrade\r\nUpgrade: websocket\r\nOrigin: http://evil.example\r\n"),
    ] {
        let answer = ask(&lines).await;
        assert!(
            answer.starts_with("HTTP/1.1 403 ") && answer.contains("\"kind\":\"Status\""),
            "{lines}: {answer}"
        );
    }
}

#[tokio::test]
async fn a_request_has_one_meaning_only() {
    let site = Site::start().await;
    let listener = site.listen().await;
    let path = site.own("/first");
    let second = format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", site.own("/smuggled"));
    // Refused outright; the target sees nothing of any.
    for headers in [
        "Content-Length: 3\r\nContent-Length: 4",
        "Content-Length: 3, 4",
        "Content-Length: +3",
        "Content-Length: -1",
        "Content-Length: 0x3",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding : chunked",
        "X: a\r\n folded: b\r\nContent-Length: 3",
        "X: a\0b",
    ] {
        let mut socket = site.unix().await;
        let raw = format!("POST {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\nabc{second}");
        socket.write_all(raw.as_bytes()).await.unwrap();
        // What is left unread may reset the connection.
        let mut answer = Vec::new();
        socket.shutdown().await.unwrap();
        let _ = completes("an answer", socket.read_to_end(&mut answer)).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(
            answer.starts_with("HTTP/1.1 400 ") || answer.starts_with("HTTP/1.1 501 "),
            "{headers}: {answer}"
        );
    }
    assert!(tokio::time::timeout(Duration::from_millis(300), listener.accept()).await.is_err());
    // With both lengths the chunks count (RFC 9112 §6.3), and the connection ends after it.
    for lengths in
        ["Content-Length: 6\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 6"]
    {
        let raw = format!("POST {path} HTTP/1.1\r\nHost: x\r\n{lengths}\r\n\r\n0\r\n\r\n{second}");
        let mut socket = site.unix().await;
        socket.write_all(raw.as_bytes()).await.unwrap();
        let (got, mut target) = one(&listener).await;
        assert!(got.starts_with("POST /first ") && !got.to_lowercase().contains("content-length"), "{got}");
        let mut body = [0; 5];
        completes("the last chunk", target.read_exact(&mut body)).await.unwrap();
        assert_eq!(&body, b"0\r\n\r\n");
        target.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        let _ = completes("the end", socket.read_to_end(&mut answer)).await;
        assert_eq!(String::from_utf8_lossy(&answer).matches("HTTP/1.1").count(), 1);
        let mut rest = Vec::new();
        completes("the target's end", target.read_to_end(&mut rest)).await.unwrap();
        assert_eq!(rest, b"");
    }
}

#[tokio::test]
async fn slow_large_and_idle_heads_end() {
    let site = Site::start_with("  head_timeout: 500ms\n  idle_timeout: 3s").await.with_kubelet(&["n1"]);
    let health = Health::of(&site.cluster.master);
    let start = b"GET /api/v1/nodes/n1/proxy/healthz HTTP/1.1\r\nHost: x\r\n";
    // Nothing, a part, and a line now and then.
    for said in [&b""[..], b"GET /", start] {
        let mut socket = site.unix().await;
        socket.write_all(said).await.unwrap();
        let _ = completes("the end", socket.read_to_end(&mut Vec::new())).await;
    }
    let mut socket = site.unix().await;
    socket.write_all(start).await.unwrap();
    eventually("the slow one is cut off", SOON, async || {
        tokio::time::sleep(Duration::from_millis(50)).await;
        socket.write_all(b"X: y\r\n").await.is_err().then_some(())
    })
    .await;
    // A kept connection may wait for longer than a head, between requests.
    let mut socket = site.unix().await;
    for _ in 0..3 {
        socket.write_all(&[&start[..], b"\r\n"].concat()).await.unwrap();
        assert!(head(&mut socket).await.starts_with("HTTP/1.1 200 "));
        let mut ok = [0; 2];
        socket.read_exact(&mut ok).await.unwrap();
        tokio::time::sleep(Duration::from_millis(800)).await;
    }
    socket.write_all(start).await.unwrap();
    let _ = completes("the end of a slow later head", socket.read_to_end(&mut Vec::new())).await;
    for more in ["X: y\r\n".repeat(200), format!("X: {}\r\n", "y".repeat(200_000))] {
        let mut socket = site.unix().await;
        let raw = [&start[..], more.as_bytes(), b"\r\n"].concat();
        // It may be refused in the middle.
        let _ = socket.write_all(&raw).await;
        let mut answer = Vec::new();
        let _ = completes("the end", socket.read_to_end(&mut answer)).await;
        assert!(
            answer.is_empty() || answer.starts_with(b"HTTP/1.1 431 "),
            "{}",
            String::from_utf8_lossy(&answer)
        );
    }
    health.check(20_000_000).await;
}

#[tokio::test]
async fn who_leaves_takes_the_target_along_and_what_is_cut_short_does_not_look_whole() {
    let site = Site::start().await;
    let listener = site.listen().await;
    let raw = format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", site.own("/follow"));
    for answer in [
        "",
        "HTTP/1.1 200 OK\r\n\r\nfirst\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n",
    ] {
        let mut socket = site.unix().await;
        socket.write_all(raw.as_bytes()).await.unwrap();
        let (_, mut target) = one(&listener).await;
        target.write_all(answer.as_bytes()).await.unwrap();
        if !answer.is_empty() {
            head(&mut socket).await;
        }
        drop(socket);
        // A reset is an end, too.
        let _ = completes("the target's end", target.read_to_end(&mut Vec::new())).await;
    }
    // Without a length, the end of the connection is the end of the body: unless it was no end in order.
    let mut response = {
        let sent = site.send(get(&site.own("/")));
        let target = async {
            let (_, mut target) = one(&listener).await;
            target.write_all(b"HTTP/1.1 200 OK\r\n\r\nhalf").await.unwrap();
            target
        };
        let (response, target) = tokio::join!(sent, target);
        let mut response = response.into_body();
        let half = completes("a half", response.frame()).await.unwrap().unwrap();
        assert_eq!(half.into_data().unwrap(), &b"half"[..]);
        socket2::SockRef::from(&target).set_linger(Some(Duration::ZERO)).unwrap();
        response
    };
    assert!(completes("an error", response.frame()).await.unwrap().is_err());
}

#[tokio::test]
async fn thousands_of_requests_leave_nothing() {
    let site = Site::start().await.with_kubelet(&["n1"]);
    let kept = async |path: String, requests: usize| {
        let (mut sender, connection) = http1::handshake(TokioIo::new(site.unix().await)).await.unwrap();
        tokio::spawn(connection);
        for _ in 0..requests {
            sender.ready().await.unwrap();
            let response = sender.send_request(get(&path)).await.unwrap();
            response.into_body().collect().await.unwrap();
        }
    };
    let (good, bad) = ("/api/v1/nodes/n1/proxy/healthz".to_owned(), "/api/v1/nodes/n9/proxy/".to_owned());
    completes("a warm-up", kept(good.clone(), 300)).await;
    let master = Health::of(&site.cluster.master);
    let node = Health::of(site.cluster.nodes[0].process.as_ref().unwrap());
    for _ in 0..4 {
        completes("requests", async {
            tokio::join!(kept(good.clone(), 400), kept(good.clone(), 400), kept(bad.clone(), 400))
        })
        .await;
        for _ in 0..100 {
            completes("one that leaves", async {
                let mut socket = site.unix().await;
                let raw = "GET /api/v1/nodes/n1/proxy/bytes/1000000 HTTP/1.1\r\nHost: x\r\n\r\n";
                socket.write_all(raw.as_bytes()).await.unwrap();
                socket.read_u8().await.unwrap();
            })
            .await;
        }
    }
    master.check(10_000_000).await;
    node.check(10_000_000).await;
}

#[tokio::test]
async fn an_idle_connection_does_not_hold_up_the_end() {
    let mut site = Site::start().await.with_kubelet(&["n1"]);
    let mut socket = site.unix().await;
    socket.write_all(b"GET /api/v1/nodes/n1/proxy/healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert!(head(&mut socket).await.starts_with("HTTP/1.1 200 "));
    site.cluster.master.signal("TERM");
    assert_eq!(site.cluster.master.wait(SOON).unwrap(), Some(0));
    let log = site.cluster.master.log_text();
    assert!(log.contains("cut=0"), "{log}");
}

#[tokio::test]
async fn a_target_that_has_ended_takes_a_silent_caller_along() {
    let site = Site::start_with("  half_closed_timeout: 1s").await;
    let health = Health::of(&site.cluster.master);
    let node = Health::of(site.cluster.nodes[0].process.as_ref().unwrap());
    let listener = site.listen().await;
    let mut kept = Vec::new();
    for _ in 0..5 {
        let mut socket = site.unix().await;
        let path = site.own("/");
        let raw = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: own\r\n\r\n");
        socket.write_all(raw.as_bytes()).await.unwrap();
        let (_, mut target) = one(&listener).await;
        let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: own\r\n\r\nlast";
        target.write_all(answer.as_bytes()).await.unwrap();
        head(&mut socket).await;
        target.shutdown().await.unwrap();
        let mut last = Vec::new();
        completes("the target's end", socket.read_to_end(&mut last)).await.unwrap();
        assert_eq!(last, b"last");
        // A reset is an end, too.
        let _ = completes("the end at the target", target.read_to_end(&mut Vec::new())).await;
        kept.push(socket);
    }
    // The callers neither say anything nor leave.
    health.check(20_000_000).await;
    node.check(20_000_000).await;
    for mut socket in kept {
        assert!(socket.write_all(b"x").await.is_err());
    }
}

#[tokio::test]
async fn a_body_that_stalls_is_cut_and_one_whose_response_has_begun_is_not() {
    let site = Site::start_with("  idle_timeout: 1s").await;
    let health = Health::of(&site.cluster.master);
    let listener = site.listen().await;
    let path = site.own("/");
    for (body, seen) in [
        ("Content-Length: 9\r\n\r\nhalf", "half"),
        ("Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "4\r\nhalf\r\n"),
    ] {
        let mut socket = site.unix().await;
        socket.write_all(format!("POST {path} HTTP/1.1\r\nHost: x\r\n{body}").as_bytes()).await.unwrap();
        let (_, mut target) = one(&listener).await;
        let mut answer = String::new();
        completes("an answer, and the end", socket.read_to_string(&mut answer)).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 408 ")
                && answer.contains("the request's body has brought nothing for 1s"),
            "{answer}"
        );
        let mut got = Vec::new();
        // A reset is an end, too.
        let _ = completes("the end at the target", target.read_to_end(&mut got)).await;
        assert_eq!(String::from_utf8(got).unwrap(), seen);
    }
    health.check(20_000_000).await;

    let mut socket = site.unix().await;
    let raw = format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\nhalf");
    socket.write_all(raw.as_bytes()).await.unwrap();
    let (_, mut target) = one(&listener).await;
    target.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n").await.unwrap();
    head(&mut socket).await;
    let mut heard = [0; 8];
    tokio::time::sleep(Duration::from_secs(2)).await;
    socket.write_all(b"+end").await.unwrap();
    completes("the body", target.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"half+end");
    target.write_all(&heard).await.unwrap();
    completes("the response", socket.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"half+end");
}

#[tokio::test]
async fn what_is_not_verified_is_said() {
    let site = Site::start_with("  insecure_skip_verify: [kubelet]").await.with_kubelet(&["n2"]);
    assert_eq!(site.get("/api/v1/nodes/n1/proxy/healthz").await, (StatusCode::OK, Value::from("ok")));
    let log = site.cluster.master.log_text();
    assert!(
        log.contains("believe any certificate of kubelets")
            && log.contains("the kubelet of node n1 is not verified"),
        "{log}"
    );
    // Another port of the node is no kubelet.
    let acceptor = site.pki.acceptor("other", &["n3"]);
    let listener = site.listen().await;
    tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        assert!(acceptor.accept(socket).await.is_err());
    });
    let (status, failure) = site.get(&format!("/api/v1/nodes/https:n1:{}/proxy/", site.port)).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(message(&failure).contains("is for n3, and must be for n1 or "), "{failure}");
}

/// A pod and a service, both `default/secure`, that the master knows from the API. Behind either is the same server,
/// which has a port for each of its certificates.
struct Secure {
    site: Site,
    ports: Vec<(&'static str, u16)>,
    /// Requests that came through to the server.
    served: Arc<AtomicUsize>,
    /// The pod's, one of this host that is not on loopback.
    address: String,
    _api: ApiServer,
    _network: Namespace,
}

impl Secure {
    async fn start(more: &str) -> Self {
        let (network, api) = (Namespace::new().unwrap(), ApiServer::start().await.unwrap());
        let ports: Vec<_> =
            ["pod", "address", "service", "other", "stranger"].map(|name| (name, free_port())).into();
        let targets: Vec<_> =
            ports.iter().map(|(_, port)| SocketAddr::from((network.outside, *port))).collect();
        let kubeconfig = api.directory().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig).unwrap();
        let more = format!("{more}\nkubernetes: {{kubeconfig: '{}'}}", kubeconfig.display());
        let site = Site::start_beside(&more, targets.clone()).await;
        let (address, served) = (network.outside.to_string(), Arc::<AtomicUsize>::default());
        for ((name, _), target) in ports.iter().zip(targets) {
            let stranger = (*name == "stranger").then(Pki::new);
            let names = match *name {
                "pod" => &["secure.default.pod"][..],
                "address" => &[address.as_str()],
                "service" => &["secure.default.svc"],
                "other" => &["other.default.pod", "other.default.svc"],
                _ => &["secure.default.pod", "secure.default.svc", &address],
            };
            let acceptor = stranger.as_ref().unwrap_or(&site.pki).acceptor(name, names);
            let listener = TcpListener::bind(target).await.unwrap();
            tokio::spawn(serve_tls(listener, acceptor, served.clone()));
        }
        let metadata = json!({"name": "secure", "namespace": "default"});
        let numbered = |field: &str| -> Value {
            ports.iter().map(|(name, port)| json!({"name": name, "protocol": "TCP", field: port})).collect()
        };
        let happen = |kind, object| drop(api.send(kind, "ADDED", object));
        happen(
            apiserver::Kind::Pods,
            json!({
                "metadata": metadata,
                "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": numbered("containerPort")}]},
                "status": {"phase": "Running", "podIP": address},
            }),
        );
        happen(
            apiserver::Kind::Services,
            json!({"metadata": metadata, "spec": {"clusterIP": "10.0.0.77", "ports": numbered("port")}}),
        );
        happen(
            apiserver::Kind::EndpointSlices,
            json!({
                "metadata": {"name": "secure-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "secure"}},
                "addressType": "IPv4",
                "endpoints": [{"addresses": [address], "nodeName": "n1", "conditions": {"ready": true}}],
                "ports": numbered("port"),
            }),
        );
        let secure = Self { site, ports, served, address, _api: api, _network: network };
        eventually("the pod and the service are known", SOON, async || {
            for subject in [POD, SERVICE] {
                let (status, answer) = secure.get(subject, "other").await;
                (status == StatusCode::OK || message(&answer).contains("certificate")).then_some(())?;
            }
            Some(())
        })
        .await;
        secure
    }

    /// Asks over TLS, where this certificate is shown.
    async fn get(&self, (kind, _): Subject, certificate: &str) -> (StatusCode, Value) {
        let port = self.ports.iter().find(|(name, _)| *name == certificate).unwrap().1;
        self.site.get(&format!("/api/v1/namespaces/default/{kind}/https:secure:{port}/proxy/a?b=c")).await
    }

    async fn answers(&self, subject: Subject, certificate: &str) {
        let before = self.served.load(Ordering::SeqCst);
        let said = Value::from(format!("{} GET /a?b=c HTTP/1.1", subject.1));
        assert_eq!(self.get(subject, certificate).await, (StatusCode::OK, said), "{subject:?} {certificate}");
        assert_eq!(self.served.load(Ordering::SeqCst), before + 1);
    }

    /// The server sees nothing of the request, and the caller is told all of `said`.
    async fn is_refused(&self, subject: Subject, certificate: &str, said: &[&str]) {
        let before = self.served.load(Ordering::SeqCst);
        let (status, failure) = self.get(subject, certificate).await;
        assert_eq!((status, &failure["kind"]), (StatusCode::BAD_GATEWAY, &Value::from("Status")));
        for part in said {
            assert!(message(&failure).contains(part), "{subject:?} {certificate}: no {part} in {failure}");
        }
        assert_eq!(self.served.load(Ordering::SeqCst), before, "{subject:?} {certificate}");
    }
}

/// A resource of the API, and the name that its certificate is to have.
type Subject = (&'static str, &'static str);
const POD: Subject = ("pods", "secure.default.pod");
const SERVICE: Subject = ("services", "secure.default.svc");

/// Answers with the server name of the handshake and the first line of the request.
async fn serve_tls(listener: TcpListener, acceptor: TlsAcceptor, served: Arc<AtomicUsize>) {
    while let Ok((socket, _)) = listener.accept().await {
        // A caller that refuses the certificate ends the handshake, or says so only once its own part is over.
        let Ok(socket) = acceptor.accept(socket).await else { continue };
        let mut line = socket.get_ref().1.server_name().unwrap_or_default().to_owned() + " ";
        let mut socket = BufReader::new(socket);
        if !matches!(socket.read_line(&mut line).await, Ok(1..)) {
            continue;
        }
        served.fetch_add(1, Ordering::SeqCst);
        let body = line.trim_end();
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        socket.write_all(answer.as_bytes()).await.unwrap();
        while !matches!(socket.read_line(&mut line).await, Ok(0) | Err(_)) {}
    }
}

#[tokio::test]
async fn https_to_pods_and_services_is_verified() {
    let secure = Secure::start("").await;
    secure.answers(POD, "pod").await;
    secure.answers(POD, "address").await;
    secure.answers(SERVICE, "service").await;
    let must_be = format!("must be for {} or {}", POD.1, secure.address);
    secure.is_refused(POD, "service", &["is for secure.default.svc, and", &must_be]).await;
    secure.is_refused(POD, "other", &["is for other.default.pod or other.default.svc, and", &must_be]).await;
    let must_be = "must be for secure.default.svc";
    secure.is_refused(SERVICE, "pod", &["is for secure.default.pod, and", must_be]).await;
    secure
        .is_refused(SERVICE, "other", &["is for other.default.pod or other.default.svc, and", must_be])
        .await;
    // The endpoint's address does not make it the service.
    secure.is_refused(SERVICE, "address", &[&format!("is for {}, and", secure.address), must_be]).await;
    for subject in [POD, SERVICE] {
        secure.is_refused(subject, "stranger", &[subject.1, "UnknownIssuer"]).await;
    }
    let log = secure.site.cluster.master.log_text();
    assert!(!log.contains("is not verified") && !log.contains("believe any certificate"), "{log}");
}

#[tokio::test]
async fn https_to_pods_and_services_is_unverified_only_where_that_is_ordered() {
    let secure = Secure::start("  insecure_skip_verify: [kubelet]").await;
    for subject in [POD, SERVICE] {
        secure.is_refused(subject, "other", &["is for other.default.pod"]).await;
        secure.is_refused(subject, "stranger", &["UnknownIssuer"]).await;
    }
    drop(secure);
    let secure = Secure::start("  insecure_skip_verify: [targets]").await;
    for subject in [POD, SERVICE] {
        for certificate in ["other", "stranger"] {
            secure.answers(subject, certificate).await;
        }
    }
    let log = secure.site.cluster.master.log_text();
    for said in [
        "believe any certificate of pods and services",
        "the certificate of pod default/secure is not verified",
        "the certificate of service default/secure is not verified",
    ] {
        assert!(log.contains(said), "{said}: {log}");
    }
}
