//! The record that every stream leaves when it ends, in whatever way.

use std::{sync::atomic::AtomicU64, time::Instant};

use proto::{NodeName, Target};

use super::Caller;
use crate::metrics::{Door, DoorDirection, Metrics};

pub struct Record {
    metrics: Metrics,
    caller: Caller,
    target: Target,
    node: Option<NodeName>,
    reason: String,
    began: Instant,
    pub up: AtomicU64,
    pub down: AtomicU64,
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
        let (began, up, down) = (Instant::now(), AtomicU64::new(0), AtomicU64::new(0));
        Self { metrics, caller, target, node, reason, began, up, down, outcome: "cancelled" }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let front_door = self.caller.door;
        let (up, down) = (*self.up.get_mut(), *self.down.get_mut());
        self.metrics.streams.get_or_create(&Door { front_door }).dec();
        for (direction, bytes) in [("up", up), ("down", down)] {
            self.metrics.bytes.get_or_create(&DoorDirection { front_door, direction }).inc_by(bytes);
        }
        tracing::info!(
            front_door,
            origin = %self.caller.origin,
            target = %self.target,
            node = self.node.as_ref().map(|n| n.as_str()),
            route = self.reason,
            up,
            down,
            seconds = self.began.elapsed().as_secs_f64(),
            outcome = self.outcome,
            "stream ended"
        );
    }
}
