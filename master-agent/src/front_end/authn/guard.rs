//! What finding out about a caller costs, and the guard that may stand before it.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use super::reason::Reason;

/// Stands before what costs something, such as the check of a token's signature or a question to somebody else.
pub trait Guard: fmt::Debug + Send + Sync {
    /// Whether it may be done for this caller; else how long until it may.
    fn pass(&self) -> Result<(), Duration>;
}

/// Whether finding out about one request cost something.
#[derive(Debug, Default)]
pub struct Cost<'a> {
    /// `None` lets everything pass.
    guard: Option<&'a dyn Guard>,
    incurred: AtomicBool,
}

impl<'a> Cost<'a> {
    pub fn guard(&mut self, guard: &'a dyn Guard) {
        self.guard = Some(guard);
    }

    /// Lets everything pass.
    pub fn unguard(&mut self) {
        self.guard = None;
    }

    /// To be asked before anything that costs.
    pub fn incur(&self) -> Result<(), Reason> {
        self.incurred.store(true, Ordering::Relaxed);
        self.guard.map_or(Ok(()), |guard| guard.pass().map_err(Reason::NotTried))
    }

    pub fn incurred(&self) -> bool {
        self.incurred.load(Ordering::Relaxed)
    }
}
