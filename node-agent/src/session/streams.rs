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
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::Instrument;

use super::{state::SessionState, user::AuthenticatedUser};
use crate::{
    dialer::{Dialer, Dialled},
    drain::{DRAINED, Drain},
    metrics::{self, Metrics},
    shares::Permit,
    shutdown::Shutdown,
};

/// Why a session accepts no new streams after the end of its certificate.
pub(super) const EXPIRED: &str = "the certificate of this session has expired";
pub(super) const STOPPING: &str = "the node-agent is stopping";
pub(super) const TOO_MANY_STREAMS: &str =
    "this node carries too many streams of this user, or of all, already";

/// Dials and relays the streams of all sessions.
pub struct StreamServer {
    pub dialer: Arc<Dialer>,
    pub metrics: Arc<Metrics>,
    /// For resolving and connecting to a target.
    pub dial_timeout: Duration,
    /// After one direction of a stream has ended, how long the other may be silent.
    pub half_closed_timeout: Duration,
    pub drain: Arc<Drain>,
    pub shutdown: Shutdown,
}

/// Room for one more stream.
pub(super) struct Room {
    /// Held until the stream's socket is closed.
    permit: Permit,
    /// Held until the stream is counted as open.
    dialling: TaskTrackerToken,
}

/// A direct-tcpip channel that a peer asks for.
pub(super) struct RequestedChannel {
    pub(super) half: WriteHalf,
    pub(super) reply: ChannelOpenHandle,
    pub(super) target: Target,
}

impl StreamServer {
    /// Room for one more stream of a user, unless they or all have too many.
    pub(super) fn room(&self, user: &AuthenticatedUser) -> Option<Room> {
        Some(Room { permit: user.streams.try_take()?, dialling: self.shutdown.dials.token() })
    }

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
                    Some(requested) if user.has_expired() => {
                        requested.reject(takes_no_more(EXPIRED));
                        break EXPIRED;
                    }
                    Some(requested) if self.drain.is_over() => requested.reject(takes_no_more(DRAINED)),
                    Some(requested) => match self.room(&user) {
                        Some(room) => {
                            tasks.spawn(self.clone().serve_incoming(requested, user.clone(), room));
                        }
                        None => requested.reject(DialError::TooManyStreams(TOO_MANY_STREAMS.to_owned())),
                    },
                    None => return,
                },
                () = self.shutdown.draining.cancelled() => break STOPPING,
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
        // These were requested before the master could know. The multiplexer itself refuses what it asks for from now on.
        while let Ok(requested) = incoming.try_recv() {
            requested.reject(takes_no_more(reason));
        }
    }

    async fn serve_incoming(self: Arc<Self>, incoming: Incoming, user: Arc<AuthenticatedUser>, room: Room) {
        let (target, origin) = (incoming.target.clone(), incoming.origin.clone());
        // Boxed, so that a long-lived stream does not keep the memory of its dial.
        if let Some((dialled, stream)) = Box::pin(self.accept(incoming, user)).await {
            self.relay(dialled, stream, &target, &origin, room).await;
        }
    }

    /// Dials for a stream, and accepts or refuses it.
    async fn accept(&self, incoming: Incoming, user: Arc<AuthenticatedUser>) -> Option<(Dialled, Stream)> {
        let timeout = incoming.timeout.min(self.dial_timeout);
        let dialled = tokio::select! {
            dialled = self.dialer.dial(&incoming.target, timeout, &user.lookups) => dialled,
            () = incoming.cancelled() => {
                self.dialer.count_cancelled();
                Err(DialError::Cancelled)
            }
        };
        match dialled {
            Ok(_) if self.drain.is_over() => {
                incoming.refuse(takes_no_more(DRAINED)).await;
                None
            }
            Ok(dialled) => incoming.accept().await.map(|stream| (dialled, stream)),
            Err(error) => {
                incoming.refuse(error).await;
                None
            }
        }
    }

    /// Serves a stream that is a channel of its own.
    pub(super) async fn serve_channel(
        self: Arc<Self>,
        requested: RequestedChannel,
        user: Arc<AuthenticatedUser>,
        channels: Channels,
        room: Room,
    ) {
        let RequestedChannel { half, reply, target } = requested;
        let dialled = self.dialer.dial(&target, self.dial_timeout, &user.lookups).await;
        match dialled {
            Ok(_) if self.drain.is_over() => {
                channels.forget(half.id());
                reply.reject(ChannelOpenFailure::Other { code: 1, reason: DRAINED.to_owned() }).await;
            }
            Ok(dialled) => {
                reply.accept().await;
                self.relay(dialled, channels.stream(half), &target, &user.origin(), room).await;
            }
            Err(error) => {
                channels.forget(half.id());
                reply.reject(open_failure(&error)).await;
            }
        }
    }

    /// The future holds no more than an idle stream needs.
    fn relay(
        &self,
        dialled: Dialled,
        stream: Stream,
        target: &Target,
        origin: &str,
        room: Room,
    ) -> impl Future<Output = ()> + use<> {
        let Room { permit, dialling } = room;
        let span = tracing::info_span!("stream", %target, origin);
        // After the answer, so that the caller does not wait for it.
        socket::tune(&dialled.socket);
        let mut record = StreamRecord::new(self.metrics.clone(), dialled.rule);
        drop(dialling);
        let (read, write) = dialled.socket.into_split();
        let half_closed_timeout = self.half_closed_timeout;
        let carried = async move {
            let (down, up) = (&record.counters.down, &record.counters.up);
            let outcome = relay(read, write, stream, down, up, half_closed_timeout).await;
            record.outcome = outcome.kind();
            drop(record);
            drop(permit);
        };
        carried.instrument(span)
    }
}

/// What the master makes of it: another tunnel may take the stream.
fn takes_no_more(reason: &str) -> DialError {
    DialError::TunnelLost { node: String::new(), reason: reason.to_owned() }
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
