//! What is counted only for the names of a Konnectivity server, which `tunnels/compatibility.rs` serves.

use prometheus_client::metrics::{counter::Counter, family::Family, histogram::Histogram};
use proto::DialError;

use crate::metrics::ReasonLabel;

/// Konnectivity's reasons of failed dials that occur here.
const REASONS: [&str; 5] =
    ["no_agent", "error_response", "backend_close", "backend_dial_timeout", "frontend_close"];

/// Histograms with Konnectivity's buckets, and failed dials by its reasons.
#[derive(Clone, Debug)]
pub struct KonnectivityCounts {
    pub dial_seconds: Histogram,
    pub stream_seconds: Histogram,
    failures: Family<ReasonLabel, Counter>,
}

impl Default for KonnectivityCounts {
    fn default() -> Self {
        Self {
            dial_seconds: Histogram::new([0.000_001, 0.000_01, 0.0001, 0.005, 0.025, 0.1, 0.5, 2.5, 12.5]),
            stream_seconds: Histogram::new([
                1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 14400.0, 43200.0, 86400.0,
            ]),
            failures: Family::default(),
        }
    }
}

impl KonnectivityCounts {
    pub fn dial_failed(&self, error: &DialError) {
        let reason = match error {
            DialError::NoRoute(_) | DialError::NoTunnel { .. } => "no_agent",
            DialError::BadTarget(_)
            | DialError::TooManyStreams(_)
            | DialError::Policy { .. }
            | DialError::Refused(_)
            | DialError::Resolve(_)
            | DialError::Unreachable(_) => "error_response",
            DialError::TunnelLost { .. } => "backend_close",
            DialError::TimedOut(_) => "backend_dial_timeout",
            DialError::Cancelled => "frontend_close",
        };
        self.failures.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// The number of failed dials by reason.
    pub fn failures(&self) -> [(&'static str, u64); 5] {
        REASONS
            .map(|reason| (reason, self.failures.get(&ReasonLabel { reason }).map_or(0, |count| count.get())))
    }
}
