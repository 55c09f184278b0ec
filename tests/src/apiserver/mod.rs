//! A stub kube-apiserver: TLS with a CA of its own, a bearer token, and answers that a real one gave.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET` of a [`Kind`]'s list | the recorded list, with what has happened since |
//! | the same with `?watch=1` | one event a line, as the test sends them |
//! | `/version`, `/api`, `/apis` and below | as much as kubectl finds its way by |
//! | `GET` of a pod | the pod |
//! | `POST` of a TokenReview | what kube-apiserver makes of a token that [`ApiServer::issue`] gave, as things are |
//! | a pod's `log`, `exec`, `attach`, `portforward` | what the kubelet answers, see [`ApiServer::set_kubelet`] |
//!
//! A test says what happens next, and asks what was requested:
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use serde_json::json;
//! use tests::apiserver::{ApiServer, Fault, Kind, Verb};
//!
//! let api = ApiServer::start().await?;
//! api.write_kubeconfig(&api.directory().join("kubeconfig"))?;
//! // ... start what reads the kubeconfig ...
//! api.wait_watched(Kind::Nodes).await;
//! while api.step(Kind::Nodes).is_some() {}
//! api.send(Kind::Nodes, "ADDED", json!({"metadata": {"name": "n9"}}));
//! api.send_bytes(Kind::Nodes, "no JSON\n");
//! api.fail(Kind::Nodes, Verb::List, Some(Fault::Silence));
//! api.refuse().await;
//! api.accept().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Lists and watches fit together as a real one's do: a watch from a list's resourceVersion first sees what has
//! happened since, so that no event is lost between the two or across a cut. Versions are opaque here, as the
//! Kubernetes API says they are: one that this server has never given, or has forgotten, is answered with 410.

mod pods;
mod resources;
#[cfg(test)]
mod tests;
mod tokens;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Frame, Incoming},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use proto_net::tasks::Tasks;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_rustls::TlsAcceptor;

use self::{pods::PodPath, resources::Resource, tokens::Tokens};
pub use self::{resources::Kind, tokens::BoundTo};
use crate::{
    cluster::SOON,
    http::{Base, parameters},
    pki::{Authority, server_config},
    process::{TempDir, eventually, free_port},
};

pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// The requests for a [`Kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    List,
    Watch,
}

/// An answer in place of the one that a request asks for.
#[derive(Clone, Debug)]
pub enum Fault {
    /// An error, with a Status that says so.
    Status(StatusCode),
    /// 200 with this body.
    Body(Bytes),
    /// Nothing, ever.
    Silence,
}

/// A request that came.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: Method,
    pub path: String,
    /// Parameters, decoded; of several with one name the last.
    pub query: BTreeMap<String, String>,
    /// Whether it showed the right token.
    pub authorized: bool,
}

impl Asked {
    pub fn is_watch(&self) -> bool {
        matches!(self.query.get("watch").map(String::as_str), Some("1" | "true"))
    }
}

/// The server. It ends with its owner.
pub struct ApiServer {
    directory: TempDir,
    address: SocketAddr,
    server: Server,
    /// The tasks that listen and serve; none while connections are refused.
    serving: Mutex<Option<Tasks>>,
}

