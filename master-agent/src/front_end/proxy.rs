//! One request: who asks, whether that may be, and the way to an API server and back.

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use access::{
    authn::{self, Authenticated, Presented, Validity},
    moment::Moment,
    request_info::RequestInfo,
    user::User,
};
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode, Version,
    body::{Body, Incoming},
    header,
    http::request::Parts,
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use proto_net::{dialer::Origin, relay::relay_until};

use super::{
    answer::{Answer, Content, Held},
    browser::refuse_pages,
    connection::Connection,
    headers,
    limits::{Attempt, RequestPermit, too_many},
    link::Link,
    proxy_urls::ProxyUrls,
    recorder::Recorder,
    server::DOOR,
    streams,
    upstream::{BodyError, Lease, RequestBody, ResponseBody, UpstreamError},
};
use crate::{
    http::{exchange, hop::Hop, status::Failure},
    stream::caller::Caller,
};

/// Answers of 429 on one connection before whoever has not authenticated there has to make another.
const LIMITED: u32 = 16;

impl Connection {
    pub(super) async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Answer>, Infallible> {
        let busy = self.activity.busy();
        let mut record =
            Recorder::new(self.front_end.audit.clone(), self.front_end.metrics.clone(), &self.peer, &request);
        // A Content-Length beside it is dropped unseen, and whoever stands before this server may have gone by it.
        let http1 = request.version() < Version::HTTP_2;
        let mut last = http1 && request.headers().contains_key(header::TRANSFER_ENCODING);
        let answered = match self.proxy(request, &mut record).await {
            Ok(answered) => answered,
            Err(failure) => {
                record.refused().await;
                // What follows a head that is not understood need not be a request.
                last |= http1 && failure.code == StatusCode::BAD_REQUEST;
                failure.into()
            }
        };
        let Answered { mut response, place, validity, upgrade } = answered;
        // Who has shown nothing that is good yet does not keep a connection by asking again.
        if response.status().is_client_error()
            && self.is_strangers()
            && !self.may_ask_again(response.status())
        {
            last = http1;
            self.ending.cancel();
        }
        if last && upgrade.is_none() {
            response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
        }
        record.answered(response.status());
        let record = Arc::new(record);
        let held = Held { record: record.clone(), _busy: busy, _place: place, progress: streams::progress() };
        let kept = (self.clone(), self.activity.busy());
        match upgrade {
            Some(Upgrade::Link(link)) => link.begin(&record, kept),
            Some(Upgrade::Stream(stream)) => {
                let end = validity.end();
                self.front_end.connections.spawn(async move {
                    let expired = async {
                        match end {
                            Some(end) => end.await,
                            None => std::future::pending().await,
                        }
                    };
                    stream.carry(&record, expired).await;
                    drop(kept);
                });
            }
            None => {}
        }
        Ok(response.map(|content| Answer::new(content, held, validity.end())))
    }

