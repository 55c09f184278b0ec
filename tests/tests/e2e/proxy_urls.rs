//! Proxy URLs as kube-apiserver has them, against real targets behind a node's tunnel.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
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
use serde_json::Value;
use tests::{
    client::{Io, read_head},
    cluster::{Cluster, Kind, Options, SOON, binary},
    load::completes,
    pki::Authority,
    process::{Process, TempDir, free_port},
    steady::Health,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
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
        let ca = Authority::new("kubelet CA").unwrap();
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
        let pki = Pki::new();
        let (port, tcp) = (free_port(), SocketAddr::from(([127, 0, 0, 1], free_port())));
        let show = |file: &str| pki.path(file).display().to_string();
        let cluster = Cluster::start(Options {
            nodes: vec![("n1".to_owned(), Kind::Dialled)],
            ports: vec![port],
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
    async fn with_kubelet(mut self, names: &[&str]) -> Self {
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
    let site = Site::start().await.with_kubelet(&["n1"]).await;
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
    assert!(
        log.contains("front_door=\"proxy-url-unix\"") && log.contains("front_door=\"proxy-url-tcp\""),
        "{log}"
    );
}

#[tokio::test]
async fn a_certificate_for_the_nodes_address_will_do_and_one_for_another_node_names_both() {
    let site = Site::start().await.with_kubelet(&["127.0.0.1"]).await;
    assert_eq!(site.get("/api/v1/nodes/n1/proxy/healthz").await, (StatusCode::OK, Value::from("ok")));
    drop(site);
    let site = Site::start().await.with_kubelet(&["n2.example", "127.0.0.2"]).await;
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
    let site = site.with_kubelet(&["n1"]).await;
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
