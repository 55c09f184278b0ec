//! The state of a node that has no tunnel.

use std::{fmt, time::SystemTime};

/// Why a node has no tunnel at the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Absent {
    /// The master has not tried yet.
    New,
    Connecting,
    /// The last attempt failed, and another one follows.
    Retrying {
        error: String,
        at: SystemTime,
    },
    WaitingForCallHome,
    /// The last tunnel ended, and the node has to call home again.
    Lost {
        reason: String,
        since: SystemTime,
    },
}

impl Absent {
    /// Returns the name of the state, as the status shows it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::New | Self::Connecting => "connecting",
            Self::Retrying { .. } => "retrying",
            Self::WaitingForCallHome => "waiting",
            Self::Lost { .. } => "lost",
        }
    }
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::New => f.write_str("not tried yet"),
            Self::Connecting => f.write_str("connecting"),
            Self::Retrying { error, .. } => write!(f, "retrying; last error: {error}"),
            Self::WaitingForCallHome => f.write_str("waiting for the node to call home"),
            Self::Lost { reason, .. } => write!(f, "lost: {reason}"),
        }
    }
}
