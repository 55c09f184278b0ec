//! Small HTTP/1.1 endpoints for people and monitoring: `/livez`, `/readyz`, `/metrics`, and what an agent
//! adds. Loopback or a Unix socket only; there is no authentication for these.

use std::{convert::Infallible, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};

use super::{exposition::Exposition, patient::PatientWriter, socket, tasks::Tasks};

/// Connections served at once.
const CONNECTIONS: usize = 64;

/// How long a caller may take nothing of its answer.
const PATIENCE: Duration = Duration::from_secs(30);

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
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((socket, _)) => {
                    socket::tune(&socket);
                    let connection = self.clone().connection(socket, Door::Tcp);
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
                    let connection = self.clone().connection(socket, Door::Unix);
                    tasks.spawn(async move {
                        connection.await;
                        drop(permit);
                    });
                }
                Err(e) => accept_error(&e).await,
            }
        }
    }

    async fn connection<S: AsyncRead + AsyncWrite + Unpin>(self, socket: S, door: Door) {
        let service = service_fn(|request: Request<Incoming>| {
            let endpoints = self.clone();
            async move { Ok::<_, Infallible>(endpoints.respond(request, door).await) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(Duration::from_secs(10))
            .max_headers(64)
            .serve_connection(TokioIo::new(PatientWriter::new(socket, PATIENCE)), service)
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "admin connection failed");
        }
    }

    async fn respond(&self, request: Request<Incoming>, door: Door) -> Response<Body> {
        let text = "text/plain; charset=utf-8";
        let get = request.method() == hyper::Method::GET;
        let answer = match (request.uri().path(), get) {
            ("/livez", true) => (StatusCode::OK, text, "ok\n".to_owned()),
            ("/readyz", true) => match self.admin.ready() {
                Ok(amiss) => {
                    let lines = std::iter::once("ok".to_owned()).chain(amiss);
                    (StatusCode::OK, text, lines.map(|line| line + "\n").collect())
                }
                Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, text, format!("not ready: {reason}\n")),
            },
            ("/metrics", true) => self.metrics(&request).await,
            _ => match self.admin.clone().answer(request, door).await {
                Some(response) => return response,
                None if get => (StatusCode::NOT_FOUND, text, "no such path\n".to_owned()),
                None => (StatusCode::METHOD_NOT_ALLOWED, text, "only GET is served here\n".to_owned()),
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
