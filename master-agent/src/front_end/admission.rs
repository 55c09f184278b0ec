//! The admission of a caller's connection among all that are served.

use std::sync::{Mutex, PoisonError};

use proto_net::handshake::HandshakePermit;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::{
    limits::{Counted, Source},
    workers,
};

/// Counts a connection among those that are served for as long as it lasts, whatever protocol it changes to.
pub struct Admission {
    /// Held until somebody has authenticated. It may be given to a newcomer before.
    unauthenticated: Mutex<Option<HandshakePermit>>,
    /// Cancelled when the connection has to give way to a newcomer.
    pub(super) evicted: CancellationToken,
    _permit: OwnedSemaphorePermit,
    _counted: Counted<Source>,
    /// The connection's weight on the front end's thread that serves it, if it is one of these.
    pub(super) load: Option<workers::Load>,
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

    /// Whether nobody has authenticated on the connection.
    pub(super) fn is_unauthenticated(&self) -> bool {
        self.unauthenticated.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    pub(super) fn authenticated(&self) {
        drop(self.unauthenticated.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}
