//! Proxy URLs as kube-apiserver has them: `/api/v1/nodes/NAME/proxy/…`, and the same of pods and services.
//!
//! HTTP/1.1 on a Unix socket or loopback, for people, scripts and web browsers on this machine. Every method,
//! query, body, trailer and upgrade goes through; bodies are passed on as they come. There is no authentication
//! but that of the socket file, so a web page from elsewhere must not reach the loopback listener through the
//! browser of somebody who works here: requests for a host that is not this one (DNS rebinding) and those that a
//! page of another origin makes are refused.

mod call;
mod endpoint;
mod forward;
mod headers;
mod path;
pub mod tls;
mod upload;

use std::{
    convert::Infallible,
    net::IpAddr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::NodeName;
use proto_net::relay::Counters;

use super::{
    door::{Common, EgressListener},
    socket::Socket,
};
use crate::{
    http::{
        browser,
        exchange::{Body, Upgrade},
        hop,
        status::Failure,
        watched::{Activity, Watched},
    },
    stream::caller::Caller,
};
use call::{Call, Entrance};

pub use call::ProxyUrls;
pub use tls::TargetTls;

/// Of a request's head. hyper takes no less.
const MAX_HEAD: usize = 64 * 1024;
const MAX_HEADERS: usize = 128;

impl ProxyUrls {
    /// Answers one request of a caller whose right to make it has been checked, and says through whose tunnel. An
    /// upgrade is to be carried once the response is on its way.
    pub async fn answer_authorized(
        self: &Arc<Self>,
        caller: Caller,
        peer: IpAddr,
        activity: &Activity,
        request: Request<Incoming>,
    ) -> (Result<(Response<Body>, Option<Upgrade>), Failure>, Option<NodeName>) {
        let call = Call {
            door: self.clone(),
            caller,
            entrance: Entrance::FrontEnd(peer),
            activity: activity.clone(),
            node: OnceLock::new(),
            upgrade: Mutex::default(),
        };
        let response = call.proxy(request).await;
        let upgrade = call.upgrade.into_inner().unwrap_or_else(PoisonError::into_inner);
        (response.map(|response| (response, upgrade)), call.node.into_inner())
    }
}

impl EgressListener for ProxyUrls {
    fn common(&self) -> &Common {
        &self.common
    }

    async fn serve<S: Socket>(self: Arc<Self>, socket: S, caller: Caller) {
        let activity = Activity::default();
        let call = Arc::new(Call {
            entrance: socket.peer().map_or(Entrance::Unix, Entrance::Loopback),
            activity: activity.clone(),
            node: OnceLock::new(),
            upgrade: Mutex::default(),
            door: self,
            caller,
        });
        // Boxed, so that an upgraded stream does not keep the room that the request needed.
        Box::pin(call.clone().requests(socket, activity)).await;
        let upgrade = call.upgrade.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(upgrade) = upgrade {
            upgrade.carry(&Counters::default(), std::future::pending()).await;
        }
    }
}

impl Call {
    /// Serves requests until the connection ends or is upgraded.
    async fn requests<S: Socket>(self: Arc<Self>, socket: S, activity: Activity) {
        let socket = Watched::new(socket, activity, self.door.common.head_timeout);
        let service = service_fn(|request| self.clone().answer(request));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.door.idle_timeout)
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(socket), service)
            .with_upgrades();
        tokio::pin!(connection);
        let served = tokio::select! {
            served = connection.as_mut() => served,
            () = self.door.draining.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        match served {
            Err(error) if error.is_parse() || error.is_timeout() => self.refused(&error),
            Err(error) => tracing::debug!(caller = %self.caller.origin, %error, "connection failed"),
            Ok(()) => {}
        }
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let busy = self.activity.busy();
        let response = match self.proxy(request).await {
            Ok(response) => response,
            Err(failure) => failure.response().map(Body::from),
        };
        Ok(response.map(|body| body.while_busy(busy)))
    }

    async fn proxy(&self, request: Request<Incoming>) -> Result<Response<Body>, Failure> {
        let (endpoint, prefix, rest) = match self.admit(&request) {
            Ok(admitted) => admitted,
            Err(failure) => {
                self.refused(&failure);
                return Err(failure);
            }
        };
        if rest.is_empty() && (request.method() == Method::GET || request.method() == Method::HEAD) {
            return redirect(&request);
        }
        self.forward(request, endpoint, &prefix, &rest).await
    }

    /// Whether and where a request goes, with its path in two parts: up to `/proxy`, and behind.
    fn admit(&self, request: &Request<Incoming>) -> Result<(endpoint::Endpoint, String, String), Failure> {
        let (uri, headers) = (request.uri(), request.headers());
        let known = match self.entrance {
            Entrance::Unix => Ok(()),
            Entrance::Loopback(_) => browser::refuse_other_hosts(uri, headers)
                .and_then(|()| browser::refuse_other_origins("http", uri, headers)),
            Entrance::FrontEnd(_) => browser::refuse_other_origins("https", uri, headers),
        };
        known.map_err(|message| Failure::new(StatusCode::FORBIDDEN, message))?;
        hop::refuse_other_encodings(headers)
            .map_err(|message| Failure::new(StatusCode::NOT_IMPLEMENTED, message))?;
        let path = path::parse(request.uri().path())?;
        let endpoint = endpoint::resolve(&path, self.door.directory.as_ref())?;
        Ok((endpoint, path.prefix.to_owned(), path.rest.to_owned()))
    }
}

/// Relative links of a page at `…/proxy` would lead above it.
fn redirect(request: &Request<Incoming>) -> Result<Response<Body>, Failure> {
    let uri = request.uri();
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let location = HeaderValue::try_from(format!("{}/{query}", uri.path()))
        .map_err(|e| Failure::new(StatusCode::BAD_REQUEST, e.to_string()))?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
    response.headers_mut().insert(header::LOCATION, location);
    Ok(response)
}
