//! The kube-apiservers behind the front end, and the choice of a server and a connection for each request.
//!
//! Unless HTTP/2 is configured, each request has a connection of its own until its response ends, so that a caller who
//! does not read a response does not block others. Connections are kept for later requests.

mod body;
mod config;
mod connection;
mod health;
mod pool;
mod sender;
mod server;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper::{Method, Request, Response};
use proto_net::{
    causes::causes,
    file_watcher::{FileWatcher, Watcher},
    tasks::Tasks,
};

use crate::metrics::Expiry;

pub use body::{BodyError, BodyLimits, ReceivedBytes, RequestBody};
pub use config::UpstreamConfig;
use connection::ServerConnection;
pub use connection::{Lease, ResponseBody};
pub use server::UpstreamStatus;
use server::{Protocol, Server, ServerTls};

/// How many times a request is sent again after a kept connection has failed. A server that resets each stream of a
/// shared connection would otherwise be asked without end.
const MAX_REPEATS: usize = 3;

/// All API servers.
pub struct Upstream {
    servers: Vec<Arc<Server>>,
    next: AtomicUsize,
    interval: Duration,
}

/// Why a request has no response.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error("no API server can be reached: {0}")]
    Unreachable(String),
    #[error("{0}")]
    Body(BodyError),
    #[error("the API server's connection broke off: {0}")]
    Broken(String),
}

impl Upstream {
    /// Reads the files. The returned watcher must be polled. The group `connections` owns the connections to the
    /// servers.
    pub fn load(config: &UpstreamConfig, connections: &Tasks) -> anyhow::Result<(Self, Arc<dyn Watcher>)> {
        let (tls, http2) = (config.tls.clone(), config.http2);
        let files: Vec<PathBuf> = config.tls.files();
        let tls =
            FileWatcher::load("the API server's CA and the front-proxy certificate", files, move || {
                ServerTls::read(&tls, http2)
            })?;
        let servers = config
            .servers
            .iter()
            .map(|uri| Server::new(uri, config, tls.clone(), connections.clone()).map(Arc::new))
            .collect::<anyhow::Result<_>>()?;
        Ok((Self { servers, next: AtomicUsize::new(0), interval: config.health_interval }, tls))
    }

    /// Sends a request that does not change the protocol.
    pub async fn send(&self, request: Request<RequestBody>) -> Result<Response<ResponseBody>, UpstreamError> {
        self.exchange(request, Protocol::Any).await
    }

    /// Sends a request that may change the protocol, on a connection of its own.
    pub async fn upgrade(
        &self,
        request: Request<RequestBody>,
    ) -> Result<Response<ResponseBody>, UpstreamError> {
        self.exchange(request, Protocol::Http1).await
    }

    async fn exchange(
        &self,
        mut request: Request<RequestBody>,
        protocol: Protocol,
    ) -> Result<Response<ResponseBody>, UpstreamError> {
        let mut last = String::new();
        let mut repeats = 0..MAX_REPEATS;
        for server in self.in_order() {
            loop {
                let connection = match ServerConnection::to(&server, protocol).await {
                    Ok(connection) => connection,
                    Err(error) => {
                        server.connect_failed(&error);
                        last = error.to_string();
                        break;
                    }
                };
                let kept = connection.kept;
                // The server may close a kept connection while the request is on its way.
                let again = kept.then(|| repeatable(&request)).flatten();
                match connection.send(request).await {
                    Ok(response) => return Ok(response),
                    Err((_, Some(unsent))) if kept => request = unsent,
                    Err((error, Some(unsent))) => {
                        server.count_failure(&error);
                        last = error.to_string();
                        request = unsent;
                        break;
                    }
                    Err((error, None)) => match (body::cause(&error), again) {
                        (Some(error), _) => return Err(UpstreamError::Body(error)),
                        (None, Some(again)) if repeats.next().is_some() => request = again,
                        (None, _) => return Err(UpstreamError::Broken(causes(&error))),
                    },
                }
            }
        }
        Err(UpstreamError::Unreachable(last))
    }

    /// Returns all servers in rotating order, the healthy ones first.
    fn in_order(&self) -> Vec<Arc<Server>> {
        let count = self.servers.len();
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let rotated = self.servers.iter().cycle().skip(first % count.max(1)).take(count);
        let (mut order, down): (Vec<_>, Vec<_>) = rotated.cloned().partition(|server| server.is_healthy());
        order.extend(down);
        order
    }

    /// Returns the number of healthy servers, and the number of all.
    pub fn healthy(&self) -> (usize, usize) {
        (self.servers.iter().filter(|server| server.is_healthy()).count(), self.servers.len())
    }

    pub fn status(&self) -> Vec<UpstreamStatus> {
        self.servers.iter().map(|server| server.status()).collect()
    }

    /// Returns when the certificates in use expire.
    pub fn expiries(&self) -> Vec<Expiry> {
        let Some(server) = self.servers.first() else { return Vec::new() };
        server.expiries()
    }

    /// Checks the health of all servers at the configured interval until the task is cancelled.
    pub async fn watch_health(self: Arc<Self>) {
        let mut interval = tokio::time::interval(self.interval);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            futures_util::future::join_all(self.servers.iter().map(health::check)).await;
        }
    }
}

/// Returns a copy of the request, if it is safe to send it twice.
fn repeatable(request: &Request<RequestBody>) -> Option<Request<RequestBody>> {
    let harmless = [Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method());
    if !harmless || !request.body().is_empty() {
        return None;
    }
    let mut again = Request::new(RequestBody::empty());
    again.method_mut().clone_from(request.method());
    again.uri_mut().clone_from(request.uri());
    again.headers_mut().clone_from(request.headers());
    Some(again)
}
