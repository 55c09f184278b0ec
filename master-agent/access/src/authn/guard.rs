//! The limit on costly work that unauthenticated callers cause.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use super::reason::FailureReason;

/// Decides about costly steps, such as verifying a signature or asking a server.
pub trait Guard: fmt::Debug + Send + Sync {
    /// Checks that a step may be taken for this caller. The error is the time until it may.
    fn pass(&self) -> Result<(), Duration>;
}

/// Whether the authentication of one request has been costly.
#[derive(Debug, Default)]
pub struct Cost<'a> {
    /// `None` allows everything.
    guard: Option<&'a dyn Guard>,
    incurred: AtomicBool,
}

impl<'a> Cost<'a> {
    pub fn guard(&mut self, guard: &'a dyn Guard) {
        self.guard = Some(guard);
    }

    /// Allows everything from now on.
    pub fn unguard(&mut self) {
        self.guard = None;
    }

    /// Asks the guard. This must be called before each costly step.
    pub fn incur(&self) -> Result<(), FailureReason> {
        self.incurred.store(true, Ordering::Relaxed);
        self.guard.map_or(Ok(()), |guard| guard.pass().map_err(FailureReason::NotTried))
    }

    pub fn incurred(&self) -> bool {
        self.incurred.load(Ordering::Relaxed)
    }
}
