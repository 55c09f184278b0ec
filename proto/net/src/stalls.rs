//! Counts stalls: how often and for how long streams wait until the peer's window opens again.
//!
//! While there is room, nothing is counted and no clock is read.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

/// The stalls of an agent by direction, as seen from the master: `up` to what a caller wants to reach, `down` from it.
#[derive(Clone, Debug, Default)]
pub struct ByDirection {
    pub up: Stalls,
    pub down: Stalls,
}

/// The stalls of all streams in one direction. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Stalls(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    begun: AtomicU64,
    nanoseconds: AtomicU64,
    now: AtomicUsize,
}

/// One stall, which ends when this is dropped.
#[derive(Debug)]
pub struct Stall {
    counts: Arc<Counts>,
    began: Instant,
}

impl Stalls {
    #[must_use]
    pub fn begin(&self) -> Stall {
        self.0.begun.fetch_add(1, Relaxed);
        self.0.now.fetch_add(1, Relaxed);
        Stall { counts: self.0.clone(), began: Instant::now() }
    }

    /// Number of stalls, including those that have not ended.
    pub fn begun(&self) -> u64 {
        self.0.begun.load(Relaxed)
    }

    /// How long the stalls that have ended lasted in total.
    pub fn lasted(&self) -> Duration {
        Duration::from_nanos(self.0.nanoseconds.load(Relaxed))
    }

    /// Number of streams that are stalled now.
    pub fn now(&self) -> usize {
        self.0.now.load(Relaxed)
    }
}

impl Collector for ByDirection {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let all = [([("direction", "up")], &self.up), ([("direction", "down")], &self.down)];
        let help = "Waits of streams for the other agent to have room, by the direction of what waits.";
        let mut metric = encoder.encode_descriptor("stream_stalls", help, None, MetricType::Counter)?;
        for (labels, stalls) in &all {
            ConstCounter::new(stalls.begun()).encode(metric.encode_family(labels)?)?;
        }
        let help = "How long such waits lasted that have ended.";
        let mut metric =
            encoder.encode_descriptor("stream_stall_seconds", help, None, MetricType::Counter)?;
        for (labels, stalls) in &all {
            ConstCounter::new(stalls.lasted().as_secs_f64()).encode(metric.encode_family(labels)?)?;
        }
        let help = "Streams that wait now for the other agent to have room.";
        let mut metric = encoder.encode_descriptor("streams_stalled", help, None, MetricType::Gauge)?;
        for (labels, stalls) in &all {
            let now = i64::try_from(stalls.now()).unwrap_or(i64::MAX);
            ConstGauge::new(now).encode(metric.encode_family(labels)?)?;
        }
        Ok(())
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        let nanoseconds = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counts.nanoseconds.fetch_add(nanoseconds, Relaxed);
        self.counts.now.fetch_sub(1, Relaxed);
    }
}
