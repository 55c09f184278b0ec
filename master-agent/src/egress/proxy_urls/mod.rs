//! The proxy URLs of kube-apiserver: `/api/v1/nodes/NAME/proxy/…`, and the same for pods and services.
//!
//! HTTP/1.1 is served on a Unix socket or loopback, for people, scripts and web browsers on this host. Every method, query,
//! body, trailer and upgrade passes, and bodies are streamed. There is no authentication beyond the mode of the socket file,
//! so a web page from elsewhere must not reach the loopback listener through a browser on this host: requests for another
//! host (DNS rebinding) and requests from pages of another origin are rejected.

pub mod call;
mod endpoint;
mod forward;
mod headers;
pub mod path;
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

use super::{listener::EgressListener, outbound::Outbound, socket::CallerSocket};
use crate::{
    http::{
        browser,
        exchange::{Body, Upgrade},
        hop,
        status::StatusError,
        watched::{Activity, Watched},
    },
    stream::caller::Caller,
};
use call::{Call, Entrance, ProxyUrls};

/// Bytes of a request's head. hyper accepts no lower limit.
const MAX_HEAD: usize = 64 * 1024;
const MAX_HEADERS: usize = 128;

impl ProxyUrls {
    /// Answers one request of a caller that has been authorized. Also returns the node whose tunnel was used. The caller of
    /// this function carries an upgrade once the response is on its way.
    pub async fn answer_authorized(
        self: &Arc<Self>,
        caller: Caller,
        peer: IpAddr,
        activity: &Activity,
        request: Request<Incoming>,
    ) -> (Result<(Response<Body>, Option<Upgrade>), StatusError>, Option<NodeName>) {
        let call = Call {
            generation: self.generations.present(),
            listener: self.clone(),
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
    fn outbound(&self) -> &Outbound {
        &self.outbound
    }

    async fn serve<S: CallerSocket>(self: Arc<Self>, socket: S, caller: Caller) {
        let activity = Activity::default();
        let call = Arc::new(Call {
            generation: self.generations.present(),
            entrance: socket.peer().map_or(Entrance::Unix, Entrance::Loopback),
            activity: activity.clone(),
            node: OnceLock::new(),
            upgrade: Mutex::default(),
            listener: self,
            caller,
        });
        // Boxed, so that an upgraded stream does not keep the memory of the request.
        Box::pin(call.clone().requests(socket, activity)).await;
        let upgrade = call.upgrade.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(upgrade) = upgrade {
            upgrade.carry(&Counters::default(), std::future::pending()).await;
        }
    }
}

impl Call {
    /// Serves requests until the connection ends or is upgraded.
    async fn requests<S: CallerSocket>(self: Arc<Self>, socket: S, activity: Activity) {
        let socket = Watched::new(socket, activity, self.listener.outbound.limits.head_timeout);
        let service = service_fn(|request| self.clone().answer(request));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.listener.idle_timeout)
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(socket), service)
            .with_upgrades();
        tokio::pin!(connection);
        let served = tokio::select! {
            served = connection.as_mut() => served,
            () = self.generation.closing.cancelled() => {
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
        let mut response = match self.proxy(request).await {
            Ok(response) => response,
            Err(failure) => failure.response().map(Body::from),
        };
        if self.generation.draining.is_cancelled() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response.map(|body| body.while_busy(busy)))
    }

    async fn proxy(&self, request: Request<Incoming>) -> Result<Response<Body>, StatusError> {
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

    /// Decides whether and where a request goes. Returns its path in two parts: up to `/proxy`, and the rest.
    fn admit(
        &self,
        request: &Request<Incoming>,
    ) -> Result<(endpoint::Endpoint, String, String), StatusError> {
        let (uri, headers) = (request.uri(), request.headers());
        let known = match self.entrance {
            Entrance::Unix => Ok(()),
            Entrance::Loopback(_) => browser::refuse_other_hosts(uri, headers)
                .and_then(|()| browser::refuse_other_origins("http", uri, headers)),
            Entrance::FrontEnd(_) => browser::refuse_other_origins("https", uri, headers),
        };
        known.map_err(|message| StatusError::new(StatusCode::FORBIDDEN, message))?;
        hop::refuse_other_encodings(headers)
            .map_err(|message| StatusError::new(StatusCode::NOT_IMPLEMENTED, message))?;
        let path = path::parse(request.uri().path())?;
        let endpoint = endpoint::resolve(&path, self.listener.directory.as_ref())?;
        Ok((endpoint, path.prefix.to_owned(), path.rest.to_owned()))
    }
}

/// Redirects `…/proxy` to `…/proxy/`, since relative links of a page at the former would lead above it.
fn redirect(request: &Request<Incoming>) -> Result<Response<Body>, StatusError> {
    let uri = request.uri();
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let location = HeaderValue::try_from(format!("{}/{query}", uri.path()))
        .map_err(|e| StatusError::new(StatusCode::BAD_REQUEST, e.to_string()))?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
    response.headers_mut().insert(header::LOCATION, location);
    Ok(response)
}
