//! Proxy URLs work as kube-apiserver's do, against real targets behind a node's tunnel.

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
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tests::{
    apiserver::{self, ApiServer},
    client::Io,
    cluster::{Cluster, Kind, Options, SOON, binary},
    kubelet_port,
    load::completes,
    netns::Namespace,
    pki::Authority,
    process::{Process, TempDir, eventually, free_port},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream, UnixStream},
    sync::MutexGuard,
};
use tokio_rustls::TlsAcceptor;

pub(super) type Body = BoxBody<Bytes, std::convert::Infallible>;

/// A node n1 on 127.0.0.1 with a stand-in for its kubelet, and a port for targets of the test's own.
pub(super) struct Site {
    pub(super) cluster: Cluster,
    pub(super) pki: Pki,
    pub(super) port: u16,
    pub(super) tcp: SocketAddr,
    pub(super) kubelet: Option<Process>,
    // The kubelet ends first.
    pub(super) kubelet_port: Option<MutexGuard<'static, ()>>,
}

pub(super) struct Pki {
    pub(super) dir: TempDir,
    pub(super) ca: Authority,
}

impl Pki {
    pub(super) fn new() -> Self {
        let dir = TempDir::new("pki").unwrap();
        let ca = Authority::new(&format!("kubelet CA {:08x}", rand::random::<u32>())).unwrap();
        std::fs::write(dir.path().join("ca.crt"), ca.pem()).unwrap();
        ca.client(dir.path(), "master").unwrap();
        Self { dir, ca }
    }

    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    pub(super) fn acceptor(&self, name: &str, names: &[&str]) -> TlsAcceptor {
        self.ca.server(self.dir.path(), name, names).unwrap();
        acceptor(&self.path(&format!("{name}.crt")), &self.path(&format!("{name}.key")))
    }
}

pub(super) fn acceptor(certificate: &Path, key: &Path) -> TlsAcceptor {
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
    pub(super) async fn start() -> Self {
        Self::start_with("").await
    }

    /// `more` are lines of the section `proxy_urls`.
    pub(super) async fn start_with(more: &str) -> Self {
        Self::start_beside(more, Vec::new()).await
    }

    /// With further targets that the node's policy allows.
    pub(super) async fn start_beside(more: &str, targets: Vec<SocketAddr>) -> Self {
        let pki = Pki::new();
        let (port, tcp) = (free_port(), SocketAddr::from(([127, 0, 0, 1], free_port())));
        let show = |file: &str| pki.path(file).display().to_string();
        let cluster = Cluster::start(Options {
            nodes: vec![("n1".to_owned(), Kind::Dialled)],
            ports: vec![port],
            targets,
            // Further connections would be descriptors that come and go.
            master_config: format!(
                "tunnels: {{max_further_connections: 0}}\nproxy_urls:\n  unix: {{path: proxy.sock}}\n  tcp: {{listen: '{tcp}'}}\n  kubelet_ca: {}\n  \
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
        Self { cluster, pki, port, tcp, kubelet: None, kubelet_port: None }
    }

    /// With a kubelet whose certificate has these names.
    pub(super) async fn with_kubelet(mut self, names: &[&str]) -> Self {
        self.kubelet_port = Some(kubelet_port::reserve().await);
        self.pki.ca.server(self.pki.dir.path(), "kubelet", names).unwrap();
        let mut command = Command::new(binary("standin"));
        command.args(["--name", "n1", "--kubelet", "127.0.0.1:10250"]);
        command
            .arg("--cert")
            .arg(self.pki.path("kubelet.crt"))
            .arg("--key")
            .arg(self.pki.path("kubelet.key"));
        self.kubelet = Some(Process::start("kubelet", &mut command, &self.pki.path("kubelet.log")).unwrap());
        tests::openssh::wait_for_port(kubelet_port::PORT).unwrap();
        self
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.cluster.path().join("proxy.sock")
    }

    pub(super) async fn unix(&self) -> UnixStream {
        UnixStream::connect(self.socket()).await.unwrap()
    }

    pub(super) fn curl(&self, args: &[&str]) -> String {
        let output = Command::new("curl")
            .args(["-sS", "--unix-socket", self.socket().to_str().unwrap()])
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub(super) async fn send(&self, request: Request<Body>) -> Response<Incoming> {
        send(self.unix().await, request).await
    }

    pub(super) async fn get(&self, path: &str) -> (StatusCode, Value) {
        let (status, text) = text(self.send(get(path)).await).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// A path to the test's own targets.
    pub(super) fn own(&self, rest: &str) -> String {
        format!("/api/v1/nodes/n1:{}/proxy{rest}", self.port)
    }

    pub(super) async fn listen(&self) -> TcpListener {
        TcpListener::bind(("127.0.0.1", self.port)).await.unwrap()
    }
}

pub(super) fn get(path: &str) -> Request<Body> {
    request(Method::GET, path, Full::default().boxed())
}

pub(super) fn request(method: Method, path: &str, body: Body) -> Request<Body> {
    Request::builder().method(method).uri(path).header("Host", "localhost").body(body).unwrap()
}

async fn send(socket: impl Io + 'static, request: Request<Body>) -> Response<Incoming> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    completes("a response", sender.send_request(request)).await.unwrap()
}

pub(super) async fn text(response: Response<Incoming>) -> (StatusCode, String) {
    let status = response.status();
    let bytes = completes("a body", response.into_body().collect()).await.unwrap().to_bytes();
    (status, String::from_utf8(bytes.to_vec()).unwrap())
}

/// A target that takes one connection: gives the head of the request, and the socket.
pub(super) async fn one(listener: &TcpListener) -> (String, TcpStream) {
    let (mut socket, _) = completes("a connection to the target", listener.accept()).await.unwrap();
    socket.set_nodelay(true).unwrap();
    let head = head(&mut socket).await;
    (head, socket)
}

pub(super) async fn head(socket: &mut (impl Io + ?Sized)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(completes("a head", socket.read_u8()).await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

pub(super) fn message(value: &Value) -> &str {
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
    for egress in ["egress=\"proxy-url-unix\"", "egress=\"proxy-url-tcp\""] {
        site.cluster.master.says(&[egress]).await;
    }
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
    // Bytes that are not HTTP are no answer of a target.
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
    let site = Site::start().await.with_kubelet(&["n1"]).await;
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
    // These are refused outright, and the target sees none of them.
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
        // Unread bytes may reset the connection.
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
async fn what_is_not_verified_is_said() {
    let site = Site::start_with("  insecure_skip_verify: [kubelet]").await.with_kubelet(&["n2"]).await;
    assert_eq!(site.get("/api/v1/nodes/n1/proxy/healthz").await, (StatusCode::OK, Value::from("ok")));
    for words in
        [["accept any certificate", "kubelets"], ["certificate not verified", "the kubelet of node n1"]]
    {
        site.cluster.master.says(&words).await;
    }
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
    assert!(!log.contains("not verified") && !log.contains("accept any certificate"), "{log}");
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
    for words in [
        ["accept any certificate", "pods and services"],
        ["certificate not verified", "pod default/secure"],
        ["certificate not verified", "service default/secure"],
    ] {
        secure.site.cluster.master.says(&words).await;
    }
}
