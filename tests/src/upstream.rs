//! A stub kube-apiserver behind an authenticating proxy: it serves only who has a certificate of the front-proxy CA
//! with the right name, believes what that says about the caller, and keeps what it received.
//!
//! | request | answer |
//! | --- | --- |
//! | what [`ApiServer`] knows: lists, watches, pods and their subresources | that one's |
//! | [`HEALTH`] | `ok`; such requests aren't kept |
//! | [`certificates::PATH`] | requests for certificates, for the test to approve |
//! | an `Upgrade` to anything, of no pod | 101; what comes is sent back; after its end, [`GOODBYE`] and the end |
//! | anything else | `{"received": N}`: the index of the request in [`Upstream::received`] |

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Request, Response, StatusCode, Version,
    body::Incoming,
    header::{self, HeaderValue},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proto_net::tasks::Tasks;
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpListener,
    sync::watch,
};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::{
    apiserver::{ApiServer, Body, failure, json_body},
    certificates::{self, Requests},
    pki::Authority,
    process::{TempDir, free_port},
};

/// The common name that an authenticating proxy must have.
pub const PROXY_NAME: &str = "front-proxy-client";
/// Sent at the end of an upgraded connection, after the caller's end.
pub const GOODBYE: &[u8] = b"goodbye\n";
/// The path of the proxy's own health checks.
pub const HEALTH: &str = "/livez?from=proxy";
/// Decrypted bytes kept of each connection.
const RAW: usize = 256 * 1024;

pub type Headers = Vec<(String, String)>;

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Received {
    /// Connections are counted from 0.
    pub connection: usize,
    /// Nothing came before it on its connection.
    pub first: bool,
    pub version: Version,
    pub method: String,
    /// Path and query.
    pub target: String,
    pub headers: Headers,
    pub body: Bytes,
    pub trailers: Headers,
    /// The body has come to its end.
    pub whole: bool,
}

/// The identity of a caller, as the proxy states it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    pub user: String,
    pub uid: Option<String>,
    pub groups: Vec<String>,
    /// The rest of each name after `X-Remote-Extra-`, in lower case, and its value.
    pub extra: Headers,
}

impl Received {
    pub fn header(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(n, _)| n == name).map(|(_, value)| value.as_str()).collect()
    }

    /// Headers that are spelled like those of an authenticating proxy, or nearly so.
    pub fn remote_headers(&self) -> Headers {
        let of_proxy = |name: &str| name.to_ascii_lowercase().replace('_', "-").starts_with("x-remote");
        self.headers.iter().chain(&self.trailers).filter(|(name, _)| of_proxy(name)).cloned().collect()
    }

    /// An error where the headers say it in another way than a real server would expect.
    pub fn identity(&self) -> anyhow::Result<Identity> {
        let mut identity = Identity::default();
        let mut users = 0;
        for (name, value) in self.remote_headers() {
            match name.as_str() {
                "x-remote-user" => {
                    users += 1;
                    identity.user = value;
                }
                "x-remote-uid" if identity.uid.is_none() => identity.uid = Some(value),
                "x-remote-group" => identity.groups.push(value),
                other => match other.strip_prefix("x-remote-extra-") {
                    Some(key) => identity.extra.push((key.to_owned(), value)),
                    None => bail!("{name}: {value:?}, in {self:?}"),
                },
            }
        }
        if users != 1 {
            bail!("{users} X-Remote-User in {self:?}");
        }
        identity.extra.sort();
        Ok(identity)
    }
}

/// How every request is treated.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// Before the answer.
    pub delay: Duration,
    /// In place of the answer.
    pub status: Option<StatusCode>,
    /// Each connection is closed after one answer.
    pub close: bool,
    /// Upgrades are answered with 200.
    pub no_upgrade: bool,
}

/// The server. It ends with its owner.
pub struct Upstream {
    directory: TempDir,
    address: SocketAddr,
    api: Arc<ApiServer>,
    proxies: Authority,
    server: Server,
    serving: Mutex<Option<Tasks>>,
}

