//! One request: who asks, whether that may be, and the way to an API server and back.

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode, Version,
    body::{Body, Frame, Incoming, SizeHint},
    header,
    http::request::Parts,
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use proto::io::{dialer::Origin, relay::relay_sockets};

use super::{
    authn::{Authenticated, Moment, Presented},
    authz::{Attributes, impersonate::Impersonation},
    headers,
    limits::Place,
    local::refuse_pages,
    recorder::Recorder,
    request_info::RequestInfo,
    server::{Connection, DOOR},
    upstream::{BodyError, Lease, RequestBody, ResponseBody, UpstreamError},
    user::User,
};
use crate::{
    front_door::{
        Caller,
        proxy_url::{self, ProxyUrls},
    },
    http::{hop::Hop, status::Failure, watched::Busy},
};

impl Connection {
    pub(super) async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Answer>, Infallible> {
        let busy = self.activity.busy();
        self.front_end.audit.room().await;
        let mut record = Recorder::new(self.front_end.audit.clone(), &self.peer, &request);
        // A Content-Length beside it is dropped unseen, and whoever stands before this server may have gone by it.
        let http1 = request.version() < Version::HTTP_2;
        let mut last = http1 && request.headers().contains_key(header::TRANSFER_ENCODING);
        let (mut response, upgrade) = match self.proxy(request, &mut record).await {
            Ok(answered) => answered,
            Err(failure) => {
                // What follows a head that is not understood need not be a request.
                last |= http1 && failure.code == StatusCode::BAD_REQUEST;
                let response = failure.response().map(|body| Answer::from(Content::Own(body)));
                (response, None)
            }
        };
        if last && upgrade.is_none() {
            response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
        }
        record.answered(response.status());
        let record = Arc::new(record);
        let held = Held { record: record.clone(), busy };
        if let Some(upgrade) = upgrade {
            let busy = self.activity.busy();
            self.front_end.connections.spawn(async move {
                let _busy = busy;
                upgrade.carry(&record).await;
            });
        }
        Ok(response.map(|body| Answer { held: Some(held), ..body }))
    }

    async fn proxy(
        self: &Arc<Self>,
        request: Request<Incoming>,
        record: &mut Recorder,
    ) -> Result<Answered, Failure> {
        let front_end = &self.front_end;
        let peer = self.peer.ip();
        front_end.limits.address(&self.peer).inspect_err(|_| record.limited())?;
        let (mut head, body) = request.into_parts();
        headers::refuse_ambiguous(&head)?;
        let caller = self.authenticate(&head, record).await?;
        let mut hop = if head.version < Version::HTTP_2 { Hop::of(&head.headers) } else { Hop::default() };
        hop.upgrade = headers::known_upgrade(&hop).cloned();
        let info = RequestInfo::resolve(
            head.method.as_str(),
            head.uri.path(),
            head.uri.query(),
            hop.upgrade.is_some(),
        )
        .map_err(|error| Failure::new(StatusCode::BAD_REQUEST, error.to_string()))?;
        let info = Arc::new(info);
        record.about(&info);
        let urls = front_end.proxy_urls.as_ref().filter(|_| is_proxy_url(&info));
        let user = self.authorize(&head, caller, &info, urls.is_some(), record).await?;
        let long_running = hop.upgrade.is_some() || is_long_running(&info, head.uri.query());
        let place =
            front_end.limits.place(&user.name, long_running).await.inspect_err(|_| record.limited())?;

        record.allowed();
        if let Some(urls) = urls {
            // What it was authorized as is what it must be: another protocol would be an upgrade to its target only.
            if hop.upgrade.is_none() && Hop::of(&head.headers).upgrade.is_some() {
                return Err(Failure::new(
                    StatusCode::BAD_REQUEST,
                    "no upgrade but to websocket or SPDY/3.1 is served here",
                ));
            }
            headers::remove_claims(&mut head.headers);
            return self.through_tunnel(urls, &user, place, Request::from_parts(head, body), record).await;
        }
        headers::request(&mut head.headers, &hop, &user, peer)?;
        head.version = Version::HTTP_11;
        let announced = body.size_hint().lower();
        if announced > front_end.config.max_body {
            return Err(failed_body(&BodyError::TooLarge));
        }
        let caller_upgrade = hop.upgrade.is_some().then(|| {
            let on = head.extensions.remove::<OnUpgrade>();
            head.extensions.clear();
            on
        });
        head.extensions.clear();
        let body = RequestBody::new(
            body,
            front_end.config.max_body,
            front_end.config.body_timeout,
            record.received_bytes.clone(),
        );
        let request = Request::from_parts(head, body);
        let mut response = self.send(request, caller_upgrade.is_some(), long_running).await?;
        let place = match place {
            // The work is done once the response begins; how fast its caller reads is not the others' loss.
            Place::Seat(_) => None,
            Place::LongRunning(_) => Some(place),
        };

        let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        headers::response(response.headers_mut(), upgraded);
        *response.version_mut() = Version::HTTP_11;
        if !upgraded {
            let answer = |body| Answer { _place: place, ..Answer::from(Content::Relayed(body)) };
            return Ok((response.map(answer), None));
        }
        let Some(Some(caller)) = caller_upgrade else {
            let message = "the API server changed to another protocol without being asked";
            return Err(Failure::bad_gateway(message));
        };
        let server = hyper::upgrade::on(&mut response);
        let half_closed_timeout = front_end.config.half_closed_timeout;
        let (head, body) = response.into_parts();
        let lease = body.into_lease();
        let upgrade = Upgrade::Server { caller, server, lease, _place: place, half_closed_timeout };
        let response = Response::from_parts(head, Answer::from(Content::Own(Full::default())));
        Ok((response, Some(upgrade)))
    }

