//! The labels of the metrics of dials and streams.

use prometheus_client::encoding::EncodeLabelSet;

/// The values of the label `egress`: the names of the listeners whose streams lead to nodes.
pub const LISTENERS: [&str; 9] = [
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
pub struct DialLabels {
    pub egress: &'static str,
    pub result: &'static str,
    /// Who is at fault: `none`, or as `DialError::fault` says.
    pub fault: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ListenerLabels {
    pub egress: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DirectionLabels {
    pub egress: &'static str,
    pub direction: &'static str,
}
