//! One request to its target and the response back, as they come.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode, Uri, Version,
    body::{Body as HttpBody, Frame, Incoming, SizeHint},
    client::conn::http1::{self, SendRequest},
    http::uri::PathAndQuery,
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use proto::{
    DialError, Target,
    io::relay::{Counters, relay_until},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::oneshot,
};

use super::{
    Call,
    endpoint::Endpoint,
    headers::{self, Forwarded},
    status::Failure,
    upload::{Answered, Stalled, Upload},
    watched::Busy,
};
use crate::{front_door::Caller, http::hop::Hop, traces};

/// How long the rest of an exchange may take once its response has been passed on: an upload that was answered
/// before its end, or the target's closing.
const LINGER: Duration = Duration::from_secs(5);
const MAX_HEADERS: usize = 128;

impl Call {
    /// `prefix` and `rest` are the two parts of the request's path.
    pub(super) async fn forward(
        &self,
        mut request: Request<Incoming>,
        endpoint: Endpoint,
        prefix: &str,
        rest: &str,
    ) -> Result<Response<Body>, Failure> {
        let hop = Hop::of(request.headers());
        let caller_upgrade = hop.upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
        let host = endpoint.target.to_string();
        let asked_host = headers::asked_host(request.uri(), request.headers()).to_owned();
        let path = format!("{prefix}{rest}");
        let proto = self.entrance.proto();
        let forwarded = Forwarded { proto, peer: self.entrance.peer(), path: &path, host: &host };
        headers::request(request.headers_mut(), &hop, &forwarded, &self.door.claims);
        *request.uri_mut() = target_uri(rest, request.uri().query())?;
        *request.version_mut() = Version::HTTP_11;

        let mut caller = self.caller.clone();
        if self.entrance.is_unix() {
            caller.span = traces::parent(request.headers());
        }
        let (mut sender, exchange) = self.connect(&endpoint, caller).await?;
        let answered = Answered::default();
        let (idle_timeout, claims) = (self.door.idle_timeout, self.door.claims.clone());
        let request = request.map(|body| Upload::new(body, idle_timeout, answered.clone(), claims));
        let mut response = sender.send_request(request).await.map_err(|error| {
            let failure = match Stalled::cause_of(&error) {
                Some(stalled) => Failure::new(StatusCode::REQUEST_TIMEOUT, stalled.to_string()),
                None => Failure::bad_gateway(format!("{} at {host}: {}", endpoint.who, causes(&error))),
            };
            self.log(&endpoint.target, &failure);
            failure
        })?;
        answered.set();

        let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        headers::response(response.headers_mut(), upgraded, prefix, &[&host, &asked_host]);
        *response.version_mut() = Version::HTTP_11;
        if upgraded {
            let Some(caller) = caller_upgrade else {
                let message =
                    format!("{} at {host} changed to another protocol without being asked", endpoint.who);
                return Err(Failure::bad_gateway(message));
            };
            let target = hyper::upgrade::on(&mut response);
            let half_closed_timeout = self.door.common.half_closed_timeout;
            let busy = self.activity.busy();
            self.upgrade_to(Upgrade { caller, target, exchange, busy, half_closed_timeout });
            return Ok(response.map(|_| Body::empty()));
        }
        Ok(response.map(|incoming| Body { content: Content::Relayed { incoming, exchange }, _busy: None }))
    }

    /// A connection to the target on which one request can be made.
    async fn connect(
        &self,
        endpoint: &Endpoint,
        caller: Caller,
    ) -> Result<(SendRequest<Upload>, Exchange), Failure> {
        let Endpoint { target, who, tls } = endpoint;
        let common = &self.door.common;
        let mut dialling = Dialling { call: self, target, ended: false };
        let dialled = common.dial(target, &caller).await;
        dialling.ended = true;
        let dialled = dialled.map_err(|error| {
            common.dial_failed(target, &caller, &error);
            Failure::from(&error)
        })?;
        if let Some(node) = &dialled.connection.node {
            let _ = self.node.set(node.clone());
        }
        let socket = common.socket(dialled, target.clone(), caller);
        match tls {
            None => self.handshake(socket, endpoint).await,
            Some(expected) => {
                let tls = self.door.tls.connect(expected, who, target, &self.caller, socket).await;
                let tls = tls.inspect_err(|failure| self.log(target, failure))?;
                self.handshake(tls, endpoint).await
            }
        }
    }