    /// Answers a proxy URL: to its target goes nothing of who asks.
    async fn through_tunnel(
        self: &Arc<Self>,
        urls: &Arc<ProxyUrls>,
        user: &User,
        place: Place,
        request: Request<Incoming>,
        record: &Recorder,
    ) -> Result<Answered, Failure> {
        let origin = Origin(format!("front-end request {} of {:?} from {}", record.id, user.name, self.peer));
        let caller = Caller { door: DOOR, origin };
        let (response, upgrade) = urls.answer(caller, self.peer.ip(), &self.activity, request).await?;
        let (held, upgrade) = match upgrade {
            Some(upgrade) => (None, Some(Upgrade::Target { upgrade, _place: place })),
            None => (Some(place), None),
        };
        Ok((response.map(|body| Answer { _place: held, ..Answer::from(Content::Target(body)) }), upgrade))
    }

    async fn authenticate(&self, head: &Parts, record: &mut Recorder) -> Result<Authenticated, Failure> {
        let front_end = &self.front_end;
        if let Some(who) = &self.known {
            refuse_pages(&self.peer, head)?;
            record.authenticated(who);
            return Ok(who.clone());
        }
        let now = Moment::now();
        let recognized = match Presented::of(head, &self.certificates) {
            Ok(presented) => {
                let by_certificate = presented.bearer.is_none() && !self.certificates.is_empty();
                if by_certificate && let Some(who) = self.remembered(&now) {
                    record.authenticated(&who);
                    return Ok(who);
                }
                front_end.limits.may_try(&self.peer).inspect_err(|_| record.limited())?;
                let generation = front_end.authn.generation();
                let recognized = front_end.authn.authenticate(&presented, now).await;
                if by_certificate && let Ok(who) = &recognized {
                    self.remember(generation, &now, who);
                }
                recognized
            }
            Err(failure) => Err(failure),
        };
        match recognized {
            Ok(who) => {
                record.authenticated(&who);
                Ok(who)
            }
            Err(failure) => {
                front_end.limits.failed(&self.peer);
                record.unauthenticated();
                tracing::info!(peer = %self.peer, reason = %failure, "a caller is not recognised");
                Err(Failure::new(StatusCode::UNAUTHORIZED, "Unauthorized"))
            }
        }
    }

    /// The user on whose behalf the request goes on.
    async fn authorize(
        &self,
        head: &Parts,
        caller: Authenticated,
        info: &RequestInfo,
        served_here: bool,
        record: &mut Recorder,
    ) -> Result<Arc<User>, Failure> {
        let front_end = &self.front_end;
        let denied = |reason: String| Failure::new(StatusCode::FORBIDDEN, format!("forbidden: {reason}"));
        let impersonation = Impersonation::requested(&head.headers)
            .map_err(|error| Failure::new(StatusCode::BAD_REQUEST, error.to_string()))?;
        let user = match impersonation {
            None => caller.user,
            Some(impersonation) => match impersonation.allowed(&caller.user, &front_end.authz).await {
                Ok(user) => {
                    let user = Arc::new(user);
                    record.impersonates(&user);
                    user
                }
                Err(verdict) => {
                    record.decided(&verdict);
                    return Err(denied(verdict.reason));
                }
            },
        };
        if served_here || front_end.authorize_everything {
            let verdict = front_end.authz.decide(&Attributes { user: &user, request: info }).await;
            record.decided(&verdict);
            if !verdict.allowed {
                return Err(denied(verdict.reason));
            }
        }
        Ok(user)
    }

