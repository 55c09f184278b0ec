//! The `limits` section of the configuration.

use std::{ops::RangeInclusive, time::Duration};

use proto_config::Section;

use super::seats::SeatLimits;

/// The range of times to wait: long enough for any network, and no accidental month.
const WAIT: RangeInclusive<Duration> = Duration::from_millis(10)..=secs(24 * 60 * 60);

const COUNT: RangeInclusive<usize> = 1..=1_000_000;

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitsConfig {
    pub max_connections: usize,
    pub max_connections_per_address: usize,
    /// Connections through the tunnels of one node, which stands in place of an address.
    pub max_connections_per_node: usize,
    /// The longest time for a TLS handshake, and for the head of a request.
    pub head_timeout: Duration,
    /// How long a connection may stay without a request, and how long a caller may read nothing of a response.
    pub idle_timeout: Duration,
    /// The longest time from a request's head to its response's. Long-running requests have no such limit.
    pub request_timeout: Duration,
    /// The longest time between two pieces of a request's body.
    pub body_timeout: Duration,
    /// The largest body of a request, in bytes.
    pub max_body: u64,
    /// Requests at once, besides those that are long-running.
    pub seats: SeatLimits,
    /// Watches, followed logs, upgraded connections and the like at once, of all users.
    pub max_long_running: usize,
    pub long_running_per_user: usize,
    pub requests_per_second_per_user: u32,
    pub requests_per_second_per_address: u32,
    /// Requests that fail to authenticate.
    pub failures_per_second_per_address: u32,
    /// How long an upgraded connection stays after one of its ends has closed.
    pub half_closed_timeout: Duration,
    /// HTTP/2 streams at once on one connection.
    pub max_streams: u32,
}

impl LimitsConfig {
    pub fn read(s: &Section<'_>) -> Self {
        let number = |name, default| u32::try_from(s.number(name, default, COUNT)).unwrap_or(u32::MAX);
        Self {
            max_connections: s.number("max_connections", 16_384, COUNT),
            max_connections_per_address: s.number("max_connections_per_address", 4096, COUNT),
            max_connections_per_node: s.number("max_connections_per_node", 1024, COUNT),
            head_timeout: s.duration("head_timeout", secs(10), WAIT),
            idle_timeout: s.duration("idle_timeout", secs(180), WAIT),
            request_timeout: s.duration("request_timeout", secs(60), WAIT),
            body_timeout: s.duration("body_timeout", secs(30), WAIT),
            max_body: s.number("max_body", 16 << 20, 1..=1 << 40) as u64,
            seats: SeatLimits {
                total: s.number("max_in_flight", 400, COUNT),
                per_user: s.number("max_in_flight_per_user", 100, COUNT),
                queue: s.number("queue_per_user", 100, COUNT),
                wait: s.duration("queue_timeout", secs(5), WAIT),
            },
            max_long_running: s.number("max_long_running", 50_000, COUNT),
            long_running_per_user: s.number("long_running_per_user", 1000, COUNT),
            requests_per_second_per_user: number("requests_per_second_per_user", 1000),
            requests_per_second_per_address: number("requests_per_second_per_address", 5000),
            failures_per_second_per_address: number("failures_per_second_per_address", 10),
            half_closed_timeout: s.duration("half_closed_timeout", secs(600), WAIT),
            max_streams: number("max_streams", 250),
        }
    }
}
