//! The SSH key and certificate with which the master logs in to nodes.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use crate::identity::{Authorities, UserIdentity};

/// Holds a valid user certificate. Each certificate has a new key, which never leaves memory.
pub struct MasterLogin {
    authorities: Arc<Authorities>,
    ttl: Duration,
    current: RwLock<Arc<UserIdentity>>,
}

impl MasterLogin {
    pub fn new(authorities: Arc<Authorities>, ttl: Duration) -> anyhow::Result<Self> {
        let current = authorities.issue_user(SystemTime::now(), ttl)?;
        Ok(Self { authorities, ttl, current: RwLock::new(Arc::new(current)) })
    }

    pub fn current(&self) -> Arc<UserIdentity> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Issues a new certificate whenever a third of the present one's lifetime has passed. Never returns.
    pub async fn keep_renewed(self: Arc<Self>) {
        loop {
            tokio::time::sleep(self.ttl / 3).await;
            self.renew();
        }
    }

    /// Issues a new certificate, which authenticates all later links.
    pub fn renew(&self) {
        match self.authorities.issue_user(SystemTime::now(), self.ttl) {
            Ok(user) => *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(user),
            Err(error) => {
                tracing::error!(%error, "can't issue a new user certificate; the present one stays in use");
            }
        }
    }
}
