//! The sessions on the further connections of a tunnel.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::session::handshake::Session;

/// The sessions on the further connections of one tunnel.
pub(super) struct FurtherSessions {
    pub(super) most: usize,
    sessions: Mutex<Vec<Session>>,
    /// Until when a link that the node dials may be a further connection, which it was asked for.
    called: Mutex<Option<Instant>>,
}

impl FurtherSessions {
    pub(super) fn new(most: usize) -> Self {
        Self { most, sessions: Mutex::default(), called: Mutex::default() }
    }

    /// Ends all of them. Streams that use one end with it.
    pub(super) fn end(&self) {
        self.sessions().clear();
    }

    pub(super) fn sessions(&self) -> MutexGuard<'_, Vec<Session>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn called(&self) -> MutexGuard<'_, Option<Instant>> {
        self.called.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