    async fn handshake<S>(
        &self,
        socket: S,
        endpoint: &Endpoint,
    ) -> Result<(SendRequest<Upload>, Exchange), Failure>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http1::Builder::new()
            .max_headers(MAX_HEADERS)
            .handshake(TokioIo::new(socket))
            .await
            .map_err(|error| Failure::bad_gateway(format!("{}: {}", endpoint.who, causes(&error))))?;
        let (exchange, unwanted) = Exchange::new();
        self.door.common.connections.spawn(async move {
            tokio::select! {
                ended = connection.with_upgrades() => {
                    if let Err(error) = ended {
                        tracing::debug!(error = causes(&error), "connection to a target failed");
                    }
                }
                () = unwanted => {}
            }
        });
        Ok((sender, exchange))
    }

    fn log(&self, target: &Target, failure: &Failure) {
        let Caller { door: front_door, origin, .. } = &self.caller;
        tracing::info!(front_door, %origin, %target, error = %failure, "request failed");
    }
}

/// Records a dial that its caller left.
struct Dialling<'a> {
    call: &'a Call,
    target: &'a Target,
    ended: bool,
}

impl Drop for Dialling<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.call.door.common.dial_failed(self.target, &self.call.caller, &DialError::Cancelled);
        }
    }
}

/// Keeps the connection to the target for as long as its exchange goes on. Dropped before the end, the connection is
/// cut at once.
struct Exchange(Option<oneshot::Sender<()>>);

impl Exchange {
    /// Beside it: what completes when the connection is not wanted any more.
    fn new() -> (Self, impl Future<Output = ()> + Send) {
        let (sender, receiver) = oneshot::channel();
        let unwanted = async {
            if receiver.await.is_ok() {
                tokio::time::sleep(LINGER).await;
            }
        };
        (Self(Some(sender)), unwanted)
    }

    /// The response has been passed on to its end.
    fn complete(&mut self) {
        if let Some(sender) = self.0.take() {
            let _ = sender.send(());
        }
    }
}

/// A connection that has changed to another protocol, on both sides.
pub struct Upgrade {
    caller: OnUpgrade,
    target: OnUpgrade,
    exchange: Exchange,
    busy: Busy,
    half_closed_timeout: Duration,
}

impl Upgrade {
    /// Passes on raw bytes until both directions have ended, or one has and the other is silent, or `until` completes.
    pub async fn carry(self, carried: &Counters, until: impl Future<Output = ()>) {
        let Self { caller, target, mut exchange, busy, half_closed_timeout } = self;
        let (Ok(caller), Ok(target)) = (caller.await, target.await) else { return };
        let (caller, target) = (TokioIo::new(caller), TokioIo::new(target));
        match relay_until(caller, target, carried, half_closed_timeout, until).await {
            Ok(true) => exchange.complete(),
            Ok(false) => tracing::debug!(
                "upgraded connection was half-closed and silent for too long, or its time was over"
            ),
            Err(error) => tracing::debug!(%error, "upgraded connection failed"),
        }
        drop(busy);
    }
}

/// The body of a response.
pub struct Body {
    content: Content,
    _busy: Option<Busy>,
}

enum Content {
    Own(Full<Bytes>),
    Relayed { incoming: Incoming, exchange: Exchange },
}

impl Body {
    pub fn empty() -> Self {
        Self::from(Full::default())
    }

    /// Until it has been passed on, or given up.
    pub fn while_busy(self, busy: Busy) -> Self {
        Self { _busy: Some(busy), ..self }
    }
}

impl From<Full<Bytes>> for Body {
    fn from(body: Full<Bytes>) -> Self {
        Self { content: Content::Own(body), _busy: None }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.content {
            Content::Own(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Content::Relayed { incoming, exchange } => {
                let frame = Pin::new(&mut *incoming).poll_frame(cx);
                if matches!(frame, Poll::Ready(None)) || incoming.is_end_stream() {
                    exchange.complete();
                }
                frame
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Own(body) => body.is_end_stream(),
            Content::Relayed { incoming, .. } => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Own(body) => body.size_hint(),
            Content::Relayed { incoming, .. } => incoming.size_hint(),
        }
    }
}

/// What the target is asked for: the rest of the path and the query, byte for byte.
fn target_uri(rest: &str, query: Option<&str>) -> Result<Uri, Failure> {
    let path = if rest.is_empty() { "/" } else { rest };
    let text = match query {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    PathAndQuery::try_from(text)
        .map(Uri::from)
        .map_err(|e| Failure::new(StatusCode::BAD_REQUEST, e.to_string()))
}

/// hyper's errors show their cause only when they are asked for it.
fn causes(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
