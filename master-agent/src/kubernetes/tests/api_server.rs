//! An API server in memory. A test answers each request when and as it likes.

use std::{
    collections::BTreeMap,
    io,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, future::BoxFuture, stream};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{Request, Response, StatusCode, body::Frame};
use kube::{Client, client::Body};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tower_service::Service;

type Answer = Response<UnsyncBoxBody<Bytes, io::Error>>;

/// No client is this patient, in paused time.
const FOR_EVER: Duration = Duration::from_secs(3600);

pub(super) struct ApiServer {
    requests: mpsc::UnboundedReceiver<Asked>,
    /// Requests that a test has not asked for yet.
    waiting: Vec<Asked>,
}

/// A request. If it is dropped, the client's connection breaks.
pub(super) struct Asked {
    plural: String,
    query: BTreeMap<String, String>,
    answer: oneshot::Sender<Answer>,
}

/// The body of a watch's answer, which ends in good order when this is dropped.
pub(super) struct Events(mpsc::UnboundedSender<io::Result<Bytes>>);

impl ApiServer {
    pub(super) fn start() -> (Self, Client) {
        let (sender, requests) = mpsc::unbounded_channel();
        (Self { requests, waiting: Vec::new() }, Client::new(Requests(sender), "default"))
    }

    /// The next request about a kind, given by its plural.
    pub(super) async fn asked(&mut self, plural: &str) -> Asked {
        if let Some(at) = self.waiting.iter().position(|asked| asked.plural == plural) {
            return self.waiting.remove(at);
        }
        loop {
            let next = tokio::time::timeout(FOR_EVER, self.requests.recv()).await;
            let asked = next.unwrap_or_else(|_| panic!("nobody asks for {plural}")).unwrap();
            if asked.plural == plural {
                return asked;
            }
            self.waiting.push(asked);
        }
    }

    /// The next request, which must be a list.
    pub(super) async fn list(&mut self, plural: &str) -> Asked {
        let asked = self.asked(plural).await;
        assert_eq!(asked.parameter("watch"), None, "a watch of {plural} from {:?}", asked.version());
        asked
    }

    /// The next request, which must be a watch from this version.
    pub(super) async fn watch(&mut self, plural: &str, version: &str) -> Asked {
        let asked = self.asked(plural).await;
        assert_eq!(asked.parameter("watch"), Some("true"), "a list of {plural}");
        assert_eq!(asked.version(), Some(version));
        asked
    }
}

impl Asked {
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str)
    }

    fn version(&self) -> Option<&str> {
        self.parameter("resourceVersion")
    }

    pub(super) fn answer(self, status: StatusCode, body: &Value) {
        let body = Full::new(Bytes::from(body.to_string()));
        self.respond(status, body.map_err(|never| match never {}).boxed_unsync());
    }

    /// A whole list.
    pub(super) fn list(self, version: &str, items: &[Value]) {
        self.page(version, items, "");
    }

    /// A part of a list, which goes on with a token unless that is empty.
    pub(super) fn page(self, version: &str, items: &[Value], next: &str) {
        let list = json!({
            "kind": "List", "apiVersion": "v1",
            "metadata": {"resourceVersion": version, "continue": next}, "items": items,
        });
        self.answer(StatusCode::OK, &list);
    }

    pub(super) fn fail(self, status: StatusCode) {
        let body = json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status.as_u16(),
            "message": status.canonical_reason(),
        });
        self.answer(status, &body);
    }

    /// The events of a watch.
    pub(super) fn begin(self) -> Events {
        let (sender, receiver) = mpsc::unbounded_channel::<io::Result<Bytes>>();
        let chunks =
            stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
        let frames = chunks.map(|chunk| chunk.map(Frame::data));
        self.respond(StatusCode::OK, StreamBody::new(frames).boxed_unsync());
        Events(sender)
    }

    fn respond(self, status: StatusCode, body: UnsyncBoxBody<Bytes, io::Error>) {
        let mut response = Response::new(body);
        *response.status_mut() = status;
        // The client may have given up.
        let _ = self.answer.send(response);
    }
}

impl Events {
    pub(super) fn send(&self, event: &str, object: Value) {
        self.bytes(&format!("{}\n", json!({"type": event, "object": object})));
    }

    pub(super) fn bytes(&self, bytes: &str) {
        self.0.send(Ok(Bytes::from(bytes.to_owned()))).unwrap();
    }

    /// Breaks the connection.
    pub(super) fn cut(self) {
        self.0.send(Err(io::Error::other("connection reset"))).unwrap();
    }
}

#[derive(Clone)]
struct Requests(mpsc::UnboundedSender<Asked>);

impl Service<Request<Body>> for Requests {
    type Response = Answer;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Answer>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let uri = request.uri();
        let plural = uri.path().rsplit('/').next().unwrap_or_default().to_owned();
        let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        let query = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let (answer, answered) = oneshot::channel();
        // Dropped if the server is gone, which breaks the connection.
        let _ = self.0.send(Asked { plural, query, answer });
        Box::pin(async move { answered.await.map_err(|_| io::Error::other("the API server is away")) })
    }
}
