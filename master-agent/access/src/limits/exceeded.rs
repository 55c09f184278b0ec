//! Which limit a caller has exceeded.

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
    /// The limit's name in metrics.
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

/// A caller has taken all that one may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the limit {} is exceeded", .limit.name())]
pub struct Exceeded {
    pub limit: Limit,
    /// When trying again may help.
    pub retry_after: Duration,
}
