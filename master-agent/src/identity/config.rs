//! The configuration of the SSH certificates that this master issues.

use std::time::Duration;

use proto_config::Section;

use crate::fields::{DAY, secs};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificatesConfig {
    /// The lifetime of the master's own SSH user certificates.
    pub user_ttl: Duration,
    /// The lifetime of nodes' host certificates.
    pub host_ttl: Duration,
}

impl CertificatesConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        Self {
            user_ttl: s.duration("user_ttl", DAY, secs(1)..=30 * DAY),
            host_ttl: s.duration("host_ttl", 30 * DAY, secs(1)..=3660 * DAY),
        }
    }
}
