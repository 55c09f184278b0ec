//! Forwards one request to its target, and the response back.

use hyper::{
    Request, Response, StatusCode, Uri, Version,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    http::uri::PathAndQuery,
};
use hyper_util::rt::TokioIo;
use proto::{DialError, Target};
use proto_net::causes::causes;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    call::Call,
    endpoint::Endpoint,
    headers::{self, Forwarded},
    tls::Server,
    upload::{Answered, Stalled, Upload},
};
use crate::{
    http::{
        browser,
        exchange::{Body, Exchange, Upgrade},
        hop::Hop,
        status::StatusError,
    },
    stream::caller::Caller,
    traces,
};

const MAX_HEADERS: usize = 128;

impl Call {
    /// Forwards a request. `prefix` and `rest` are the two parts of its path.
    pub(super) async fn forward(
        &self,
        mut request: Request<Incoming>,
        endpoint: Endpoint,
        prefix: &str,
        rest: &str,
    ) -> Result<Response<Body>, StatusError> {
        let hop = Hop::of(request.headers());
        let caller_upgrade = hop.upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
        let host = endpoint.target.to_string();
        let asked_host = browser::asked_host(request.uri(), request.headers()).to_owned();
        let path = format!("{prefix}{rest}");
        let proto = self.entrance.proto();
        let forwarded = Forwarded { proto, peer: self.entrance.peer(), path: &path, host: &host };
        headers::request(request.headers_mut(), &hop, &forwarded, &self.listener.claims);
        *request.uri_mut() = target_uri(rest, request.uri().query())?;
        *request.version_mut() = Version::HTTP_11;

        let mut caller = self.caller.clone();
        if self.entrance.is_unix() {
            caller.span = traces::parent(request.headers());
        }
        let (mut sender, exchange) = self.connect(&endpoint, caller).await?;
        let answered = Answered::default();
        let (idle_timeout, claims) = (self.listener.idle_timeout, self.listener.claims.clone());
        let request = request.map(|body| Upload::new(body, idle_timeout, answered.clone(), claims));
        let mut response = sender.send_request(request).await.map_err(|error| {
            let failure = match Stalled::cause_of(&error) {
                Some(stalled) => StatusError::new(StatusCode::REQUEST_TIMEOUT, stalled.to_string()),
                None => StatusError::bad_gateway(format!("{} at {host}: {}", endpoint.who, causes(&error))),
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
                let message = format!("{} at {host} switched protocols without being asked", endpoint.who);
                let failure = StatusError::bad_gateway(message);
                self.log(&endpoint.target, &failure);
                return Err(failure);
            };
            let target = hyper::upgrade::on(&mut response);
            let half_closed_timeout = self.listener.outbound.limits.half_closed_timeout;
            let busy = self.activity.busy();
            self.upgrade_to(Upgrade { caller, target, exchange, busy, half_closed_timeout });
            return Ok(response.map(|_| Body::empty()));
        }
        Ok(response.map(|incoming| Body::relayed(incoming, exchange)))
    }

    /// Connects to the target, for one request.
    async fn connect(
        &self,
        endpoint: &Endpoint,
        caller: Caller,
    ) -> Result<(SendRequest<Upload>, Exchange), StatusError> {
        let Endpoint { target, who, tls } = endpoint;
        let outbound = &self.listener.outbound;
        let mut dial = DialGuard { call: self, target, ended: false };
        let dialled = outbound.dial(target, &caller).await;
        dial.ended = true;
        let dialled = dialled.map_err(|error| {
            outbound.dial_failed(target, &caller, &error);
            StatusError::from(&error)
        })?;
        if let Some(node) = &dialled.connection.node {
            let _ = self.node.set(node.clone());
        }
        let socket = outbound.socket(dialled);
        match tls {
            None => self.handshake(socket, endpoint).await,
            Some(expected) => {
                let server = Server { expected, who, target, caller: &self.caller };
                let tls = self.listener.tls.connect(&server, socket).await;
                let tls = tls.inspect_err(|failure| self.log(target, failure))?;
                self.handshake(tls, endpoint).await
            }
        }
    }

    async fn handshake<S>(
        &self,
        socket: S,
        endpoint: &Endpoint,
    ) -> Result<(SendRequest<Upload>, Exchange), StatusError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http1::Builder::new()
            .max_headers(MAX_HEADERS)
            .handshake(TokioIo::new(socket))
            .await
            .map_err(|error| StatusError::bad_gateway(format!("{}: {}", endpoint.who, causes(&error))))?;
        let (exchange, unwanted) = Exchange::new();
        self.listener.outbound.tasks.spawn(async move {
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

    fn log(&self, target: &Target, failure: &StatusError) {
        let Caller { listener: egress, origin, .. } = &self.caller;
        tracing::info!(egress, %origin, %target, error = %failure, "request failed");
    }
}

/// Reports a dial that was cancelled because its caller left.
struct DialGuard<'a> {
    call: &'a Call,
    target: &'a Target,
    ended: bool,
}

impl Drop for DialGuard<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let outbound = &self.call.listener.outbound;
            outbound.dial_failed(self.target, &self.call.caller, &DialError::Cancelled);
        }
    }
}

/// The URI of the request to the target: the rest of the path and the query, byte for byte.
fn target_uri(rest: &str, query: Option<&str>) -> Result<Uri, StatusError> {
    let path = if rest.is_empty() { "/" } else { rest };
    let text = match query {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    PathAndQuery::try_from(text)
        .map(Uri::from)
        .map_err(|e| StatusError::new(StatusCode::BAD_REQUEST, e.to_string()))
}