impl ApiServer {
    /// Serves the recorded answers of `tests/data/kubernetes`.
    pub async fn start() -> anyhow::Result<Self> {
        Self::with_answers(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data/kubernetes")).await
    }

    /// Serves `KIND.list.json`, `KIND.watch.jsonl` and `version.json` of a directory.
    pub async fn with_answers(answers: &Path) -> anyhow::Result<Self> {
        let directory = TempDir::new("apiserver")?;
        let authority = Authority::new("apiserver CA")?;
        std::fs::write(directory.path().join("ca.crt"), authority.pem())?;
        authority.server(
            directory.path(),
            "apiserver",
            &["localhost", "127.0.0.1", "kubernetes.default.svc"],
        )?;
        let mut resources = BTreeMap::new();
        for kind in Kind::SERVED {
            resources.insert(kind, Resource::read(answers, kind)?);
        }
        let tokens = Tokens::new(directory.path())?;
        let server = Server {
            acceptor: TlsAcceptor::from(server_config(directory.path(), "apiserver")?),
            shared: Arc::new(Mutex::new(Shared {
                version: serde_json::from_slice(&read(&answers.join("version.json"))?)?,
                resources,
                tokens,
                token: String::new(),
                kubelet: None,
                asked: Vec::new(),
            })),
        };
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let this = Self { directory, address, server, serving: Mutex::new(None) };
        this.set_token(&format!("token-{:032x}", rand::random::<u128>()))?;
        this.accept().await?;
        Ok(this)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Where its files are: `ca.crt`, and `token` as a ServiceAccount's volume has them.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn ca(&self) -> PathBuf {
        self.directory().join("ca.crt")
    }

    pub fn token(&self) -> String {
        self.shared().token.clone()
    }

    /// From now on only this token is right. It is written to `token`, not to kubeconfig files.
    pub fn set_token(&self, token: &str) -> anyhow::Result<()> {
        proto_config::secret_file::replace(&self.directory().join("token"), token.as_bytes())?;
        token.clone_into(&mut self.shared().token);
        Ok(())
    }

    /// Writes a kubeconfig with the CA, the address and the token.
    pub fn write_kubeconfig(&self, path: &Path) -> anyhow::Result<()> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "stub",
                "cluster": {"server": self.url(), "certificate-authority": self.ca()},
            }],
            "users": [{"name": "tester", "user": {"token": self.token()}}],
            "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "tester"}}],
            "current-context": "stub",
        });
        proto_config::secret_file::replace(path, config.to_string().as_bytes())?;
        Ok(())
    }

    /// Where the paths of the kubelet of every pod's node begin: a kubelet's own address, or a proxy URL of the node.
    pub fn set_kubelet(&self, kubelet: Base) {
        self.shared().kubelet = Some(kubelet);
    }

    /// The next recorded event happens; gives it, or `None` after the last.
    pub fn step(&self, kind: Kind) -> Option<Value> {
        self.resource(kind, Resource::step)
    }

    /// An event happens: `ADDED`, `MODIFIED` or `DELETED`, with an object that needs no more than what matters
    /// (its kind, apiVersion and resourceVersion are filled in). Gives the object as it was sent.
    pub fn send(&self, kind: Kind, event: &str, object: Value) -> Value {
        self.resource(kind, |r| r.happen(event, object))
    }

    /// Tells the open watches the current version, as a BOOKMARK does.
    pub fn bookmark(&self, kind: Kind) {
        self.resource(kind, Resource::bookmark);
    }

    /// Sends bytes as they are down the open watches. Nothing has happened by them.
    pub fn send_bytes(&self, kind: Kind, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        self.resource(kind, |r| r.tell(&bytes));
    }

    /// Forgets what happened, as etcd's compaction does: open watches get an ERROR event with code 410 and end, and
    /// so does a watch from any version but the current one.
    pub fn compact(&self, kind: Kind) {
        self.resource(kind, Resource::compact);
    }

    /// The list is another from now on, without an event: open watches end. Its version must be new.
    pub fn set_list(&self, kind: Kind, list: &Value) -> anyhow::Result<()> {
        self.resource(kind, |r| r.replace(&serde_json::to_vec(list)?))
    }

    /// Ends all open watches in good order, as a server does after a watch's time.
    pub fn end_watches(&self) {
        for kind in Kind::SERVED {
            self.resource(kind, Resource::end);
        }
    }

    /// Breaks all open watches off, in the middle of the answer.
    pub fn cut_watches(&self) {
        for kind in Kind::SERVED {
            self.resource(kind, Resource::cut);
        }
    }

    /// New requests of this sort meet the fault; `None` heals it.
    pub fn fail(&self, kind: Kind, verb: Verb, fault: Option<Fault>) {
        self.resource(kind, |r| match verb {
            Verb::List => r.list_fault = fault,
            Verb::Watch => r.watch_fault = fault,
        });
    }

    /// The answer to a request of which another server knows who sent it; upgraded connections are carried by `tasks`.
    pub(crate) async fn answer(&self, request: Request<Incoming>, tasks: &Tasks) -> Response<Body> {
        let asked = self.server.record(&request);
        self.server.answer_authorized(request, asked, tasks).await
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

    /// The requests since this was last called, in order.
    pub fn take_asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.shared().asked)
    }

    /// All requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared().asked.clone()
    }

    /// How often this was asked so far.
    pub fn count(&self, kind: Kind, verb: Verb) -> usize {
        let of_kind = |a: &&Asked| a.path == kind.path() && a.is_watch() == (verb == Verb::Watch);
        self.shared().asked.iter().filter(of_kind).count()
    }

    /// The number of open watches.
    pub fn watches(&self, kind: Kind) -> usize {
        self.resource(kind, Resource::watches)
    }

    /// Waits until somebody watches.
    pub async fn wait_watched(&self, kind: Kind) {
        let what = format!("{kind:?} are watched");
        eventually(&what, SOON, async || (self.watches(kind) > 0).then_some(())).await;
    }

    fn resource<T>(&self, kind: Kind, act: impl FnOnce(&mut Resource) -> T) -> T {
        act(self.shared().resources.get_mut(&kind).expect("every kind is there"))
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.server.shared()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        let serving = self.serving.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(tasks) = serving {
            tasks.cancel();
        }
    }
}

