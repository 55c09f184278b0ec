//! The identity in force, which a renewal replaces while the agent runs.

use std::sync::{Arc, PoisonError, RwLock};

use super::host::NodeIdentity;

/// The identity that handshakes show now. Cheap to clone; all clones see a renewal.
#[derive(Clone, Debug)]
pub struct CurrentIdentity(Arc<RwLock<Arc<NodeIdentity>>>);

impl CurrentIdentity {
    pub fn new(identity: NodeIdentity) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(identity))))
    }

    pub fn get(&self) -> Arc<NodeIdentity> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn replace(&self, identity: NodeIdentity) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(identity);
    }
}
