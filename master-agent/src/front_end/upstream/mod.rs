//! The kube-apiservers behind the front end, and the choice of a server and a connection for each request.
//!
//! A thread sends its short requests and watches over shared HTTP/2 connections (`shared.rs`), if that is configured
//! and the server supports it. The window of a connection is the sum of the windows of its streams, so that a caller
//! who does not read a response does not block others. Every other request has a connection of its own until its
//! response ends. Connections are kept for later requests.

mod body;
mod config;
mod connection;
mod established;
mod health;
mod pool;
mod repeat;
mod sender;
mod server;
mod shared;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper::{Request, Response};
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
use repeat::Repeat;
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

    /// Sends a request whose response the server only passes on. It shares its connection with no other request, since
    /// others decide into how many small pieces the response falls. On a shared connection each piece that waits takes
    /// memory of its own, and too many of them end the connection.
    pub async fn send_alone(
        &self,
        request: Request<RequestBody>,
    ) -> Result<Response<ResponseBody>, UpstreamError> {
        self.exchange(request, Protocol::Http1).await
    }

    /// Sends a request that may change the protocol, on a new connection.
    pub async fn upgrade(
        &self,
        request: Request<RequestBody>,
    ) -> Result<Response<ResponseBody>, UpstreamError> {
        self.exchange(request, Protocol::Upgrade).await
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
                let connection = match ServerConnection::to(server, protocol).await {
                    Ok(connection) => connection,
                    Err(error) => {
                        server.connect_failed(&error);
                        last = error.to_string();
                        break;
                    }
                };
                let kept = connection.kept;
                // The server may close a kept connection while the request is on its way.
                let repeat = kept.then(|| Repeat::of(&request)).flatten();
                let fault = request.body().fault();
                match connection.send(request).await {
                    Ok(response) => return Ok(response),
                    Err((_, Some(unsent))) if kept => request = unsent,
                    Err((error, Some(unsent))) => {
                        server.count_failure(&error);
                        last = error.to_string();
                        request = unsent;
                        break;
                    }
                    Err((error, None)) => {
                        let fault = fault.and_then(|fault| fault.get().cloned());
                        match (fault, repeat.and_then(Repeat::into_request)) {
                            (Some(error), _) => return Err(UpstreamError::Body(error)),
                            (None, Some(again)) if repeats.next().is_some() => request = again,
                            (None, _) => return Err(UpstreamError::Broken(causes(&error))),
                        }
                    }
                }
            }
        }
        Err(UpstreamError::Unreachable(last))
    }

    /// Returns all servers in rotating order, the healthy ones first.
    fn in_order(&self) -> impl Iterator<Item = &Arc<Server>> {
        let count = self.servers.len();
        let start = self.next.fetch_add(1, Ordering::Relaxed) % count.max(1);
        let rotated = move || self.servers.iter().cycle().skip(start).take(count);
        let first = rotated().find(|server| server.is_healthy()).or_else(|| rotated().next());
        // The first server nearly always answers, and only then is there nothing to allocate.
        let others = move || {
            let others =
                rotated().filter(move |server| first.is_some_and(|first| !Arc::ptr_eq(first, server)));
            let (mut order, down): (Vec<_>, Vec<_>) = others.partition(|server| server.is_healthy());
            order.extend(down);
            order
        };
        first.into_iter().chain(std::iter::once_with(others).flatten())
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
