//! The callers and streams that former processes still carry, and the metrics by which the present process shows them.

use prometheus_client::metrics::gauge::Gauge;
use serde::{Deserialize, Serialize};

/// The former processes that have not ended, and their streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draining {
    pub processes: u64,
    /// Their callers, or on a node their streams.
    pub streams: u64,
}

/// The same as metrics. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct DrainingGauges {
    pub processes: Gauge,
    pub streams: Gauge,
}

impl DrainingGauges {
    pub fn set(&self, draining: Draining) {
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.processes.set(number(draining.processes));
        self.streams.set(number(draining.streams));
    }

    pub fn get(&self) -> Draining {
        let count = |gauge: &Gauge| u64::try_from(gauge.get()).unwrap_or_default();
        Draining { processes: count(&self.processes), streams: count(&self.streams) }
    }
}