    /// Who is told to come later would only come with another handshake, which costs more than this answer.
    fn may_ask_again(&self, refused: StatusCode) -> bool {
        refused == StatusCode::TOO_MANY_REQUESTS && self.limited.fetch_add(1, Ordering::Relaxed) < LIMITED
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
        let mut caller = match self.joining(&head, record).await? {
            Some(caller) => caller,
            None => self.authenticate(&head, record).await?,
        };
        self.authenticated(&caller);
        let validity = std::mem::take(&mut caller.validity);
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
        self.refuse_other_node(&caller, record)?;
        if let Some(call) = self.call(&info)? {
            let request = Request::from_parts(head, body);
            let (response, link) = call.answer(self, request, caller, &info, record).await?;
            // The credential admits; how long the link lasts is for the identity inside it.
            let upgrade = Some(Upgrade::Link(link));
            return Ok(Answered { response, place: None, validity: Validity::default(), upgrade });
        }
        let urls = front_end.proxy_urls.as_ref().filter(|_| is_proxy_url(&info));
        let page = front_end.page(&info.path).filter(|_| !info.is_resource);
        let long_running = is_long_running(&info, head.uri.query())
            || page.is_some_and(|page| page.is_long_running(&info.path));
        // What may become long is recorded, and bounded, as if it were.
        record.reserve_or_refuse(long_running || hop.upgrade.is_some(), &front_end.limits).await?;
        // Whoever the caller acts as, and before authorizers do anything for it.
        let place = front_end.limits.place(&caller.user.name, long_running).await;
        let mut place = place.inspect_err(|_| record.limited())?;
        let counted = hop.upgrade.as_ref().map(|_| caller.user.name.clone());
        let served_here = urls.is_some() || page.is_some();
        let user = self.authorize(&head, caller, &info, served_here, record).await?;
        // What is short may come to its end.
        let validity = if long_running || hop.upgrade.is_some() { validity } else { Validity::default() };

        record.allowed();
        if let Some(urls) = urls {
            // What it was authorized as is what it must be: another protocol would be an upgrade to its target only.
            if hop.upgrade.is_none() && Hop::of(&head.headers).upgrade.is_some() {
                return Err(Failure::new(
                    StatusCode::BAD_REQUEST,
                    "no upgrade but to websocket or SPDY/3.1 is served here",
                ));
            }
            front_end.introduction.claims.remove(&mut head.headers);
            record.inject(&mut head.headers);
            let request = Request::from_parts(head, body);
            let answered = self.through_tunnel(urls, &user, place, request, record).await?;
            return Ok(Answered { validity, ..answered });
        }
        if let Some(page) = page {
            let body = self.limited(body, record);
            let request = Request::from_parts(head, body);
            let origin = self.origin(record, &user);
            let response = page.clone().answer(info.path.clone(), request, origin).await;
            let response = response.map(Content::Page);
            return Ok(Answered { response, place: Some(place), validity, upgrade: None });
        }
        front_end.introduction.request(&mut head.headers, &hop, &user, peer)?;
        record.inject(&mut head.headers);
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
        let body = self.limited(body, record);
        let request = Request::from_parts(head, body);
        let timeout = if long_running { validity.left() } else { Some(front_end.config.request_timeout) };
        let mut response = self.send(request, caller_upgrade.is_some(), timeout).await?;
        place.answered();

        let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        headers::response(response.headers_mut(), upgraded);
        *response.version_mut() = Version::HTTP_11;
        if !upgraded {
            let validity = if long_running { validity } else { Validity::default() };
            let response = response.map(Content::Relayed);
            return Ok(Answered { response, place: Some(place), validity, upgrade: None });
        }
        let Some(Some(caller)) = caller_upgrade else {
            let message = "the API server changed to another protocol without being asked";
            return Err(Failure::bad_gateway(message));
        };
        let counted = counted.as_deref().unwrap_or(&user.name);
        let place = front_end.limits.upgraded(place, counted).inspect_err(|_| record.limited())?;
        let server = hyper::upgrade::on(&mut response);
        let half_closed_timeout = front_end.config.half_closed_timeout;
        let (head, body) = response.into_parts();
        let lease = body.into_lease();
        let upgrade = Stream::Server { caller, server, lease, _place: place, half_closed_timeout };
        let response = Response::from_parts(head, Content::Own(Full::default()));
        Ok(Answered { response, place: None, validity, upgrade: Some(Upgrade::Stream(upgrade)) })
    }

    fn limited(&self, body: Incoming, record: &Recorder) -> RequestBody {
        let config = &self.front_end.config;
        RequestBody::new(body, config.max_body, config.body_timeout, record.received_bytes.clone())
    }

    /// As the records of streams name it.
    fn origin(&self, record: &Recorder, user: &User) -> Origin {
        Origin(format!("front-end request {} of {:?} from {}", record.id, user.name, self.peer))
    }

    /// Answers a proxy URL: to its target goes nothing of who asks.
    async fn through_tunnel(
        self: &Arc<Self>,
        urls: &Arc<dyn ProxyUrls>,
        user: &User,
        place: RequestPermit,
        request: Request<Incoming>,
        record: &mut Recorder,
    ) -> Result<Answered, Failure> {
        let caller = Caller { listener: DOOR, origin: self.origin(record, user), span: record.span() };
        let (answered, node) =
            urls.clone().answer(caller, self.peer.ip(), self.activity.clone(), request).await;
        if let Some(node) = node {
            record.through(node);
        }
        let (response, upgrade) = answered?;
        let (place, upgrade) = match upgrade {
            Some(upgrade) => (None, Some(Upgrade::Stream(Stream::Target { upgrade, _place: place }))),
            None => (Some(place), None),
        };
        let (response, validity) = (response.map(Content::Target), Validity::default());
        Ok(Answered { response, place, validity, upgrade })
    }

