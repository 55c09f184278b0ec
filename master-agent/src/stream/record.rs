//! The record that every stream leaves when it ends, in whatever way; while it is open, its node knows of it.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Instant, SystemTime},
};

use opentelemetry::trace::SpanKind;
use proto::{NodeName, Target};
use proto_net::relay::Counters;

use super::caller::Caller;
use crate::{
    activity::{Live, Place},
    metrics::{Door, DoorDirection, Metrics},
    traces::{self, Span, SpanContext},
};

pub struct Record {
    metrics: Metrics,
    stream: Arc<Live>,
    node: Option<NodeName>,
    _place: Option<Place>,
    /// Of what it is part.
    parent: Option<SpanContext>,
    span: Span,
    pub outcome: &'static str,
}

impl Record {
    pub fn new(
        metrics: Metrics,
        caller: Caller,
        target: Target,
        node: Option<NodeName>,
        reason: String,
        span: Span,
    ) -> Self {
        let Caller { door, origin, span: parent } = caller;
        metrics.streams.get_or_create(&Door { egress: door }).inc();
        let (began, counters) = (Instant::now(), Counters::default());
        let stream = Arc::new(Live { door, origin, target, reason, began, counters });
        let activity = node.as_ref().and_then(|node| metrics.nodes.activity(node));
        let place = activity.map(|activity| activity.open(stream.clone()));
        Self { metrics, stream, node, _place: place, parent, span, outcome: "cancelled" }
    }

    /// To be counted in while the stream is carried.
    pub fn counters(&self) -> &Counters {
        &self.stream.counters
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let Live { origin, target, reason, began, counters, .. } = &*self.stream;
        let egress = self.stream.door;
        let (up, down) = (counters.up.load(Relaxed), counters.down.load(Relaxed));
        let seconds = began.elapsed().as_secs_f64();
        let span = self.span.context().or(self.parent.as_ref()).map(traces::ids);
        let (trace_id, span_id) = span.unzip();
        self.metrics.streams.get_or_create(&Door { egress }).dec();
        for (direction, bytes) in [("up", up), ("down", down)] {
            let labels = DoorDirection { egress, direction };
            self.metrics.bytes.get_or_create(&labels).inc_by(bytes);
            self.metrics.stream_size.get_or_create(&labels).observe(bytes as f64);
        }
        self.metrics.stream_seconds.get_or_create(&Door { egress }).observe(seconds);
        self.metrics.konnectivity.stream_seconds.observe(seconds);
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
        end(&mut self.span, self.outcome, self.node.as_ref(), reason, [up, down]);
    }
}

/// Of a stream, from before its dial.
pub fn span(caller: &Caller, target: &Target) -> Span {
    let parent = caller.span.as_ref();
    let name = || format!("stream {}", caller.door);
    let mut span = Span::start(SpanKind::Client, parent, SystemTime::now(), name);
    if span.is_sent() {
        span.set_text("server.address", &target.host.to_string());
        span.set("server.port", i64::from(target.port));
        span.set("master_agent.egress", caller.door);
        span.set_text("master_agent.origin", &caller.origin.0);
    }
    span
}

fn end(span: &mut Span, outcome: &'static str, node: Option<&NodeName>, reason: &str, [up, down]: [u64; 2]) {
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
