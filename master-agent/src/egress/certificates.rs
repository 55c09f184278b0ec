//! The certificates of all egress listeners, which follow their files.

use std::sync::Arc;

use super::{proxy_urls::tls::TargetTls, tls::CallerTls};
use crate::metrics::Expiry;
use proto_net::file_watcher::Watcher;

/// The certificates that egress listeners present to callers and targets, and the CAs by which they verify them.
#[derive(Clone, Default)]
pub struct EgressCertificates {
    pub callers: Vec<Arc<CallerTls>>,
    pub targets: Option<Arc<TargetTls>>,
}

impl EgressCertificates {
    /// Returns the watchers of the files.
    pub fn watchers(&self) -> Vec<Arc<dyn Watcher>> {
        let callers = self.callers.iter().flat_map(|tls| tls.watchers());
        callers.chain(self.targets.iter().flat_map(|tls| tls.watchers())).collect()
    }

    /// Returns when the certificates in use expire.
    pub fn expiries(&self) -> Vec<Expiry> {
        let callers = self.callers.iter().flat_map(|tls| tls.expiries());
        callers.chain(self.targets.iter().flat_map(|tls| tls.expiries())).collect()
    }
}
