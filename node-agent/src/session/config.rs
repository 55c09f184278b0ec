//! The configuration section `limits`.

use std::time::Duration;

use proto_config::{Meanings, Section};

use crate::fields::{COUNT, WAIT, secs};

/// What sessions and their streams may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitsConfig {
    /// Connections at once that have not authenticated yet.
    pub max_handshakes: usize,
    /// Sessions of people at once. Masters don't count.
    pub max_sessions: usize,
    /// Streams of one session on its multiplexer, and as many that are SSH channels of their own.
    pub max_streams: usize,
    pub handshake_timeout: Duration,
    /// For resolving and connecting to a target, and for connecting to a master.
    pub dial_timeout: Duration,
    pub keepalive_interval: Duration,
    /// Unanswered keep-alives after which a session is dead.
    pub keepalive_max: usize,
}

const FIELDS: Meanings = &[
    ("max_handshakes", "Connections at once that have not authenticated."),
    ("max_sessions", "Sessions of people at once. Masters do not count."),
    (
        "max_streams",
        "Streams at once of one session. Those of its multiplexer and those that are SSH channels of their own are \
         counted apart. All sessions of one user have at most twice as many.",
    ),
    ("handshake_timeout", "Time for an SSH handshake."),
    ("dial_timeout", "Time to resolve a target and to connect to it."),
    (
        "keepalive_interval",
        "Time between keep-alives of a session on which nothing comes. A master is heard at least every 6 s, so that \
         with a longer time it gets none.",
    ),
    (
        "keepalive_max",
        "A session is dead when one more than this number of keep-alives is unanswered: with the defaults, \
         after 14 s.",
    ),
];

impl LimitsConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        s.document(FIELDS);
        Self {
            max_handshakes: s.number("max_handshakes", 256, COUNT),
            max_sessions: s.number("max_sessions", 64, COUNT),
            max_streams: s.number("max_streams", 8192, COUNT),
            handshake_timeout: s.duration("handshake_timeout", secs(10), WAIT),
            dial_timeout: s.duration("dial_timeout", secs(10), WAIT),
            keepalive_interval: s.duration("keepalive_interval", secs(7), WAIT),
            keepalive_max: s.number("keepalive_max", 1, 1..=100),
        }
    }
}
