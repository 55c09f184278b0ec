//! Measures the memory of the master for watches that callers hold by HTTP/2 at the front end while nothing changes.
//!
//! The limits of the front end are the defaults. Each connection belongs to another user and comes from another
//! address, as those of the nodes of a cluster do, so that `long_running_per_user`, `requests_per_second_per_user` and
//! `requests_per_second_per_address` have room for all of them. `max_streams` allows more streams than a connection has
//! here.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    path::Path as File,
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Frame, Incoming},
    client::conn::http2::{SendRequest, handshake},
    header::{self, HeaderValue},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use tests::{
    cluster::{Cluster, Options, SOON},
    openssh,
    pki::{Authority, client_config, server_config},
    process::{Process, TempDir, eventually, free_port},
};
use tokio::net::{TcpListener, TcpSocket};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::report::{Figure, Figures};

/// The number of watches on each connection of a caller.
const EACH: u32 = 100;
/// The number of streams that kube-apiserver allows on one connection.
const API_STREAMS: u32 = 250;
/// The one event that every watch gets.
const EVENT: &[u8] = b"{\"type\":\"BOOKMARK\",\"object\":{\"kind\":\"Pod\",\"apiVersion\":\"v1\",\"metadata\":\
    {\"resourceVersion\":\"12746\",\"creationTimestamp\":null},\"spec\":{\"containers\":null},\"status\":{}}}\n";
/// What a kubelet says of itself.
const USER_AGENT: &str = "kubelet/v1.34.1 (linux/amd64) kubernetes/93248f9";

