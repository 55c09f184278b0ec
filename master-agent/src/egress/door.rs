//! What an egress listener is, and what all of them hold to dial, to relay, and to count and record both.

use std::{sync::Arc, time::Duration};

use prometheus_client::metrics::gauge::Gauge;
use proto::{DialError, Fault, Target};
use proto_net::{
    dialer::{Connection, Dialer},
    relay::{Outcome as Ended, relay},
    tasks::Tasks,
};
use tokio::io::{AsyncRead, AsyncWrite};

use super::socket::Socket;
use crate::{
    metrics::{Door, Metrics, Outcome},
    stream::{
        caller::Caller,
        record::{self, Record},
        target_socket::{self, TargetSocket},
    },
    traces::Span,
};

/// One way in. Its callers are served each by a task of its own.
pub trait EgressListener: Send + Sync + 'static {
    fn common(&self) -> &Common;

    /// Serves one caller to its end.
    fn serve<S: Socket>(self: Arc<Self>, socket: S, caller: Caller) -> impl Future<Output = ()> + Send;
}

/// A connection to a target, and the span that lasts until its stream has ended.
pub struct Dialled {
    pub connection: Connection,
    pub span: Span,
}

/// What every egress listener holds.
#[derive(Clone)]
pub struct Common {
    pub dialer: Arc<dyn Dialer>,
    pub metrics: Metrics,
    /// How long a caller may take to say what it wants, a TLS handshake included.
    pub head_timeout: Duration,
    pub half_closed_timeout: Duration,
    /// Callers at once on each listener.
    pub max_connections: usize,
    /// Callers and their streams; drained at the end.
    pub connections: Tasks,
}

impl Common {
    /// Dials, and counts and records a failure. Dropping the future cancels the dial.
    pub async fn dial(&self, target: &Target, caller: &Caller) -> Result<Dialled, DialError> {
        let began = std::time::Instant::now();
        let mut span = record::span(caller, target);
        let pending = Pending::new(&self.metrics.dials_pending);
        let connection = self.dialer.dial(target, &caller.origin).await.inspect_err(|error| {
            span.set_text("master_agent.fault", &error.fault().to_string());
            span.fail(error.kind(), &error.to_string());
        })?;
        drop(pending);
        let seconds = began.elapsed().as_secs_f64();
        self.metrics.dial_seconds.observe(seconds);
        self.metrics.konnectivity.dial_seconds.observe(seconds);
        let outcome = Outcome { egress: caller.door, result: "ok", fault: "none".to_owned() };
        self.metrics.dials.get_or_create(&outcome).inc();
        span.event("dialled");
        Ok(Dialled { connection, span })
    }

    /// Counts and records a dial that failed, or that the caller gave up.
    pub fn dial_failed(&self, target: &Target, caller: &Caller, error: &DialError) {
        let Caller { door: egress, origin, .. } = caller;
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

    /// Counts and records a caller that no dial was made for.
    pub fn bad_request(
        &self,
        egress: &'static str,
        caller: &dyn std::fmt::Display,
        error: &dyn std::fmt::Display,
    ) {
        self.metrics.bad_requests.get_or_create(&Door { egress }).inc();
        tracing::info!(egress, %caller, %error, "refused a caller");
    }

    /// Relays between a caller's socket and its connection, and leaves a record at the end.
    pub async fn relay<R, W>(
        &self,
        read: R,
        write: W,
        dialled: Dialled,
        target: Target,
        caller: Caller,
    ) -> Ended
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let Dialled { connection: Connection { stream, node, reason, permit }, span } = dialled;
        let mut record = Record::new(self.metrics.clone(), caller, target, node, reason, span);
        let outcome = relay(
            read,
            write,
            stream,
            &record.counters().up,
            &record.counters().down,
            self.half_closed_timeout,
        )
        .await;
        drop(permit);
        record.outcome = outcome.kind();
        outcome
    }

    /// A socket for code that speaks a protocol of its own with the target.
    pub fn socket(&self, dialled: Dialled, target: Target, caller: Caller) -> TargetSocket {
        let (near, far) = target_socket::pair();
        let common = self.clone();
        self.connections.spawn(far.carry(|mut io| async move {
            let (read, write) = tokio::io::split(&mut io);
            let ended = common.relay(read, write, dialled, target, caller).await;
            (io, ended == Ended::Closed)
        }));
        near
    }
}

/// A dial that is under way.
struct Pending<'a>(&'a Gauge);

impl<'a> Pending<'a> {
    fn new(dials: &'a Gauge) -> Self {
        dials.inc();
        Self(dials)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}
