//! Accepts callers of the local endpoint and connects each with a front end.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use proto_net::{
    accept::{Acceptor, Listener, Peer, Tuning},
    log_throttle::LogThrottle,
    relay::{Counters, relay},
    tasks::Tasks,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::OwnedSemaphorePermit,
};

use super::front_ends::FrontEnds;
use crate::metrics::{self, Metrics};

/// Serves the callers of both listeners.
pub struct LocalEndpoint {
    pub front_ends: Arc<FrontEnds>,
    pub metrics: Arc<Metrics>,
    /// How long a master may take to answer for a stream.
    pub open_timeout: Duration,
    /// After one direction of a stream has ended, how long the other may be silent.
    pub half_closed_timeout: Duration,
    /// The callers' tasks.
    pub tasks: Tasks,
    /// Callers that were closed because there are too many. Every pod may be able to cause them.
    pub turned_away: LogThrottle,
}

impl LocalEndpoint {
    /// Accepts TCP callers until the callers' tasks are cancelled.
    pub async fn accept_tcp(self: Arc<Self>, listener: TcpListener) {
        self.accept(listener, TcpStream::into_split).await;
    }

    /// Accepts callers of the Unix socket until the callers' tasks are cancelled. The socket file's mode and owner decide
    /// who may connect.
    pub async fn accept_unix(self: Arc<Self>, listener: UnixListener) {
        self.accept(listener, UnixStream::into_split).await;
    }

    /// `split` gives the halves of a socket, which share no lock.
    async fn accept<L, R, W>(self: Arc<Self>, listener: L, split: fn(L::Socket) -> (R, W))
    where
        L: Listener,
        R: AsyncRead + Unpin + Send + 'static,
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let serve = |socket: L::Socket, peer: L::Peer, permit: OwnedSemaphorePermit| {
            let (read, write) = split(socket);
            self.clone().serve(read, write, peer.origin(), permit)
        };
        let acceptor = Acceptor::new(listener, Tuning::Caller);
        acceptor.serve(self.tasks.clone(), |peer| self.admit(peer), serve).await;
    }

    /// The permit of a caller, unless there are too many.
    fn admit(&self, peer: impl Peer) -> Option<OwnedSemaphorePermit> {
        let permit = self.front_ends.caller_permit();
        if permit.is_none() {
            self.count("too_many_streams");
            if let Some(callers) = self.turned_away.count(1) {
                let last = peer.origin();
                tracing::warn!(
                    callers,
                    last,
                    "closed callers of the front end: front_end.max_connections reached"
                );
            }
        }
        permit
    }

    async fn serve<R, W>(self: Arc<Self>, read: R, write: W, caller: String, permit: OwnedSemaphorePermit)
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let stream = match self.front_ends.open(&caller, self.open_timeout).await {
            Ok(stream) => stream,
            Err(error) => {
                self.count(error.kind());
                tracing::warn!(caller, %error, "closed a caller of the front end");
                return;
            }
        };
        self.count("ok");
        let mut record = Record::new(self.metrics.clone(), caller);
        let (up, down) = (&record.counters.up, &record.counters.down);
        record.outcome = relay(read, write, stream, up, down, self.half_closed_timeout).await.kind();
        drop(permit);
    }

    fn count(&self, result: &'static str) {
        self.metrics.front_end_callers.get_or_create(&metrics::ResultLabel { result }).inc();
    }
}

/// Counts and logs a caller's stream when it ends, in whatever way. `up` is what the caller sent.
struct Record {
    metrics: Arc<Metrics>,
    caller: String,
    began: Instant,
    counters: Counters,
    outcome: &'static str,
}

impl Record {
    fn new(metrics: Arc<Metrics>, caller: String) -> Self {
        metrics.front_end_streams.inc();
        Self { metrics, caller, began: Instant::now(), counters: Counters::default(), outcome: "tunnel_lost" }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.metrics.front_end_streams.dec();
        let (up, down) = (*self.counters.up.get_mut(), *self.counters.down.get_mut());
        for (direction, bytes) in [("up", up), ("down", down)] {
            self.metrics.front_end_bytes.get_or_create(&metrics::DirectionLabel { direction }).inc_by(bytes);
        }
        tracing::info!(
            caller = self.caller,
            up,
            down,
            seconds = self.began.elapsed().as_secs_f64(),
            outcome = self.outcome,
            "front end stream ended"
        );
    }
}
