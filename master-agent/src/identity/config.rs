//! The configuration of the SSH certificates that this master issues.

use std::time::Duration;

use proto_config::{Meanings, Section};

use crate::fields::{DAY, secs};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificatesConfig {
    /// The lifetime of the master's own SSH user certificates.
    pub user_ttl: Duration,
    /// The lifetime of nodes' host certificates.
    pub host_ttl: Duration,
}

const FIELDS: Meanings = &[
    ("user_ttl", "The lifetime of the master's own SSH user certificate."),
    ("host_ttl", "The lifetime of nodes' host certificates, which are renewed over the tunnel."),
];

impl CertificatesConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        s.document(FIELDS);
        Self {
            user_ttl: s.duration("user_ttl", DAY, secs(1)..=30 * DAY),
            host_ttl: s.duration("host_ttl", 30 * DAY, secs(1)..=3660 * DAY),
        }
    }
}
