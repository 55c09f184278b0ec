//! Attempts to authenticate, counted as failures until they succeed.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use super::{
    exceeded::{Exceeded, Limit},
    source::Source,
};
use crate::{authn::Guard, rates::Rates};

/// An attempt to authenticate. As soon as it becomes costly, it counts as a failure until it has succeeded. Therefore
/// concurrent guesses are limited like consecutive ones, and an abandoned attempt counts.
#[derive(Debug)]
pub struct Attempt<'a> {
    failures: &'a Rates<Source>,
    source: Source,
    at: Instant,
    counted: AtomicBool,
}

impl<'a> Attempt<'a> {
    pub(super) fn new(failures: &'a Rates<Source>, source: Source, at: Instant) -> Self {
        Self { failures, source, at, counted: AtomicBool::new(false) }
    }

    /// Ends an attempt that has succeeded, or that could not be decided through no fault of its caller.
    pub fn forgive(self) {
        if self.counted.into_inner() {
            self.failures.give_back(&self.source, self.at);
        }
    }

    /// Ends an attempt that has failed. Returns an error if there were too many failures before this one.
    pub fn fail(self) -> Result<(), Exceeded> {
        if self.counted.into_inner() {
            return Ok(());
        }
        let taken = self.failures.take(&self.source, self.at);
        taken.map_err(|retry_after| Exceeded { limit: Limit::FailuresPerAddress, retry_after })
    }
}

impl Guard for Attempt<'_> {
    fn pass(&self) -> Result<(), Duration> {
        if !self.counted.load(Ordering::Relaxed) {
            self.failures.take(&self.source, self.at)?;
            self.counted.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_counts_from_when_it_costs_until_it_is_forgiven() {
        let now = Instant::now();
        let failures = Rates::new(1, 2, now);
        let attempt = || Attempt::new(&failures, Source::Local, now);
        for _ in 0..10 {
            attempt().forgive();
            let good = attempt();
            assert_eq!((good.pass(), good.pass()), (Ok(()), Ok(())), "it counts once, whatever it costs");
            good.forgive();
        }
        let (one, two, three) = (attempt(), attempt(), attempt());
        assert!(one.pass().is_ok() && two.pass().is_ok() && three.pass().is_err());
        three.forgive();
        assert!(attempt().fail().is_err());
        assert!(one.fail().is_ok(), "it has been counted");
        // The caller leaves before the attempt is decided.
        drop(two);
        assert!(attempt().pass().is_err());
    }
}
