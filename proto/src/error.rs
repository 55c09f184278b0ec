//! Why a dial failed, and who is at fault.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Who must act for the dial to succeed next time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fault {
    Caller,
    Route,
    Tunnel,
    Policy,
    Target,
}

/// Why a dial failed. The text of every variant is for people. Callers match on the variant or on [`DialError::fault`], and
/// each egress listener maps it to its own status in one exhaustive match.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// What the caller asked for is not a target.
    #[error("bad target: {0}")]
    BadTarget(String),
    /// The caller can't have another stream now.
    #[error("too many streams: {0}")]
    TooManyStreams(String),
    /// The caller went away before the dial ended.
    #[error("cancelled by the caller")]
    Cancelled,
    /// No route says which node reaches the target.
    #[error("no route to {0}")]
    NoRoute(String),
    /// The node is known, but has no established tunnel.
    #[error("no tunnel to node {node}: {state}")]
    NoTunnel { node: String, state: String },
    /// The tunnel was lost during the dial.
    #[error("the tunnel to node {node} was lost: {reason}")]
    TunnelLost { node: String, reason: String },
    /// The node's policy forbids it. `rule` is the name of the rule that decided.
    #[error("refused by node policy (rule {rule}): {reason}")]
    Policy { rule: String, reason: String },
    /// The target, or the network before it, answered with a refusal.
    #[error("{0}")]
    Refused(String),
    /// The target's name could not be resolved on the node.
    #[error("{0}")]
    Resolve(String),
    /// No network path from the node to the target.
    #[error("{0}")]
    Unreachable(String),
    /// The deadline passed.
    #[error("{0}")]
    TimedOut(String),
}

impl DialError {
    pub fn fault(&self) -> Fault {
        match self {
            Self::BadTarget(_) | Self::TooManyStreams(_) | Self::Cancelled => Fault::Caller,
            Self::NoRoute(_) => Fault::Route,
            Self::NoTunnel { .. } | Self::TunnelLost { .. } => Fault::Tunnel,
            Self::Policy { .. } => Fault::Policy,
            Self::Refused(_) | Self::Resolve(_) | Self::Unreachable(_) | Self::TimedOut(_) => Fault::Target,
        }
    }

    /// Whether the same dial may succeed through another tunnel. This is true only if no byte of the caller's can have
    /// reached the target. A node whose tunnel is lost may have connected to it.
    pub fn retry_elsewhere(&self) -> bool {
        match self {
            Self::TooManyStreams(_) | Self::NoTunnel { .. } | Self::TunnelLost { .. } => true,
            Self::BadTarget(_)
            | Self::Cancelled
            | Self::NoRoute(_)
            | Self::Policy { .. }
            | Self::Refused(_)
            | Self::Resolve(_)
            | Self::Unreachable(_)
            | Self::TimedOut(_) => false,
        }
    }

    /// A short, fixed word for logs and metric labels.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::BadTarget(_) => "bad_target",
            Self::TooManyStreams(_) => "too_many_streams",
            Self::Cancelled => "cancelled",
            Self::NoRoute(_) => "no_route",
            Self::NoTunnel { .. } => "no_tunnel",
            Self::TunnelLost { .. } => "tunnel_lost",
            Self::Policy { .. } => "policy",
            Self::Refused(_) => "refused",
            Self::Resolve(_) => "resolve",
            Self::Unreachable(_) => "unreachable",
            Self::TimedOut(_) => "timed_out",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Caller => "caller",
            Self::Route => "route",
            Self::Tunnel => "tunnel",
            Self::Policy => "policy",
            Self::Target => "target",
        })
    }
}