impl Upstream {
    pub async fn start() -> anyhow::Result<Self> {
        let directory = TempDir::new("upstream")?;
        let path = directory.path();
        let authority = Authority::new("apiserver CA")?;
        std::fs::write(path.join("ca.crt"), authority.pem())?;
        authority.server(path, "apiserver", &["localhost", "127.0.0.1"])?;
        let proxies = Authority::new("front-proxy CA")?;
        std::fs::write(path.join("front-proxy-ca.crt"), proxies.pem())?;
        proxies.client(path, PROXY_NAME)?;
        let api = Arc::new(ApiServer::start().await?);
        let server = Server {
            config: server_config(path)?,
            api: api.clone(),
            shared: Arc::default(),
            connections: Arc::default(),
            held: watch::Sender::new(false),
            checks: Arc::default(),
            waiting: Arc::default(),
            upgraded: Arc::default(),
            certificates: Requests::default(),
        };
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let this = Self { directory, address, api, proxies, server, serving: Mutex::new(None) };
        this.accept().await?;
        Ok(this)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Where `ca.crt` and the proxy's `front-proxy-client.crt` and `.key` are.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    /// The authority of authenticating proxies.
    pub fn proxies(&self) -> &Authority {
        &self.proxies
    }

    /// The stub that answers lists and watches, which a test controls.
    pub fn api(&self) -> &ApiServer {
        &self.api
    }

    /// The certificates that have been asked for.
    pub fn certificates(&self) -> &Requests {
        &self.server.certificates
    }

    pub fn received(&self) -> Vec<Received> {
        self.server.shared().received.clone()
    }

    /// The requests that came since this was last called.
    pub fn take(&self) -> Vec<Received> {
        let mut shared = self.server.shared();
        shared.taken += shared.received.len();
        std::mem::take(&mut shared.received)
    }

    /// The first bytes of every connection, decrypted; those of HTTP/2 are compressed.
    pub fn raw(&self) -> Vec<Vec<u8>> {
        let raw = self.server.shared().raw.clone();
        raw.iter().map(|bytes| bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()).collect()
    }

    /// Forgets what has come, on connections that stay.
    pub fn forget_raw(&self) {
        for bytes in &self.server.shared().raw {
            bytes.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }

    pub fn behave(&self, behaviour: Behaviour) {
        self.server.shared().behaviour = behaviour;
    }

    /// Whether requests have to wait for their answer.
    pub fn hold(&self, held: bool) {
        self.server.held.send_replace(held);
    }

    /// Requests for [`HEALTH`] so far.
    pub fn checks(&self) -> usize {
        self.server.checks.load(Ordering::SeqCst)
    }

    /// Requests that are waiting.
    pub fn waiting(&self) -> usize {
        self.server.waiting.load(Ordering::SeqCst)
    }

    /// Upgraded connections that are open.
    pub fn upgraded(&self) -> usize {
        self.server.upgraded.load(Ordering::SeqCst)
    }

    /// Connections so far, those of other callers than a proxy excluded.
    pub fn connections(&self) -> usize {
        self.server.connections.load(Ordering::SeqCst)
    }

    /// Nobody listens any more, and all connections are closed.
    pub async fn refuse(&self) {
        let serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(tasks) = serving {
            tasks.cancel();
            tasks.drain(Duration::from_secs(5)).await;
        }
    }

    /// Listens again, at the same address.
    pub async fn accept(&self) -> anyhow::Result<()> {
        self.refuse().await;
        let listener = crate::process::listen_again(self.address)
            .await
            .with_context(|| format!("can't listen on {}", self.address))?;
        let tasks = Tasks::new();
        tasks.spawn(self.server.clone().serve(listener, tasks.clone()));
        *self.serving.lock().unwrap_or_else(PoisonError::into_inner) = Some(tasks);
        Ok(())
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let serving = self.serving.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(tasks) = serving {
            tasks.cancel();
        }
    }
}

fn server_config(directory: &Path) -> anyhow::Result<Arc<ServerConfig>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(directory.join("front-proxy-ca.crt"))? {
        roots.add(certificate?)?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    let chain =
        CertificateDer::pem_file_iter(directory.join("apiserver.crt"))?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(directory.join("apiserver.key"))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// The state that all connections share.
#[derive(Clone)]
struct Server {
    config: Arc<ServerConfig>,
    api: Arc<ApiServer>,
    shared: Arc<Mutex<Shared>>,
    connections: Arc<AtomicUsize>,
    held: watch::Sender<bool>,
    checks: Arc<AtomicUsize>,
    waiting: Arc<AtomicUsize>,
    upgraded: Arc<AtomicUsize>,
    certificates: Requests,
}

#[derive(Default)]
struct Shared {
    received: Vec<Received>,
    /// Received before those.
    taken: usize,
    raw: Vec<Arc<Mutex<Vec<u8>>>>,
    behaviour: Behaviour,
}

impl Shared {
    /// One by the index that it was given.
    fn at(&mut self, index: usize) -> Option<&mut Received> {
        self.received.get_mut(index.checked_sub(self.taken)?)
    }
}

/// Counts for as long as it lives.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A connection, as its requests see it.
#[derive(Clone)]
struct Connection {
    index: usize,
    used: Arc<AtomicBool>,
    tasks: Tasks,
}

impl Server {
    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn serve(self, listener: TcpListener, tasks: Tasks) {
        loop {
            let Ok((socket, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let _ = socket.set_nodelay(true);
            let (server, owner) = (self.clone(), tasks.clone());
            tasks.spawn(async move {
                let Ok(socket) = TlsAcceptor::from(server.config.clone()).accept(socket).await else {
                    return;
                };
                let certificates = socket.get_ref().1.peer_certificates().unwrap_or_default();
                if certificates.first().and_then(common_name).as_deref() != Some(PROXY_NAME) {
                    return;
                }
                let h2 = socket.get_ref().1.alpn_protocol() == Some(b"h2");
                let raw = Arc::<Mutex<Vec<u8>>>::default();
                server.shared().raw.push(raw.clone());
                let index = server.connections.fetch_add(1, Ordering::SeqCst);
                let connection = Connection { index, used: Arc::default(), tasks: owner };
                let service = service_fn(|request| {
                    let (server, connection) = (server.clone(), connection.clone());
                    async move { Ok::<_, Infallible>(server.answer(request, connection).await) }
                });
                let socket = TokioIo::new(Tee { socket, raw });
                // A client that leaves is not the server's failure.
                if h2 {
                    let connection = http2::Builder::new(TokioExecutor::new());
                    let _ = connection.serve_connection(socket, service).await;
                } else {
                    let connection =
                        http1::Builder::new().max_buf_size(1 << 20).serve_connection(socket, service);
                    let _ = connection.with_upgrades().await;
                }
            });
        }
    }

    async fn answer(&self, mut request: Request<Incoming>, connection: Connection) -> Response<Body> {
        if request.uri().path_and_query().is_some_and(|target| target == HEALTH) {
            self.checks.fetch_add(1, Ordering::SeqCst);
            let status = self.shared().behaviour.status.unwrap_or(StatusCode::OK);
            return json_body(status, &json!("ok"));
        }
        let index = self.record(&request, &connection);
        let behaviour = self.shared().behaviour.clone();
        let waiting = Counted::new(&self.waiting);
        let _ = self.held.subscribe().wait_for(|held| !held).await;
        tokio::time::sleep(behaviour.delay).await;
        drop(waiting);
        let upgrade = request.headers().get(header::UPGRADE).cloned();
        // Requests that create something are only recorded.
        let creates = request.method() == hyper::Method::POST && upgrade.is_none();
        let mut response = if let Some(status) = behaviour.status {
            failure(status, "Ordered", "this failure was ordered by a test")
        } else if request.uri().path().starts_with(certificates::PATH) {
            let (uri, method) = (request.uri().clone(), request.method().to_string());
            self.read(request.into_body(), index).await;
            let received = self.shared().at(index).cloned();
            let Some((received, caller)) = received.and_then(|r| Some((r.clone(), r.identity().ok()?)))
            else {
                return failure(StatusCode::FORBIDDEN, "Forbidden", "who is asking?");
            };
            self.certificates.answer(&method, &uri, &received.body, &caller.user, &caller.groups)
        } else if is_apiservers(request.uri().path()) && !creates {
            self.api.answer(request, &connection.tasks).await
        } else if let Some(upgrade) = upgrade.filter(|_| !behaviour.no_upgrade) {
            self.upgrade(&mut request, upgrade, &connection.tasks)
        } else {
            self.read(request.into_body(), index).await;
            json_body(StatusCode::OK, &json!({ "received": index }))
        };
        if behaviour.close {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    fn record(&self, request: &Request<Incoming>, connection: &Connection) -> usize {
        let mut shared = self.shared();
        shared.received.push(Received {
            connection: connection.index,
            first: !connection.used.swap(true, Ordering::SeqCst),
            version: request.version(),
            method: request.method().to_string(),
            target: request.uri().path_and_query().map_or("", |target| target.as_str()).to_owned(),
            headers: list(request.headers()),
            body: Bytes::new(),
            trailers: Vec::new(),
            whole: false,
        });
        shared.taken + shared.received.len() - 1
    }

    async fn read(&self, mut body: Incoming, index: usize) {
        let mut read = Vec::new();
        loop {
            let frame = body.frame().await;
            let mut shared = self.shared();
            // One that has been taken meanwhile is read to its end all the same.
            let received = shared.at(index);
            match frame {
                Some(Ok(frame)) => {
                    let Some(received) = received else { continue };
                    match frame.into_data() {
                        Ok(data) => {
                            read.extend_from_slice(&data);
                            received.body = Bytes::copy_from_slice(&read);
                        }
                        Err(frame) => received.trailers = frame.trailers_ref().map(list).unwrap_or_default(),
                    }
                }
                Some(Err(_)) => return,
                None => {
                    if let Some(received) = received {
                        received.whole = true;
                    }
                    return;
                }
            }
        }
    }

    fn upgrade(
        &self,
        request: &mut Request<Incoming>,
        protocol: HeaderValue,
        tasks: &Tasks,
    ) -> Response<Body> {
        let mut response = json_body(StatusCode::SWITCHING_PROTOCOLS, &json!(null))
            .map(|_| Body::new(Full::default().map_err(|never: Infallible| match never {})));
        let headers = response.headers_mut();
        headers.clear();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, protocol);
        if let Some(key) = request.headers().get(header::SEC_WEBSOCKET_KEY) {
            let accept = derive_accept_key(key.as_bytes());
            headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept.parse().expect("base64 is a header's value"));
        }
        if let Some(protocols) = request.headers().get(header::SEC_WEBSOCKET_PROTOCOL) {
            let first = protocols.to_str().unwrap_or_default().split(',').next().unwrap_or_default().trim();
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, first.parse().expect("a part of a value is one"));
        }
        let upgrade = hyper::upgrade::on(request);
        let open = Counted::new(&self.upgraded);
        tasks.spawn(async move {
            let mut socket = TokioIo::new(upgrade.await?);
            // A client that leaves is not the server's failure.
            let _ = echo(&mut socket).await;
            drop(open);
            Ok::<_, hyper::Error>(())
        });
        response
    }
}

async fn echo(socket: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = socket.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        socket.write_all(&buffer[..n]).await?;
        socket.flush().await?;
    }
    socket.write_all(GOODBYE).await?;
    socket.shutdown().await
}

fn is_apiservers(path: &str) -> bool {
    ["/api", "/apis", "/version"]
        .iter()
        .any(|known| path.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

fn list(headers: &HeaderMap) -> Headers {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect()
}

fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?.to_owned();
    Some(name)
}

/// Keeps what is read.
struct Tee<S> {
    socket: S,
    raw: Arc<Mutex<Vec<u8>>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Tee<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.socket).poll_read(context, buffer);
        let mut raw = self.raw.lock().unwrap_or_else(PoisonError::into_inner);
        let new = &buffer.filled()[before..];
        let room = RAW.saturating_sub(raw.len());
        raw.extend_from_slice(&new[..new.len().min(room)]);
        drop(raw);
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Tee<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