/// Kilobytes of the master for each of `count` idle watches.
pub async fn figures(count: u32) -> anyhow::Result<Figures> {
    let site = Site::start().await?;
    // The first ones pay for what is needed once. They have several connections, so that each thread of the front end
    // gets one.
    let first = site.open(10, 10).await?;
    ensure!(site.watches().await? == 100, "not all of the first watches are open");
    drop(first);
    eventually("the first watches are closed", SOON, async || {
        (site.watches().await.ok()? == 0).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = site.cluster.master.usage().memory;
    let callers = site.open(count / EACH, EACH).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = site.cluster.master.usage().memory;
    let open = site.watches().await?;
    ensure!(open == u64::from(count), "{open} of {count} watches are open");
    drop(callers);
    let each = after.saturating_sub(before) as f64 / 1024.0 / f64::from(count);
    Ok(Figures::from([("front_end_watch_memory", Figure::alone("KB", Some(each)))]))
}

/// A front end before an API server that is a process of its own.
struct Site {
    address: SocketAddr,
    cluster: Cluster,
    _api: Process,
    _dir: TempDir,
}

impl Site {
    async fn start() -> anyhow::Result<Self> {
        let dir = TempDir::new("bench-watches")?;
        let (path, port) = (dir.path(), free_port());
        let authority = Authority::new("apiserver CA")?;
        let ca = path.join("ca.crt");
        std::fs::write(&ca, authority.pem())?;
        authority.server(path, "apiserver", &["localhost", "127.0.0.1"])?;
        let api = start_api(port, path)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let master_config = format!(
            "log: {{level: warn}}\nfront_end:\n  listen: '{address}'\n  \
             certificates: [{{cert: server.crt, key: server.key}}]\n  \
             authentication: [{{x509: {{ca: ca.crt}}}}]\n  \
             upstream: {{servers: ['https://127.0.0.1:{port}'], ca: {}}}\n  \
             audit: {{file: audit.log}}\n",
            ca.display()
        );
        let cluster = Cluster::start(Options { master_config, ..Options::default() }).await?;
        openssh::wait_for_port(address.port())?;
        Ok(Self { address, cluster, _api: api, _dir: dir })
    }

    /// The number of watches that the master holds.
    async fn watches(&self) -> anyhow::Result<u64> {
        let name = "master_agent_front_end_requests_long_running ";
        Ok(self.cluster.metric(self.cluster.admin, name).await? as u64)
    }

    /// Opens as many watches for each of some callers, one after the other.
    async fn open(&self, callers: u32, each: u32) -> anyhow::Result<Vec<Caller>> {
        let mut all = Vec::new();
        for number in 0..callers {
            let mut caller = self.connect(number).await.with_context(|| format!("caller {number}"))?;
            for _ in 0..each {
                caller.watch().await.with_context(|| format!("caller {number}"))?;
            }
            all.push(caller);
        }
        Ok(all)
    }

    /// Connects a user with a client certificate from an address that nobody else has.
    async fn connect(&self, number: u32) -> anyhow::Result<Caller> {
        let (path, name) = (self.cluster.path(), format!("watcher-{number}"));
        self.cluster.pki.client(path, &name)?;
        let identity = Some((path, name.as_str()));
        let mut config = ClientConfig::clone(&*client_config(&path.join("ca.crt"), identity)?);
        config.alpn_protocols = vec![b"h2".to_vec()];
        let socket = TcpSocket::new_v4()?;
        // The addresses are 127.2.0.1 and so on.
        socket.bind(SocketAddr::from((Ipv4Addr::from(0x7f02_0001 + number), 0)))?;
        let socket = socket.connect(self.address).await?;
        socket.set_nodelay(true)?;
        let connector = TlsConnector::from(Arc::new(config));
        let tls = connector.connect(ServerName::try_from("localhost")?, socket).await?;
        ensure!(tls.get_ref().1.alpn_protocol() == Some(b"h2"), "the front end does not offer HTTP/2");
        let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(tls)).await?;
        tokio::spawn(connection);
        let url = format!("https://{}/api/v1/pods?watch=true", self.address);
        Ok(Caller { url, sender, watches: Vec::new() })
    }
}

/// A connection to the front end, which closes with its owner.
struct Caller {
    url: String,
    sender: SendRequest<Empty<Bytes>>,
    /// The responses that go on.
    watches: Vec<Incoming>,
}

impl Caller {
    /// Opens a watch and waits for its event.
    async fn watch(&mut self) -> anyhow::Result<()> {
        let request = Request::get(self.url.as_str())
            .header(header::USER_AGENT, USER_AGENT)
            .header(header::ACCEPT, "application/json")
            .body(Empty::new())?;
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        ensure!(response.status() == StatusCode::OK, "a watch was answered {}", response.status());
        let mut body = response.into_body();
        let mut event = Vec::new();
        while event.len() < EVENT.len() {
            let frame = body.frame().await.context("a watch has ended")??;
            event.extend_from_slice(frame.data_ref().context("a watch has ended with trailers")?);
        }
        ensure!(event == EVENT, "another event: {}", String::from_utf8_lossy(&event));
        self.watches.push(body);
        Ok(())
    }
}

fn start_api(port: u16, directory: &File) -> anyhow::Result<Process> {
    let mut serve = Command::new(std::env::current_exe()?);
    serve.arg("--watched").arg(port.to_string()).arg(directory);
    let process = Process::start("apiserver", &mut serve, &directory.join("apiserver.log"))?;
    openssh::wait_for_port(port)?;
    Ok(process)
}

/// Serves as an API server that shows `apiserver.crt` of a directory. It offers HTTP/2 only, so that a master that used
/// something else would not be measured unnoticed.
pub async fn serve(port: u16, directory: &File) -> anyhow::Result<()> {
    let mut config = ServerConfig::clone(&*server_config(directory, "apiserver")?);
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
    loop {
        let (socket, _) = listener.accept().await?;
        let _ = socket.set_nodelay(true);
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            // A client that leaves is not the server's failure.
            let Ok(socket) = acceptor.accept(socket).await else { return };
            let service = service_fn(|request: Request<Incoming>| {
                let response = answer(&request);
                async move { Ok::<_, Infallible>(response) }
            });
            let mut http = http2::Builder::new(TokioExecutor::new());
            http.max_concurrent_streams(API_STREAMS);
            let _ = http.serve_connection(TokioIo::new(socket), service).await;
        });
    }
}

/// A watch gets one event and stays open. Everything else, such as a health check, is answered at once.
fn answer(request: &Request<Incoming>) -> Response<BoxBody<Bytes, Infallible>> {
    let query = request.uri().query().unwrap_or_default();
    let body = if query.contains("watch=true") {
        let event = Ok::<_, Infallible>(Frame::data(Bytes::from_static(EVENT)));
        BodyExt::boxed(StreamBody::new(stream::iter([event]).chain(stream::pending())))
    } else {
        BodyExt::boxed(Full::new(Bytes::from_static(b"ok")))
    };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}
