//! The admission of a caller's connection, which counts against the limits of connections.

use std::sync::{Mutex, MutexGuard, PoisonError};

use proto_net::handshake::HandshakePermit;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::{
    limits::{Counted, Source},
    workers,
};

/// Counts a connection against the limits until the connection ends, even if its protocol changes.
pub struct Admission {
    /// The permit of a connection on which nobody has authenticated. A newer connection may evict it.
    unauthenticated: Mutex<Option<HandshakePermit>>,
    /// Cancelled when a newer connection evicts this one.
    pub(super) evicted: CancellationToken,
    _permit: OwnedSemaphorePermit,
    _counted: Counted<Source>,
    /// Counts the connection on the worker thread that serves it, if there is one.
    pub(super) load: Option<workers::LoadGuard>,
}

impl Admission {
    pub(super) fn new(
        unauthenticated: HandshakePermit,
        permit: OwnedSemaphorePermit,
        counted: Counted<Source>,
    ) -> Self {
        let evicted = unauthenticated.evicted.clone();
        let unauthenticated = Mutex::new(Some(unauthenticated));
        Self { unauthenticated, evicted, _permit: permit, _counted: counted, load: None }
    }

    /// Says that the peer has begun its TLS handshake, so that those who have not are evicted before it.
    pub(super) fn begun(&self) {
        if let Some(permit) = &*self.unauthenticated() {
            permit.begun();
        }
    }

    /// Whether nobody has authenticated on the connection.
    pub(super) fn is_unauthenticated(&self) -> bool {
        self.unauthenticated().is_some()
    }

    pub(super) fn authenticated(&self) {
        drop(self.unauthenticated().take());
    }

    fn unauthenticated(&self) -> MutexGuard<'_, Option<HandshakePermit>> {
        self.unauthenticated.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