    async fn send(
        &self,
        request: Request<RequestBody>,
        upgrade: bool,
        long_running: bool,
    ) -> Result<Response<ResponseBody>, Failure> {
        let front_end = &self.front_end;
        let exchange = async {
            match upgrade {
                true => front_end.upstream.upgrade(request).await,
                false => front_end.upstream.send(request).await,
            }
        };
        let exchanged = if long_running {
            exchange.await
        } else {
            let timeout = tokio::time::timeout(front_end.config.request_timeout, exchange);
            let Ok(exchanged) = timeout.await else {
                let message = "the API server did not answer in time";
                return Err(Failure::new(StatusCode::GATEWAY_TIMEOUT, message));
            };
            exchanged
        };
        exchanged.map_err(|error| {
            if let UpstreamError::Body(error) = &error {
                return failed_body(error);
            }
            tracing::warn!(%error, "a request has no answer");
            match error {
                UpstreamError::Unreachable(_) => {
                    let failure =
                        Failure::new(StatusCode::SERVICE_UNAVAILABLE, "no API server can be reached");
                    failure.retry_after(1)
                }
                UpstreamError::Body(_) | UpstreamError::Broken(_) => {
                    Failure::bad_gateway("the connection to the API server broke off")
                }
            }
        })
    }
}

fn failed_body(error: &BodyError) -> Failure {
    let code = match error {
        BodyError::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        BodyError::Stalled => StatusCode::REQUEST_TIMEOUT,
        BodyError::Broken(_) => StatusCode::BAD_REQUEST,
    };
    Failure::new(code, error.to_string())
}

/// Whether a request is for what stands behind a node, pod or service.
fn is_proxy_url(info: &RequestInfo) -> bool {
    info.group.is_empty()
        && info.version == "v1"
        && info.subresource == "proxy"
        && ["nodes", "pods", "services"].contains(&info.resource.as_str())
}

/// Whether a request may take as long as it likes, as kube-apiserver has it.
fn is_long_running(info: &RequestInfo, query: Option<&str>) -> bool {
    let follows = || {
        let pairs = query.unwrap_or_default().split('&');
        let mut values = pairs.filter_map(|pair| pair.strip_prefix("follow="));
        values.any(|value| value != "false" && value != "0")
    };
    info.verb == "watch"
        || info.subresource == "proxy"
        || info.verb == "proxy"
        || ["exec", "attach", "portforward"].contains(&info.subresource.as_str())
        || info.subresource == "log" && follows()
}

/// A response, and what follows it.
type Answered = (Response<Answer>, Option<Upgrade>);

/// The body of a response.
pub struct Answer {
    content: Content,
    held: Option<Held>,
    _place: Option<Place>,
}

enum Content {
    Own(Full<Bytes>),
    Relayed(ResponseBody),
    /// Of what was reached through a tunnel.
    Target(proxy_url::Body),
}

/// For as long as a response is passed on.
struct Held {
    record: Arc<Recorder>,
    #[expect(dead_code, reason = "held")]
    busy: Busy,
}

/// A connection that changes to another protocol.
enum Upgrade {
    Server {
        caller: OnUpgrade,
        server: OnUpgrade,
        lease: Lease,
        _place: Option<Place>,
        half_closed_timeout: Duration,
    },
    Target {
        upgrade: proxy_url::Upgrade,
        _place: Place,
    },
}

impl Upgrade {
    /// Passes on raw bytes until both directions have ended.
    async fn carry(self, record: &Recorder) {
        match self {
            Self::Server { caller, mut server, mut lease, half_closed_timeout, _place } => {
                let server = poll_fn(|cx| {
                    lease.drive(cx);
                    Pin::new(&mut server).poll(cx)
                });
                let (Ok(server), Ok(caller)) = (server.await, caller.await) else { return };
                let (caller, server) = (TokioIo::new(caller), TokioIo::new(server));
                let relayed = relay_sockets(caller, server, &record.carried, half_closed_timeout).await;
                if let Err(error) = relayed {
                    tracing::debug!(%error, "an upgraded connection failed");
                }
            }
            Self::Target { upgrade, _place } => upgrade.carry(&record.carried).await,
        }
    }
}

impl From<Content> for Answer {
    fn from(content: Content) -> Self {
        Self { content, held: None, _place: None }
    }
}

impl Answer {
    fn count(&self, frame: &Poll<Option<Result<Frame<Bytes>, hyper::Error>>>) {
        if let Poll::Ready(Some(Ok(frame))) = frame
            && let (Some(data), Some(held)) = (frame.data_ref(), &self.held)
        {
            held.record.sent(data.len() as u64);
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        match &mut this.content {
            Content::Own(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Content::Target(body) => {
                let frame = Pin::new(body).poll_frame(cx);
                this.count(&frame);
                frame
            }
            Content::Relayed(body) => {
                let frame = Pin::new(body).poll_frame(cx);
                this.count(&frame);
                frame
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Own(body) => body.is_end_stream(),
            Content::Target(body) => body.is_end_stream(),
            Content::Relayed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Own(body) => body.size_hint(),
            Content::Target(body) => body.size_hint(),
            Content::Relayed(body) => body.size_hint(),
        }
    }
}
