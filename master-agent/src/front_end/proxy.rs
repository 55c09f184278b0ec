//! One request: who asks, whether that may be, and the way to an API server and back.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
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
use proto::io::relay::relay_sockets;

use super::{
    audit::Record,
    authn::{Authenticated, Moment, Presented},
    authz::{Attributes, impersonate::Impersonation},
    headers,
    limits::Place,
    request_info::RequestInfo,
    server::Connection,
    upstream::{BodyError, Lease, RequestBody, UpstreamError},
    user::User,
};
use crate::http::{hop::Hop, status::Failure, watched::Busy};

impl Connection {
    pub(super) async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Answer>, Infallible> {
        let busy = self.activity.busy();
        let mut record = Record::new(self.peer.ip(), request.method(), request.uri());
        let close = request.version() < Version::HTTP_2;
        let response = match self.proxy(request, &mut record).await {
            Ok(response) => response,
            Err(failure) => {
                let mut response = failure.response().map(|body| Answer::from(Content::Own(body)));
                // What is left of the request's body is not worth reading.
                if close && failure.code != StatusCode::FORBIDDEN {
                    response
                        .headers_mut()
                        .insert(header::CONNECTION, header::HeaderValue::from_static("close"));
                }
                response
            }
        };
        record.answered(response.status());
        Ok(response.map(|body| Answer { ended: Some(Ended { connection: self, record, busy }), ..body }))
    }

    async fn proxy(
        self: &Arc<Self>,
        request: Request<Incoming>,
        record: &mut Record,
    ) -> Result<Response<Answer>, Failure> {
        let front_end = &self.front_end;
        let peer = self.peer.ip();
        front_end.limits.address(&self.peer).inspect_err(|_| record.limited())?;
        let (mut head, body) = request.into_parts();
        headers::refuse_ambiguous(&head)?;
        let caller = self.authenticate(&head, record).await?;
        let hop = if head.version < Version::HTTP_2 { Hop::of(&head.headers) } else { Hop::default() };
        let info = RequestInfo::resolve(
            head.method.as_str(),
            head.uri.path(),
            head.uri.query(),
            hop.upgrade.is_some(),
        )
        .map_err(|error| Failure::new(StatusCode::BAD_REQUEST, error.to_string()))?;
        record.about(&info);
        let user = self.authorize(&head, caller, &info, record).await?;
        let long_running = hop.upgrade.is_some() || is_long_running(&info, head.uri.query());
        let place =
            front_end.limits.place(&user.name, long_running).await.inspect_err(|_| record.limited())?;

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
            record.bytes_in(),
        );
        let request = Request::from_parts(head, body);
        let (mut response, lease) = self.send(request, caller_upgrade.is_some(), long_running).await?;
        let place = match place {
            // The work is done once the response begins; how fast its caller reads is not the others' loss.
            Place::Seat(_) => None,
            Place::LongRunning(counted) => Some(counted),
        };

        let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        headers::response(response.headers_mut(), upgraded);
        *response.version_mut() = Version::HTTP_11;
        if !upgraded {
            let content = |incoming| Content::Relayed { incoming, lease };
            return Ok(response.map(|incoming| Answer { _place: place, ..Answer::from(content(incoming)) }));
        }
        let Some(Some(caller)) = caller_upgrade else {
            let message = "the API server changed to another protocol without being asked";
            return Err(Failure::bad_gateway(message));
        };
        let server = hyper::upgrade::on(&mut response);
        let (half_closed, busy) = (front_end.config.half_closed_timeout, self.activity.busy());
        front_end.connections.spawn(async move {
            let _held = (place, busy, lease);
            let (Ok(caller), Ok(server)) = (caller.await, server.await) else { return };
            let relayed = relay_sockets(TokioIo::new(caller), TokioIo::new(server), half_closed).await;
            if let Err(error) = relayed {
                tracing::debug!(%error, "an upgraded connection failed");
            }
        });
        Ok(response.map(|_| Answer::from(Content::Own(Full::default()))))
    }

    async fn authenticate(&self, head: &Parts, record: &mut Record) -> Result<Authenticated, Failure> {
        let front_end = &self.front_end;
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
                record.unauthenticated(&failure);
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
        record: &mut Record,
    ) -> Result<User, Failure> {
        let front_end = &self.front_end;
        let denied = |reason: String| Failure::new(StatusCode::FORBIDDEN, format!("forbidden: {reason}"));
        let impersonation = Impersonation::requested(&head.headers)
            .map_err(|error| Failure::new(StatusCode::BAD_REQUEST, error.to_string()))?;
        let user = match impersonation {
            None => caller.user,
            Some(impersonation) => match impersonation.allowed(&caller.user, &front_end.authz).await {
                Ok(user) => {
                    record.impersonates(&user);
                    user
                }
                Err(verdict) => {
                    record.decided(&verdict);
                    return Err(denied(verdict.reason));
                }
            },
        };
        if front_end.authorize_everything {
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
    ) -> Result<(Response<Incoming>, Lease), Failure> {
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

/// The body of a response.
pub struct Answer {
    content: Content,
    ended: Option<Ended>,
    _place: Option<super::limits::Counted<String>>,
}

enum Content {
    Own(Full<Bytes>),
    Relayed { incoming: Incoming, lease: Lease },
}

/// Dropped when a response has been passed on, or given up.
struct Ended {
    connection: Arc<Connection>,
    record: Record,
    #[expect(dead_code, reason = "held while the response is passed on")]
    busy: Busy,
}

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(line) = self.record.line() {
            self.connection.front_end.audit.write(line);
        }
    }
}

impl From<Content> for Answer {
    fn from(content: Content) -> Self {
        Self { content, ended: None, _place: None }
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
            Content::Relayed { incoming, lease } => {
                let frame = Pin::new(&mut *incoming).poll_frame(cx);
                if let Poll::Ready(Some(Ok(frame))) = &frame
                    && let (Some(data), Some(ended)) = (frame.data_ref(), &mut this.ended)
                {
                    ended.record.sent(data.len() as u64);
                }
                if matches!(frame, Poll::Ready(None)) || incoming.is_end_stream() {
                    lease.finish();
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
