//! The labels that several metrics share.

use prometheus_client::encoding::EncodeLabelSet;

/// All names that streams to nodes come under in records and metrics.
pub const DOORS: [&str; 9] = [
    "connect-unix",
    "connect-tls",
    "konnectivity-unix",
    "konnectivity-tls",
    "socks5-unix",
    "socks5-tcp",
    "proxy-url-unix",
    "proxy-url-tcp",
    "front-end",
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    pub egress: &'static str,
    pub result: &'static str,
    /// Who must act: `none`, or as in `DialError::fault`.
    pub fault: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Door {
    pub egress: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DoorDirection {
    pub egress: &'static str,
    pub direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    pub reason: &'static str,
}
