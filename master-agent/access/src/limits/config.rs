//! The `limits` section of the configuration.

use std::{ops::RangeInclusive, time::Duration};

use proto_config::{Meanings, Section};

use super::seats::SeatLimits;

/// The range of timeouts, which suits any network and excludes obvious mistakes.
const WAIT: RangeInclusive<Duration> = Duration::from_millis(10)..=secs(24 * 60 * 60);

const COUNT: RangeInclusive<usize> = 1..=1_000_000;

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// The `limits` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitsConfig {
    pub max_connections: usize,
    pub max_connections_per_address: usize,
    /// The maximum number of connections through the tunnels of one node, which counts in place of an address.
    pub max_connections_per_node: usize,
    /// The longest time for a TLS handshake, and for the head of a request.
    pub head_timeout: Duration,
    /// How long a connection may stay without a request, and how long a caller may read nothing of a response.
    pub idle_timeout: Duration,
    /// How long kube-apiserver may take to begin its response. Long-running requests have no such limit.
    pub request_timeout: Duration,
    /// The longest time between two pieces of a request's body.
    pub body_timeout: Duration,
    /// The largest body of a request, in bytes.
    pub max_body: u64,
    /// The limits on concurrent short requests.
    pub seats: SeatLimits,
    /// The maximum number of concurrent long-running requests of all users, such as watches, followed logs and
    /// upgrades.
    pub max_long_running: usize,
    pub long_running_per_user: usize,
    pub requests_per_second_per_user: u32,
    pub requests_per_second_per_address: u32,
    /// The rate of requests that fail to authenticate.
    pub failures_per_second_per_address: u32,
    /// How long an upgraded connection may be silent after one direction has ended.
    pub half_closed_timeout: Duration,
    /// The maximum number of concurrent HTTP/2 streams on one connection.
    pub max_streams: u32,
}

const FIELDS: Meanings = &[
    ("max_connections", "Connections at once."),
    (
        "max_connections_per_address",
        "Connections at once of one address. An IPv6 address counts with its /64.",
    ),
    ("max_connections_per_node", "Connections at once through the tunnels of one node."),
    ("head_timeout", "Time for a TLS handshake, and for the head of a request."),
    (
        "idle_timeout",
        "How long a connection may be without a request, and how long a caller may read nothing of its \
         response.",
    ),
    (
        "request_timeout",
        "Time until a response begins. Watches, followed logs and upgrades have no such limit.",
    ),
    ("body_timeout", "Time between two pieces of a request's body."),
    ("max_body", "Bytes of a request's body."),
    (
        "max_in_flight",
        "Requests at once, without those that are long-running. Further ones wait in their user's queue, and \
         the queues take turns.",
    ),
    ("max_in_flight_per_user", "The same for one user."),
    ("queue_per_user", "Requests of one user that wait."),
    ("queue_timeout", "How long a request waits."),
    (
        "max_long_running",
        "Watches, followed logs, exec, attach, portforward, proxy and whatever changes to another protocol, \
         at once.",
    ),
    ("long_running_per_user", "The same for one user."),
    ("requests_per_second_per_user", "Requests of one user in a second. Twice as many are allowed at once."),
    (
        "requests_per_second_per_address",
        "Requests from one address in a second. Twice as many are allowed at once.",
    ),
    (
        "failures_per_second_per_address",
        "Failed authentications from one address in a second. Beyond, new tokens are not verified for a \
         while.",
    ),
    ("half_closed_timeout", "How long an upgraded connection may be silent after one direction has ended."),
    ("max_streams", "HTTP/2 streams at once on one connection."),
];

impl LimitsConfig {
    pub fn read(s: &Section<'_>) -> Self {
        s.document(FIELDS);
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
            max_long_running: s.number("max_long_running", 200_000, COUNT),
            long_running_per_user: s.number("long_running_per_user", 1000, COUNT),
            requests_per_second_per_user: number("requests_per_second_per_user", 1000),
            requests_per_second_per_address: number("requests_per_second_per_address", 5000),
            failures_per_second_per_address: number("failures_per_second_per_address", 10),
            half_closed_timeout: s.duration("half_closed_timeout", secs(600), WAIT),
            max_streams: number("max_streams", 250),
        }
    }
}
