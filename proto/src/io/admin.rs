//! Small HTTP/1.1 endpoints for people and monitoring: `/livez`, `/readyz`, `/metrics`, and what an agent
//! adds. Loopback or a Unix socket only; there is no authentication for these, so none of them keeps a connection, and on
//! loopback metrics are not for web pages whose name was made to lead here.

use std::{convert::Infallible, net::IpAddr, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};

use tokio_util::sync::CancellationToken;

use super::{exposition::Exposition, patient::PatientWriter, socket, tasks::Tasks};

/// Connections served at once.
const CONNECTIONS: usize = 64;

/// How long a caller may take nothing of its answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long an answer may take that ends its connection.
const LAST: Duration = Duration::from_secs(60);

const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "/metrics";
/// What anybody is answered.
const SHORT: [&str; 3] = ["/livez", "/readyz", METRICS];

/// A short answer: status, content type, body.
pub type Answer = (StatusCode, &'static str, String);

/// Of any answer; it may go on for as long as the agent runs.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

pub type AnswerFuture = Pin<Box<dyn Future<Output = Option<Response<Body>>> + Send>>;

/// Where a request came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    Tcp,
    /// Only for whom the socket's file lets in.
    Unix,
}

/// What an agent serves beside metrics.
pub trait Admin: Send + Sync + 'static {
    /// `Err` says why the agent is not ready, `Ok` what is amiss all the same.
    fn ready(&self) -> Result<Vec<String>, String>;

    /// Answers what is not for health and metrics; `None` is 404.
    fn answer(self: Arc<Self>, request: Request<Incoming>, door: Door) -> AnswerFuture;
}

/// The endpoints, and what they show.
#[derive(Clone)]
pub struct Endpoints {
    pub metrics: Exposition,
    pub admin: Arc<dyn Admin>,
}

impl Endpoints {
    /// Serves TCP connections until the group is cancelled.
    pub async fn serve_tcp(self, listener: TcpListener, tasks: Tasks) {
        let permits = Arc::new(Semaphore::new(CONNECTIONS));
        let local = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((socket, _)) => {
                    socket::tune(&socket);
                    let connection = self.clone().connection(socket, Door::Tcp, local);
                    tasks.spawn(async move {
                        connection.await;
                        drop(permit);
                    });
                }
                Err(e) => accept_error(&e).await,
            }
        }
    }

    /// Serves connections of a Unix socket until the group is cancelled.
    pub async fn serve_unix(self, listener: UnixListener, tasks: Tasks) {
        let permits = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((socket, _)) => {
                    let connection = self.clone().connection(socket, Door::Unix, false);
                    tasks.spawn(async move {
                        connection.await;
                        drop(permit);
                    });
                }
                Err(e) => accept_error(&e).await,
            }
        }
    }

    /// `local` is a TCP listener on loopback.
    async fn connection<S: AsyncRead + AsyncWrite + Unpin>(self, socket: S, door: Door, local: bool) {
        let last = CancellationToken::new();
        let service = service_fn(|request: Request<Incoming>| {
            let (endpoints, last) = (self.clone(), last.clone());
            async move {
                let short = SHORT.contains(&request.uri().path());
                if request.uri().path() == METRICS && local && !is_for_this_host(&request) {
                    let text = "only localhost and loopback addresses are served here\n".to_owned();
                    return Ok(respond((StatusCode::FORBIDDEN, TEXT, text)));
                }
                let mut response = endpoints.respond(request, door).await;
                if short && door == Door::Tcp {
                    last.cancel();
                    response
                        .headers_mut()
                        .insert(header::CONNECTION, header::HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response)
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(Duration::from_secs(10))
            .max_headers(64)
            .serve_connection(TokioIo::new(PatientWriter::new(socket, PATIENCE)), service);
        let too_long = async {
            last.cancelled().await;
            tokio::time::sleep(LAST).await;
        };
        let served = tokio::select! {
            served = connection => served,
            () = too_long => return,
        };
        if let Err(error) = served {
            tracing::debug!(%error, "admin connection failed");
        }
    }

    async fn respond(&self, request: Request<Incoming>, door: Door) -> Response<Body> {
        let get = request.method() == hyper::Method::GET;
        let answer = match (request.uri().path(), get) {
            ("/livez", true) => (StatusCode::OK, TEXT, "ok\n".to_owned()),
            ("/readyz", true) => match self.admin.ready() {
                Ok(amiss) => {
                    let lines = std::iter::once("ok".to_owned()).chain(amiss);
                    (StatusCode::OK, TEXT, lines.map(|line| line + "\n").collect())
                }
                Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("not ready: {reason}\n")),
            },
            (METRICS, true) => self.metrics(&request).await,
            _ => match self.admin.clone().answer(request, door).await {
                Some(response) => return response,
                None if get => (StatusCode::NOT_FOUND, TEXT, "no such path\n".to_owned()),
                None => (StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET is served here\n".to_owned()),
            },
        };
        respond(answer)
    }

    async fn metrics(&self, request: &Request<Incoming>) -> Answer {
        let accept = request.headers().get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
        match self.metrics.scrape(accept.unwrap_or_default()).await {
            Ok((content_type, text)) => (StatusCode::OK, content_type, text),
            Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("metrics: {e}\n")),
        }
    }
}

/// Whether the `Host` of a request, if it has one, is `localhost` or a loopback address, with whatever port.
fn is_for_this_host<B>(request: &Request<B>) -> bool {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let Some(host) = hosts.next() else { return request.uri().authority().is_none() };
    let authority = host.to_str().ok().and_then(|host| host.parse::<hyper::http::uri::Authority>().ok());
    let authority = authority.filter(|authority| !authority.as_str().contains('@'));
    let asked = request.uri().authority().is_none_or(|asked| Some(asked) == authority.as_ref());
    let local = authority.is_some_and(|authority| {
        let name = authority.host().trim_start_matches('[').trim_end_matches(']');
        let address = name.parse::<IpAddr>().map(|address| address.to_canonical().is_loopback());
        address.unwrap_or_else(|_| name.eq_ignore_ascii_case("localhost"))
    });
    local && asked && hosts.next().is_none()
}

/// Makes a response of a short answer.
pub fn respond((status, content_type, body): Answer) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(body)).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

/// Out of descriptors, or the peer was quicker to leave: neither is a reason to stop accepting, nor to spin.
pub async fn accept_error(error: &std::io::Error) {
    tracing::warn!(%error, "accept failed");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn web_pages_elsewhere_do_not_come_in() {
        for (uri, hosts, local) in [
            ("/metrics", &["127.0.0.1:9070"][..], true),
            ("/metrics", &["localhost"], true),
            ("/metrics", &["LOCALHOST:1"], true),
            ("/metrics", &["[::1]:9070"], true),
            ("/metrics", &[], true),
            ("/metrics", &["rebound.example:9070"], false),
            ("/metrics", &["localhost.rebound.example"], false),
            ("/metrics", &["127.0.0.1.rebound.example"], false),
            ("/metrics", &["10.0.0.1:9070"], false),
            ("/metrics", &["127.0.0.1", "rebound.example"], false),
            ("/metrics", &["a@b@localhost"], false),
            ("/metrics", &[""], false),
            ("http://rebound.example/metrics", &["127.0.0.1"], false),
            ("http://rebound.example/metrics", &[], false),
        ] {
            let request = hosts.iter().fold(Request::get(uri), |request, host| request.header("host", *host));
            assert_eq!(is_for_this_host(&request.body(()).unwrap()), local, "{uri} {hosts:?}");
        }
    }
}
