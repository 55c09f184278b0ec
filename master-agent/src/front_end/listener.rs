//! The listener of the HTTPS port, and the HTTP servers on callers' connections.

use std::{fmt, sync::Arc, time::Duration};

use access::{authn::Certificates, peer::Peer};
use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto_net::{
    accept::{Acceptor, Tuning},
    listeners::Pausable,
    read_ahead::ReadAhead,
    tls,
    write_timeout::WriteTimeout,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};

use super::{
    admission::Admission, connection::Connection, counters::Handshake, link_socket::TlsSocket,
    server::FrontEnd, streams::Streams, workers::Assigned,
};
use crate::http::watched::Watched;

/// The maximum size of a request's head, in bytes.
const MAX_HEAD: u32 = 64 * 1024;
const MAX_HEADERS: usize = 128;
/// The number of HTTP/2 streams that a caller may reset before they are served (CVE-2023-44487).
const MAX_RESETS: usize = 20;
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// How long requests in progress may take once their connection has to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
const EVICTED: &str = "evicted by a newer connection before anybody authenticated";

impl FrontEnd {
    /// Accepts callers until the task is cancelled.
    pub async fn accept(self: Arc<Self>, listener: Pausable<TcpListener>) {
        let mut acceptor = Acceptor::new(listener, Tuning::Caller);
        loop {
            let (socket, address) = acceptor.next().await;
            let peer = Peer::Address(address);
            // A caller that is not admitted gets no answer, because an answer would cost a handshake.
            let Ok(mut admission) = self.admit(&peer) else { continue };
            let Assigned { socket, runtime, load } = match self.workers.assign(socket) {
                Ok(assigned) => assigned,
                Err(error) => {
                    self.refused(&peer, &error);
                    continue;
                }
            };
            admission.load = Some(load);
            self.connections.spawn_on(self.clone().serve_caller(socket, peer, admission), &runtime);
        }
    }

    /// Serves one connection until it ends. It comes from the HTTPS port or through a tunnel.
    pub async fn serve_caller<S>(self: Arc<Self>, socket: S, peer: Peer, admission: Admission)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let handshake =
            tls::accept(ReadAhead::new(socket), self.tls.get().config.clone(), || admission.begun());
        let handshake = Box::pin(tokio::time::timeout(self.config.head_timeout, handshake));
        let tls = tokio::select! {
            handshake = handshake => match handshake {
                Ok(Ok(tls)) => tls,
                Ok(Err(error)) => return self.handshake_failed(Handshake::Failed, &peer, &error),
                Err(_) => return self.handshake_failed(Handshake::TimedOut, &peer, &"no TLS handshake in time"),
            },
            () = admission.evicted.cancelled() => {
                return self.handshake_failed(Handshake::Evicted, &peer, &EVICTED);
            }
        };
        let session = &tls.get_ref().1;
        self.metrics.handshake(Handshake::Ok(session.protocol_version()));
        let http2 = session.alpn_protocol() == Some(b"h2");
        let certificates = session.peer_certificates().unwrap_or_default();
        let certificates = certificates.iter().map(|certificate| certificate.clone().into_owned());
        let certificates = Certificates::new(certificates.collect());
        let connection = Arc::new(Connection::over_tls(self, peer, certificates, admission));
        let socket: TlsSocket<S> = WriteTimeout::new(tls, connection.front_end.config.idle_timeout);
        if http2 {
            let served = Box::pin(connection.clone().http2(socket));
            connection.unless_evicted(served).await;
        } else {
            connection.serve_http1(socket).await;
        }
    }

    fn handshake_failed(&self, why: Handshake, peer: &Peer, error: &dyn fmt::Display) {
        self.metrics.handshake(why);
        self.refused(peer, error);
    }
}

impl Connection {
    /// Serves HTTP/1.1 until the connection ends.
    pub(super) async fn serve_http1<S>(self: Arc<Self>, socket: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let served = Box::pin(self.clone().http1(socket));
        self.unless_evicted(served).await;
    }

    async fn unless_evicted(&self, served: impl Future<Output = hyper::Result<()>>) {
        tokio::select! {
            served = served => {
                if let Err(error) = served {
                    self.front_end.refused(&self.peer, &error);
                }
            }
            () = self.admission.evicted.cancelled() => self.front_end.refused(&self.peer, &EVICTED),
        }
    }

    async fn http1<S>(self: Arc<Self>, socket: S) -> hyper::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (config, closing) = (&self.front_end.config, self.generation.closing.clone());
        let socket = Watched::new(socket, self.activity.clone(), config.head_timeout);
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(config.idle_timeout)
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_HEAD as usize)
            .serve_connection(TokioIo::new(socket), service_fn(|request| self.clone().answer(request)))
            .with_upgrades();
        tokio::pin!(connection);
        tokio::select! {
            served = connection.as_mut() => served,
            () = closing.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    }

    async fn http2<S>(self: Arc<Self>, socket: S) -> hyper::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (config, draining) = (&self.front_end.config, self.generation.draining.clone());
        let (spawner, mut streams) = Streams::new(config.idle_timeout, self.ending.clone());
        // The box is freed when the response begins. A watch would otherwise keep the memory of all phases.
        let service = service_fn(|request| Box::pin(self.clone().answer(request)));
        let connection = http2::Builder::new(spawner)
            .timer(TokioTimer::new())
            .max_concurrent_streams(config.max_streams)
            .max_header_list_size(MAX_HEAD)
            .max_pending_accept_reset_streams(MAX_RESETS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(20))
            .serve_connection(TokioIo::new(socket), service);
        tokio::pin!(connection);
        tokio::select! {
            served = streams.serve(connection.as_mut()) => return served,
            () = draining.cancelled() => {
                connection.as_mut().graceful_shutdown();
                return streams.serve(connection).await;
            }
            () = self.ending.cancelled() => {}
            () = self.activity.unused(config.head_timeout, config.idle_timeout) => {}
        }
        connection.as_mut().graceful_shutdown();
        tokio::time::timeout(DRAIN_TIMEOUT, streams.serve(connection)).await.unwrap_or(Ok(()))
    }
}
