//! Counts links that did not become a tunnel, by reason and by the node that they claimed to belong to.

use std::{fmt::Display, sync::Arc};

use prometheus_client::metrics::{counter::Counter, family::Family};
use proto::NodeName;

use super::{registry::Registry, session::error::TunnelError};
use crate::{identity::HostKeyError, metrics::ReasonLabel};

/// Counts refused links.
#[derive(Clone)]
pub struct Refusals {
    registry: Arc<Registry>,
    by_reason: Family<ReasonLabel, Counter>,
}

impl Refusals {
    pub fn new(registry: Arc<Registry>, by_reason: Family<ReasonLabel, Counter>) -> Self {
        Self { registry, by_reason }
    }

    pub fn count(&self, reason: &'static str) {
        self.by_reason.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Counts a refused link that claimed to belong to a node.
    pub fn count_claim(&self, node: &NodeName, why: &dyn Display) {
        self.registry.count_refused(node, why);
    }

    /// Counts a refused host key, and returns the error with which its link fails.
    pub fn host_key(&self, why: &HostKeyError) -> TunnelError {
        self.count_host_key(why);
        TunnelError::Connect(why.to_string())
    }

    /// Counts a failed handshake, or a session that failed before it became a tunnel.
    pub fn handshake(&self, error: &TunnelError) {
        if let TunnelError::HostKey(why) = error {
            self.count_host_key(why);
        } else if let Some(reason) = error.handshake_failure() {
            self.count(reason);
        }
    }

    fn count_host_key(&self, why: &HostKeyError) {
        if let Some(node) = why.node() {
            self.count_claim(node, why);
        }
        self.count(why.kind());
    }
}
