//! The record that every stream leaves when it ends, for whatever reason: one line in the log, the metrics, and the
//! attributes of its span. This is the only place that says what such a record holds.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Instant, SystemTime},
};

use opentelemetry::trace::SpanKind;
use proto::{NodeName, Target};
use proto_net::relay::Counters;

use super::{caller::Caller, metrics::StreamMetrics};
use crate::{
    activity::{OpenStream, OpenStreamGuard},
    traces::{self, Span, SpanContext},
};

/// A stream whose target has just accepted it.
pub struct Opened {
    pub caller: Caller,
    pub target: Target,
    /// The node that reached the target. It is `None` if no tunnel was used.
    pub node: Option<NodeName>,
    /// Why that node was chosen.
    pub reason: String,
    /// The stream's span, which began before the dial.
    pub span: Span,
}

/// An open stream. Its node's activity lists it; dropping it writes the record.
pub struct Record {
    metrics: StreamMetrics,
    stream: Arc<OpenStream>,
    node: Option<NodeName>,
    _listed: Option<OpenStreamGuard>,
    /// The caller's span, whose identifiers are logged if the stream's own span is not sent.
    parent: Option<SpanContext>,
    span: Span,
    /// How the stream ended. It is `cancelled` until the end is known.
    pub outcome: &'static str,
}

impl Record {
    pub fn open(metrics: StreamMetrics, opened: Opened) -> Self {
        let Opened { caller, target, node, reason, span } = opened;
        let Caller { listener, origin, span: parent } = caller;
        metrics.opened(listener);
        let (began, counters) = (Instant::now(), Counters::default());
        let stream = Arc::new(OpenStream { listener, origin, target, reason, began, counters });
        let activity = node.as_ref().and_then(|node| metrics.nodes.activity(node));
        let listed = activity.map(|activity| activity.open(stream.clone()));
        Self { metrics, stream, node, _listed: listed, parent, span, outcome: "cancelled" }
    }

    /// Returns the counters of the stream's bytes. The relay of the stream updates them.
    pub fn counters(&self) -> &Counters {
        &self.stream.counters
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let OpenStream { listener: egress, origin, target, reason, began, counters } = &*self.stream;
        let egress = *egress;
        let (up, down) = (counters.up.load(Relaxed), counters.down.load(Relaxed));
        let seconds = began.elapsed().as_secs_f64();
        let span = self.span.context().or(self.parent.as_ref()).map(traces::ids);
        let (trace_id, span_id) = span.unzip();
        self.metrics.ended(egress, seconds, [up, down]);
        tracing::info!(
            egress,
            %origin,
            %target,
            node = self.node.as_ref().map(|n| n.as_str()),
            route = reason,
            up,
            down,
            seconds,
            outcome = self.outcome,
            trace_id,
            span_id,
            "stream ended"
        );
        end_span(&mut self.span, self.outcome, self.node.as_ref(), reason, [up, down]);
    }
}

/// Starts a stream's span, before its dial.
pub fn start_span(caller: &Caller, target: &Target) -> Span {
    let parent = caller.span.as_ref();
    let name = || format!("stream {}", caller.listener);
    let mut span = Span::start(SpanKind::Client, parent, SystemTime::now(), name);
    if span.is_sent() {
        span.set_text("server.address", &target.host.to_string());
        span.set("server.port", i64::from(target.port));
        span.set("master_agent.egress", caller.listener);
        span.set_text("master_agent.origin", &caller.origin.0);
    }
    span
}

fn end_span(
    span: &mut Span,
    outcome: &'static str,
    node: Option<&NodeName>,
    reason: &str,
    [up, down]: [u64; 2],
) {
    if !span.is_sent() {
        return;
    }
    if let Some(node) = node {
        span.set_text("master_agent.node", node.as_str());
    }
    span.set_text("master_agent.route", reason);
    for (key, bytes) in [("master_agent.bytes.up", up), ("master_agent.bytes.down", down)] {
        span.set(key, i64::try_from(bytes).unwrap_or(i64::MAX));
    }
    span.set("master_agent.outcome", outcome);
    span.settle();
}
