//! The admission of a caller's connection, among all that are served.

use std::sync::{Mutex, PoisonError};

use proto_net::handshake::HandshakePermit;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::{
    limits::{Counted, Source},
    workers,
};

/// A caller's place among those that are served, for as long as its connection lasts, whatever it changes to.
pub struct Admission {
    /// Until somebody has authenticated: who has not gives way to newcomers.
    stranger: Mutex<Option<HandshakePermit>>,
    pub(super) evicted: CancellationToken,
    _permit: OwnedSemaphorePermit,
    _counted: Counted<Source>,
    /// On the thread that serves it, if it is one of the front end's own.
    pub(super) load: Option<workers::Load>,
}

impl Admission {
    pub(super) fn new(
        stranger: HandshakePermit,
        permit: OwnedSemaphorePermit,
        counted: Counted<Source>,
    ) -> Self {
        let evicted = stranger.evicted.clone();
        Self { stranger: Mutex::new(Some(stranger)), evicted, _permit: permit, _counted: counted, load: None }
    }

    pub(super) fn is_strangers(&self) -> bool {
        self.stranger.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    pub(super) fn authenticated(&self) {
        drop(self.stranger.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}