/// The state that all connections share.
#[derive(Clone)]
struct Server {
    acceptor: TlsAcceptor,
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    version: Value,
    resources: BTreeMap<Kind, Resource>,
    tokens: Tokens,
    token: String,
    kubelet: Option<Base>,
    asked: Vec<Asked>,
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
            let server = self.clone();
            let upgraded = tasks.clone();
            tasks.spawn(async move {
                let Ok(socket) = server.acceptor.accept(socket).await else { return };
                let service = service_fn(|request| {
                    let (server, upgraded) = (server.clone(), upgraded.clone());
                    async move { Ok::<_, Infallible>(server.answer(request, &upgraded).await) }
                });
                let connection = http1::Builder::new().serve_connection(TokioIo::new(socket), service);
                // A client that leaves is not the server's failure.
                let _ = connection.with_upgrades().await;
            });
        }
    }

    async fn answer(&self, request: Request<Incoming>, tasks: &Tasks) -> Response<Body> {
        let asked = self.record(&request);
        if !asked.authorized {
            return failure(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized");
        }
        self.answer_authorized(request, asked, tasks).await
    }

    async fn answer_authorized(
        &self,
        request: Request<Incoming>,
        asked: Asked,
        tasks: &Tasks,
    ) -> Response<Body> {
        if let Some(path) = PodPath::parse(&asked.path) {
            let (pod, kubelet) = {
                let shared = self.shared();
                let pods = shared.resources.get(&Kind::Pods);
                (pods.and_then(|pods| pods.get(path.namespace, path.name)), shared.kubelet.clone())
            };
            return match pod {
                None => {
                    let message = format!("pods \"{}\" not found", path.name);
                    failure(StatusCode::NOT_FOUND, "NotFound", &message)
                }
                Some(pod) if path.subresource.is_none() => json_body(StatusCode::OK, &pod),
                Some(pod) => pods::forward(&path, &pod, kubelet, request, tasks).await,
            };
        }
        if asked.path == "/version" {
            return json_body(StatusCode::OK, &self.shared().version);
        }
        if let Some(found) = pods::discovery(&asked.path) {
            return json_body(StatusCode::OK, &found);
        }
        if asked.path == tokens::REVIEWS && asked.method == Method::POST {
            return self.review(request).await;
        }
        match Kind::SERVED.into_iter().find(|kind| kind.path() == asked.path) {
            Some(kind) if asked.method == Method::GET => self.collection(kind, &asked).await,
            Some(_) => failure(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", "only reads are served"),
            None => not_found(),
        }
    }

    async fn review(&self, request: Request<Incoming>) -> Response<Body> {
        let fault = self.shared().tokens.fault.clone();
        if let Some(fault) = fault {
            return self.fail(fault).await;
        }
        let Ok(body) = request.into_body().collect().await else { return not_found() };
        match serde_json::from_slice(&body.to_bytes()) {
            Ok(review) => json_body(StatusCode::CREATED, &self.shared().review(&review)),
            Err(error) => failure(StatusCode::BAD_REQUEST, "BadRequest", &error.to_string()),
        }
    }

    fn record(&self, request: &Request<Incoming>) -> Asked {
        let mut shared = self.shared();
        let bearer = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let asked = Asked {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            query: parameters(request.uri().query().unwrap_or_default()).into_iter().collect(),
            authorized: bearer.and_then(|value| value.strip_prefix("Bearer ")) == Some(&shared.token),
        };
        shared.asked.push(asked.clone());
        asked
    }

    async fn collection(&self, kind: Kind, asked: &Asked) -> Response<Body> {
        let fault = {
            let mut shared = self.shared();
            let resource = shared.resources.get_mut(&kind).expect("every kind is there");
            let fault = if asked.is_watch() { &resource.watch_fault } else { &resource.list_fault };
            match fault {
                Some(fault) => fault.clone(),
                None if asked.is_watch() => return watch(resource.watch(&asked.query)),
                None => return bytes_body(StatusCode::OK, resource.list()),
            }
        };
        self.fail(fault).await
    }

    async fn fail(&self, fault: Fault) -> Response<Body> {
        match fault {
            Fault::Status(status) => {
                let reason = status.canonical_reason().unwrap_or_default().replace(' ', "");
                let reason = if status == StatusCode::GONE { "Expired".to_owned() } else { reason };
                failure(status, &reason, "this failure was ordered by a test")
            }
            Fault::Body(body) => bytes_body(StatusCode::OK, body),
            Fault::Silence => std::future::pending().await,
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("can't read {}", path.display()))
}

/// An answer that goes on until the other end of the channel is dropped, and breaks off at an error.
fn watch(mut events: mpsc::UnboundedReceiver<std::io::Result<Bytes>>) -> Response<Body> {
    let events = futures_util::stream::poll_fn(move |context| events.poll_recv(context));
    body(StatusCode::OK, "application/json", StreamBody::new(events.map(|event| event.map(Frame::data))))
}

pub(crate) fn json_body(status: StatusCode, value: &Value) -> Response<Body> {
    bytes_body(status, value.to_string().into())
}

fn bytes_body(status: StatusCode, bytes: Bytes) -> Response<Body> {
    body(status, "application/json", Full::new(bytes).map_err(|never| match never {}))
}

fn body<B>(status: StatusCode, kind: &'static str, body: B) -> Response<Body>
where
    B: hyper::body::Body<Data = Bytes, Error = std::io::Error> + Send + 'static,
{
    let mut response = Response::new(Body::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

fn not_found() -> Response<Body> {
    failure(StatusCode::NOT_FOUND, "NotFound", "the server could not find the requested resource")
}

pub(crate) fn failure(status: StatusCode, reason: &str, message: &str) -> Response<Body> {
    json_body(status, &status_object(status, reason, message))
}

/// A `v1.Status` that tells of a failure.
fn status_object(status: StatusCode, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": status.as_u16(),
    })
}
