//! What is counted only for the names of a Konnectivity server, which `tunnels/compatibility.rs` serves.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
};
use proto::DialError;
use tonic::Code;

use crate::metrics::ReasonLabel;

/// Konnectivity's reasons of failed dials that occur here.
const REASONS: [&str; 5] =
    ["no_agent", "error_response", "backend_close", "backend_dial_timeout", "frontend_close"];

/// The types of packets by number, as Konnectivity names them.
const PACKET_TYPES: [&str; 7] =
    ["DIAL_REQ", "DIAL_RSP", "CLOSE_REQ", "CLOSE_RSP", "DATA", "DIAL_CLS", "DRAIN"];
const SECONDS: [f64; 9] = [0.000_001, 0.000_01, 0.0001, 0.005, 0.025, 0.1, 0.5, 2.5, 12.5];

/// Histograms with Konnectivity's buckets, and failed dials by its reasons.
#[derive(Clone, Debug)]
pub struct KonnectivityCounts {
    pub dial_seconds: Histogram,
    pub stream_seconds: Histogram,
    /// How long packets waited until the client had room for them.
    pub write_seconds: Histogram,
    /// Calls of `Proxy` that are being served.
    pub calls: Gauge,
    pub from_client: Packets,
    pub to_client: Packets,
    pub errors: Family<ErrorLabels, Counter>,
    failures: Family<ReasonLabel, Counter>,
}

/// The number of packets by type.
#[derive(Clone, Debug, Default)]
pub struct Packets(Arc<[AtomicU64; PACKET_TYPES.len()]>);

/// The labels of failed calls.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ErrorLabels {
    segment: &'static str,
    code: String,
    packet_type: &'static str,
}

impl Packets {
    /// Counts a packet by its field `type`.
    pub fn count(&self, kind: i32) {
        if let Some(count) = usize::try_from(kind).ok().and_then(|kind| self.0.get(kind)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The types, each with its number of packets.
    pub fn by_type(&self) -> [(&'static str, u64); PACKET_TYPES.len()] {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        let mut by_type = PACKET_TYPES.map(|kind| (kind, 0));
        for ((_, to), count) in by_type.iter_mut().zip(counts) {
            *to = count;
        }
        by_type
    }
}

impl Default for KonnectivityCounts {
    fn default() -> Self {
        Self {
            dial_seconds: Histogram::new(SECONDS),
            write_seconds: Histogram::new(SECONDS),
            calls: Gauge::default(),
            from_client: Packets::default(),
            to_client: Packets::default(),
            errors: Family::default(),
            stream_seconds: Histogram::new([
                1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 14400.0, 43200.0, 86400.0,
            ]),
            failures: Family::default(),
        }
    }
}

impl KonnectivityCounts {
    /// Counts a call that failed with a gRPC status code.
    pub fn call_failed(&self, code: Code) {
        // Only this name differs from that of gRPC's Go library.
        let code = if code == Code::Cancelled { "Canceled".to_owned() } else { format!("{code:?}") };
        let labels = ErrorLabels { segment: "from_client", code, packet_type: "Unknown" };
        self.errors.get_or_create(&labels).inc();
    }

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