    async fn authenticate(&self, head: &Parts, record: &mut Recorder) -> Result<Authenticated, Failure> {
        let front_end = &self.front_end;
        if let Some(who) = &self.known {
            refuse_pages(&self.peer, head)?;
            record.authenticated(who);
            return Ok(who.clone());
        }
        let now = Moment::now();
        let attempt = front_end.limits.attempt(&self.peer);
        let recognized = match Presented::of(head, &self.certificates) {
            Ok(presented) => {
                let by_certificate = presented.bearer.is_none() && !self.certificates.is_empty();
                if by_certificate && let Some(who) = self.remembered(&now) {
                    record.authenticated(&who);
                    return Ok(who);
                }
                let generation = front_end.authn.generation();
                let recognized = front_end.authn.authenticate(presented.guarded(&attempt), now).await;
                if by_certificate && let Ok(who) = &recognized {
                    self.remember(generation, &now, who);
                }
                recognized
            }
            Err(failure) => Err(failure),
        };
        match recognized {
            Ok(who) => {
                attempt.forgive();
                record.authenticated(&who);
                Ok(who)
            }
            Err(failure) => {
                if let Some(who) = self.linking(head, &failure) {
                    attempt.forgive();
                    record.authenticated(&who);
                    return Ok(who);
                }
                Err(self.unrecognized(attempt, &failure, record))
            }
        }
    }

    fn unrecognized(&self, attempt: Attempt<'_>, why: &authn::Failure, record: &mut Recorder) -> Failure {
        record.unrecognized(why);
        let limited = match why.not_tried() {
            Some(after) => Some(too_many(after)),
            None if why.is_unavailable() => {
                attempt.forgive();
                tracing::debug!(peer = %self.peer, reason = %why, "a caller's credential can't be checked");
                let message = "the credential can't be checked at the moment, please try again later";
                return Failure::new(StatusCode::SERVICE_UNAVAILABLE, message).retry_after(1);
            }
            None => attempt.fail().err().map(Failure::from),
        };
        if let Some(limited) = limited {
            self.front_end.limits.count("failures_per_address");
            record.limited();
            return limited;
        }
        record.unauthenticated();
        tracing::info!(peer = %self.peer, reason = %why, "a caller is not recognised");
        Failure::new(StatusCode::UNAUTHORIZED, "Unauthorized")
    }

    async fn send(
        &self,
        request: Request<RequestBody>,
        upgrade: bool,
        timeout: Option<Duration>,
    ) -> Result<Response<ResponseBody>, Failure> {
        let front_end = &self.front_end;
        let exchange = async {
            match upgrade {
                true => front_end.upstream.upgrade(request).await,
                false => front_end.upstream.send(request).await,
            }
        };
        let exchanged = match timeout {
            None => exchange.await,
            Some(timeout) => tokio::time::timeout(timeout, exchange).await.map_err(|_| {
                Failure::new(StatusCode::GATEWAY_TIMEOUT, "the API server did not answer in time")
            })?,
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

/// A response, and what is to become of it.
struct Answered {
    pub response: Response<Content>,
    /// Of the request while its response is passed on.
    pub place: Option<RequestPermit>,
    /// For how long it was granted.
    pub validity: Validity,
    pub upgrade: Option<Upgrade>,
}

impl From<Failure> for Answered {
    fn from(failure: Failure) -> Self {
        let response = failure.response().map(Content::Own);
        Self { response, place: None, validity: Validity::default(), upgrade: None }
    }
}

/// A connection that changes to another protocol.
enum Upgrade {
    Stream(Stream),
    /// Of a node that calls home.
    Link(Link),
}

/// One whose bytes are passed on.
enum Stream {
    Server {
        caller: OnUpgrade,
        server: OnUpgrade,
        lease: Lease,
        _place: RequestPermit,
        half_closed_timeout: Duration,
    },
    Target {
        upgrade: exchange::Upgrade,
        _place: RequestPermit,
    },
}

impl Stream {
    /// Passes on raw bytes until both directions have ended, or `expired` completes.
    async fn carry(self, record: &Recorder, expired: impl Future<Output = ()>) {
        match self {
            Self::Server { caller, mut server, mut lease, half_closed_timeout, _place } => {
                let server = poll_fn(|cx| {
                    lease.drive(cx);
                    Pin::new(&mut server).poll(cx)
                });
                let (Ok(server), Ok(caller)) = (server.await, caller.await) else { return };
                let (caller, server) = (TokioIo::new(caller), TokioIo::new(server));
                let counters = &record.carried;
                let relayed = relay_until(caller, server, counters, half_closed_timeout, expired).await;
                if let Err(error) = relayed {
                    tracing::debug!(%error, "an upgraded connection failed");
                }
            }
            Self::Target { upgrade, _place } => upgrade.carry(&record.carried, expired).await,
        }
    }
}
