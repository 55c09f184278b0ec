//! The error of a caller that has exceeded a limit.

use std::time::Duration;

/// A limit on what one caller can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    ConnectionsPerAddress,
    ConnectionsPerNode,
    FailuresPerAddress,
    InFlight,
    LongRunning,
    RequestsPerAddress,
    RequestsPerUser,
}

impl Limit {
    /// Returns the limit's name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::ConnectionsPerAddress => "connections_per_address",
            Self::ConnectionsPerNode => "connections_per_node",
            Self::FailuresPerAddress => "failures_per_address",
            Self::InFlight => "in_flight",
            Self::LongRunning => "long_running",
            Self::RequestsPerAddress => "requests_per_address",
            Self::RequestsPerUser => "requests_per_user",
        }
    }
}

/// The error of a caller that has exceeded a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the limit {} is exceeded", .limit.name())]
pub struct Exceeded {
    pub limit: Limit,
    /// The time after which another attempt may succeed.
    pub retry_after: Duration,
}
