//! The streams that masters and people open: each is dialled through the policy, relayed, and leaves one record.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use proto::{DialError, Target};
use proto_net::{
    channel::{Channels, WriteHalf},
    mux::{Incoming, Mux},
    relay::{Counters, relay},
    socket,
    stream::Stream,
    tasks::Tasks,
};
use russh::{ChannelOpenFailure, server::ChannelOpenHandle};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{state::SessionState, user::AuthenticatedUser};
use crate::{
    dialer::{Dialer, Dialled},
    identity::user::UserRole,
    metrics::{self, Metrics},
};

/// Why a session accepts no new streams after the end of its certificate.
pub(super) const EXPIRED: &str = "the certificate of this session has expired";

/// Dials and relays the streams of all sessions.
pub struct StreamServer {
    pub dialer: Arc<Dialer>,
    pub metrics: Arc<Metrics>,
    /// For resolving and connecting to a target.
    pub dial_timeout: Duration,
    /// After one direction of a stream has ended, how long the other may be silent.
    pub half_closed_timeout: Duration,
    /// Cancelled when no new streams are accepted.
    pub draining: CancellationToken,
}

/// A direct-tcpip channel that a peer asks for.
pub(super) struct RequestedChannel {
    pub(super) half: WriteHalf,
    pub(super) reply: ChannelOpenHandle,
    pub(super) target: Target,
}

impl StreamServer {
    /// Serves the streams that a master opens on its multiplexer, each in a task of its own, until its certificate has
    /// expired or the agent drains. The master is told then.
    pub(super) async fn serve_mux(
        self: Arc<Self>,
        user: Arc<AuthenticatedUser>,
        state: Arc<SessionState>,
        mux: Mux,
        mut incoming: mpsc::Receiver<Incoming>,
        tasks: Tasks,
    ) {
        let reason = loop {
            tokio::select! {
                requested = incoming.recv() => match requested {
                    Some(_) if user.has_expired() => break EXPIRED,
                    Some(requested) => { tasks.spawn(self.clone().serve_incoming(requested)); }
                    None => return,
                },
                () = self.draining.cancelled() => break "the node-agent is stopping",
                () = user.expired() => break EXPIRED,
            }
        };
        if reason == EXPIRED && !state.is_replaced() {
            let (key_id, serial) = (user.certificate.key_id(), user.certificate.serial());
            tracing::warn!(
                key_id,
                serial,
                "a master's certificate has expired; its session takes no new streams"
            );
        }
        mux.go_away(reason).await;
        // Streams that were requested before the master could know are refused when `incoming` is dropped.
    }

    async fn serve_incoming(self: Arc<Self>, incoming: Incoming) {
        let target = incoming.target.clone();
        let origin = incoming.origin.clone();
        let timeout = incoming.timeout.min(self.dial_timeout);
        let dialled = tokio::select! {
            dialled = self.dialer.dial(&target, timeout, &UserRole::Master) => dialled,
            () = incoming.cancelled() => {
                self.dialer.count_cancelled();
                return incoming.refuse(DialError::Cancelled).await;
            }
        };
        match dialled {
            Ok(dialled) => {
                if let Some(stream) = incoming.accept().await {
                    self.relay(dialled, stream, &target, &origin).await;
                }
            }
            Err(error) => incoming.refuse(error).await,
        }
    }

    /// Serves a stream that is a channel of its own.
    pub(super) async fn serve_channel(
        self: Arc<Self>,
        requested: RequestedChannel,
        user: Arc<AuthenticatedUser>,
        channels: Channels,
    ) {
        let RequestedChannel { half, reply, target } = requested;
        match self.dialer.dial(&target, self.dial_timeout, &user.role).await {
            Ok(dialled) => {
                reply.accept().await;
                self.relay(dialled, channels.stream(half), &target, &user.origin()).await;
            }
            Err(error) => {
                channels.forget(half.id());
                reply.reject(open_failure(&error)).await;
            }
        }
    }

    async fn relay(&self, dialled: Dialled, stream: Stream, target: &Target, origin: &str) {
        let span = tracing::info_span!("stream", %target, origin);
        async {
            // After the answer, so that the caller does not wait for it.
            socket::tune(&dialled.socket);
            let mut record = StreamRecord::new(self.metrics.clone(), dialled.rule);
            let (read, write) = dialled.socket.into_split();
            let (down, up) = (&record.counters.down, &record.counters.up);
            let outcome = relay(read, write, stream, down, up, self.half_closed_timeout).await;
            record.outcome = outcome.kind();
        }
        .instrument(span)
        .await;
    }
}

/// The reason codes of RFC 4254 §5.1: 1 administratively prohibited, 2 connect failed, 4 resource shortage.
fn open_failure(error: &DialError) -> ChannelOpenFailure {
    let code = match error {
        DialError::Policy { .. } | DialError::BadTarget(_) => 1,
        DialError::TooManyStreams(_) => 4,
        DialError::Cancelled
        | DialError::NoRoute(_)
        | DialError::NoTunnel { .. }
        | DialError::TunnelLost { .. }
        | DialError::Refused(_)
        | DialError::Resolve(_)
        | DialError::Unreachable(_)
        | DialError::TimedOut(_) => 2,
    };
    ChannelOpenFailure::Other { code, reason: error.to_string() }
}

/// Counts and logs a stream when it ends, in whatever way.
struct StreamRecord {
    metrics: Arc<Metrics>,
    rule: String,
    began: Instant,
    counters: Counters,
    outcome: &'static str,
}

impl StreamRecord {
    fn new(metrics: Arc<Metrics>, rule: String) -> Self {
        metrics.streams.inc();
        Self { metrics, rule, began: Instant::now(), counters: Counters::default(), outcome: "tunnel_lost" }
    }
}

impl Drop for StreamRecord {
    fn drop(&mut self) {
        self.metrics.streams.dec();
        let (up, down) = (*self.counters.up.get_mut(), *self.counters.down.get_mut());
        for (direction, bytes) in [("up", up), ("down", down)] {
            self.metrics.bytes.get_or_create(&metrics::DirectionLabel { direction }).inc_by(bytes);
        }
        tracing::info!(
            rule = self.rule,
            up,
            down,
            seconds = self.began.elapsed().as_secs_f64(),
            outcome = self.outcome,
            "stream ended"
        );
    }
}
