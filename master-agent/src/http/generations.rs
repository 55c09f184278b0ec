//! When callers' HTTP connections are to end because the process does.
//!
//! A process that stops serves new connections until the old ones have ended, so the connections that are accepted before
//! and after the signal are two generations.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Tells the connections of one generation how far their end has come. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Generation {
    /// Cancelled when connections must end after their present requests.
    pub draining: CancellationToken,
    /// Cancelled when connections of HTTP/1 that wait for a request must end, too. One that is under way is lost.
    pub closing: CancellationToken,
}

/// The generation of the connections that are accepted now. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Generations(Arc<Mutex<Generation>>);

impl Generations {
    pub fn present(&self) -> Generation {
        self.lock().clone()
    }

    /// Begins the next generation, and returns the one that was present.
    pub fn begin_next(&self) -> Generation {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Generation> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Generation {
    /// Ends the connections of this generation as soon as they have no request.
    pub fn end(&self) {
        self.draining.cancel();
        self.closing.cancel();
    }
}
