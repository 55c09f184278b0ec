//! The state of a node that has no tunnel.

use std::{fmt, time::SystemTime};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Absent {
    /// The master has not tried yet.
    New,
    Connecting,
    /// The last attempt failed; another follows.
    Retrying {
        error: String,
        at: SystemTime,
    },
    WaitingForCallHome,
    /// The last tunnel ended and the node has to call again.
    Lost {
        reason: String,
        since: SystemTime,
    },
}

impl Absent {
    /// The state in one word.
    pub(super) fn word(&self) -> &'static str {
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
