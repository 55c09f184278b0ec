//! The record that every stream leaves when it ends, in whatever way; while it is open, its node knows of it.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use proto::{NodeName, Target, io::relay::Counters};

use super::Caller;
use crate::{
    activity::{Live, Place},
    metrics::{Door, DoorDirection, Metrics},
};

pub struct Record {
    metrics: Metrics,
    stream: Arc<Live>,
    node: Option<NodeName>,
    _place: Option<Place>,
    pub outcome: &'static str,
}

impl Record {
    pub fn new(
        metrics: Metrics,
        caller: Caller,
        target: Target,
        node: Option<NodeName>,
        reason: String,
    ) -> Self {
        metrics.streams.get_or_create(&Door { front_door: caller.door }).inc();
        let (began, counters) = (Instant::now(), Counters::default());
        let stream = Arc::new(Live { caller, target, reason, began, counters });
        let activity = node.as_ref().and_then(|node| metrics.nodes.activity(node));
        let place = activity.map(|activity| activity.open(stream.clone()));
        Self { metrics, stream, node, _place: place, outcome: "cancelled" }
    }

    /// To be counted in while the stream is carried.
    pub fn counters(&self) -> &Counters {
        &self.stream.counters
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let Live { caller, target, reason, began, counters } = &*self.stream;
        let front_door = caller.door;
        let (up, down) = (counters.up.load(Relaxed), counters.down.load(Relaxed));
        let seconds = began.elapsed().as_secs_f64();
        self.metrics.streams.get_or_create(&Door { front_door }).dec();
        for (direction, bytes) in [("up", up), ("down", down)] {
            let labels = DoorDirection { front_door, direction };
            self.metrics.bytes.get_or_create(&labels).inc_by(bytes);
            self.metrics.stream_size.get_or_create(&labels).observe(bytes as f64);
        }
        self.metrics.stream_seconds.get_or_create(&Door { front_door }).observe(seconds);
        self.metrics.konnectivity.stream_seconds.observe(seconds);
        tracing::info!(
            front_door,
            origin = %caller.origin,
            %target,
            node = self.node.as_ref().map(|n| n.as_str()),
            route = reason,
            up,
            down,
            seconds,
            outcome = self.outcome,
            "stream ended"
        );
    }
}
