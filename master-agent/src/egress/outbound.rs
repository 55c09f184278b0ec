//! What every egress listener does for a caller: it dials the target, relays, and traces, counts and records both.

use std::{fmt::Display, sync::Arc, time::Duration};

use prometheus_client::metrics::gauge::Gauge;
use proto::{DialError, Fault, Target};
use proto_net::{
    dialer::{Connection, Dialer},
    log_throttle::LogThrottle,
    relay::{Outcome as Ended, relay},
    tasks::Tasks,
};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{
    stream::{
        caller::Caller,
        metrics::StreamMetrics,
        record::{self, Opened, Record},
        target_socket::{self, TargetSocket},
    },
    traces::Span,
};

/// The refusals that one [`LogThrottle`] lets through one by one in ten seconds.
pub(super) const LOG_BURST: u32 = 100;
/// The most characters of a caller's text in logs and answers.
const EXCERPT: usize = 100;

/// The parts that all egress listeners share: the dialer, the metrics, and the limits on callers.
#[derive(Clone)]
pub struct Outbound {
    pub dialer: Arc<dyn Dialer>,
    pub metrics: StreamMetrics,
    pub limits: CallerLimits,
    /// The group of the tasks of callers and their streams, which is drained when the agent stops.
    pub tasks: Tasks,
}

/// The limits on callers.
#[derive(Clone, Copy, Debug)]
pub struct CallerLimits {
    /// How long a caller may take for a TLS handshake, and then for its request.
    pub head_timeout: Duration,
    /// How long one direction of a stream may be silent after the other has ended.
    pub half_closed_timeout: Duration,
    /// The number of callers that each listener serves at once.
    pub max_connections: usize,
}

/// A connection to a target, with the data for the record of its stream.
pub struct Dialled {
    pub connection: Connection,
    pub target: Target,
    pub caller: Caller,
    /// Lasts until the stream has ended.
    pub span: Span,
}

impl Outbound {
    /// Dials, and counts a success. The caller of this function reports a failure with [`Self::dial_failed`], because only
    /// it knows of a dial that was cancelled. Dropping the future cancels the dial.
    pub async fn dial(&self, target: &Target, caller: &Caller) -> Result<Dialled, DialError> {
        let began = std::time::Instant::now();
        let mut span = record::start_span(caller, target);
        let pending = PendingDial::new(&self.metrics.dials_pending);
        let connection = self.dialer.dial(target, &caller.origin).await.inspect_err(|error| {
            span.set_text("master_agent.fault", &error.fault().to_string());
            span.fail(error.kind(), &error.to_string());
        })?;
        drop(pending);
        self.metrics.dial_succeeded(caller.listener, began.elapsed().as_secs_f64());
        span.event("dialled");
        Ok(Dialled { connection, target: target.clone(), caller: caller.clone(), span })
    }

    /// Counts and logs a dial that failed or was cancelled.
    pub fn dial_failed(&self, target: &Target, caller: &Caller, error: &DialError) {
        let Caller { listener: egress, origin, .. } = caller;
        let fault = error.fault();
        self.metrics.dial_failed(egress, error);
        match fault {
            Fault::Caller | Fault::Policy | Fault::Target => {
                tracing::info!(egress, %origin, %target, %error, %fault, "dial failed");
            }
            Fault::Route | Fault::Tunnel => {
                tracing::warn!(egress, %origin, %target, %error, %fault, "dial failed");
            }
        }
    }

    /// Counts and logs a caller whose request leads to no dial.
    pub fn bad_request(&self, egress: &'static str, caller: &dyn Display, error: &dyn Display) {
        self.metrics.bad_request(egress);
        tracing::info!(egress, %caller, %error, "caller refused");
    }

    /// Counts a caller as [`Self::bad_request`] does, but logs at INFO no more than `throttle` allows: for what a stranger, or
    /// one connection, can cause any number of times.
    pub fn bad_requests(
        &self,
        throttle: &LogThrottle,
        egress: &'static str,
        caller: &dyn Display,
        error: &dyn Display,
    ) {
        self.metrics.bad_request(egress);
        match throttle.count(1) {
            Some(times) => tracing::info!(egress, %caller, %error, times, "caller refused"),
            None => tracing::debug!(egress, %caller, %error, "caller refused"),
        }
    }

    /// Relays between a caller's socket and its connection until both directions have ended. The record of the stream is
    /// opened at once, so that the future holds no more than that.
    pub fn relay<R, W>(&self, read: R, write: W, dialled: Dialled) -> impl Future<Output = Ended> + use<R, W>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let Dialled { connection, target, caller, span } = dialled;
        let Connection { stream, node, reason, permit } = connection;
        let opened = Opened { caller, target, node, reason, span };
        let mut record = Record::open(self.metrics.clone(), opened);
        let half_closed_timeout = self.limits.half_closed_timeout;
        async move {
            let (up, down) = (&record.counters().up, &record.counters().down);
            let outcome = relay(read, write, stream, up, down, half_closed_timeout).await;
            drop(permit);
            record.outcome = outcome.kind();
            drop(record);
            outcome
        }
    }

    /// Returns a socket for a listener that is itself a client of the target.
    pub fn socket(&self, dialled: Dialled) -> TargetSocket {
        let (near, far) = target_socket::pair();
        let outbound = self.clone();
        self.tasks.spawn(far.carry(|mut io| async move {
            let (read, write) = tokio::io::split(&mut io);
            let ended = outbound.relay(read, write, dialled).await;
            (io, ended == Ended::Closed)
        }));
        near
    }
}

/// Shortens a caller's text, which may be of any length, for logs and answers.
pub(super) fn excerpt(text: &str) -> String {
    text.chars().take(EXCERPT).collect()
}

/// Counts a dial that is under way.
struct PendingDial<'a>(&'a Gauge);

impl<'a> PendingDial<'a> {
    fn new(dials: &'a Gauge) -> Self {
        dials.inc();
        Self(dials)
    }
}

impl Drop for PendingDial<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}
